"""Two gloo processes that run the Megatron model at every layout and compare it with the native one.

Starting processes and importing Megatron takes longer than all checks, so one run makes them all; each leaves the
largest relative difference under a name, and the tests assert on those.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tests.tokenizer.megatron_differences import largest, of_tensors
from tests.tokenizer.networks import visuals
from tokenizer.errors import InputError
from tokenizer.megatron.build import build_model, data_parallel, initialise_parallel
from tokenizer.megatron.checkpoint import load_checkpoint, save_checkpoint
from tokenizer.megatron.config import ParallelConfig
from tokenizer.megatron.cpu import on_cpu
from tokenizer.megatron.engine import load_megatron
from tokenizer.megatron.exchange import native_state
from tokenizer.model.atoken import ATokenNetwork, Encoding
from tokenizer.model.config import ATokenConfig, FSQConfig, RefinerConfig, SkipConfig, TransformerConfig
from tokenizer.sparse import SparseTokens

CONFIG = ATokenConfig(
    name="small",
    patch_size=(4, 4, 4),
    latent_channels=12,
    encoder=TransformerConfig(width=32, depth=1, heads=4, mlp_width=48, norm="layer", bias=True, qk_norm=False),
    decoder=TransformerConfig(width=48, depth=2, heads=2, mlp_width=64, norm="rms", bias=False, qk_norm=True),
)
DISCRETE = replace(
    CONFIG,
    quantizer=FSQConfig(codebook_size=4096, codebooks=2),
    skip=SkipConfig(still_codes=3, clip_codes=2, consistent=True),
    refiner=RefinerConfig(width=4, depth=1),
)

Report = Callable[[str, float], None]


def native_network(config: ATokenConfig, dtype: torch.dtype = torch.float64) -> ATokenNetwork:
    """Every parameter random and large enough to matter."""
    network = ATokenNetwork(config).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    return network


def batch(number: int, dtype: torch.dtype = torch.float64) -> SparseTokens:
    """Stills and a clip of two tiles, 39 tokens or so: an odd number, so that splitting pads it."""
    sizes = [(4, 12), (20, 8, 8), (16, 16)] if number % 2 == 0 else [(8, 8), (4, 20), (16, 4, 8)]
    return visuals(*sizes, seed=number, dtype=dtype)


def loss_of(encoding: Encoding, patches: SparseTokens, target: SparseTokens) -> Tensor:
    """A loss in which every output takes part, with every channel of its own weight."""
    pooled = encoding.pooled * torch.linspace(-1, 1, encoding.pooled.shape[1], dtype=encoding.pooled.dtype)
    return (patches.features - target.features).square().mean() + pooled.sum() + 0.01 * encoding.posterior.kl().mean()


def noise(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + number)


def native_losses(network: ATokenNetwork, *numbers: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    losses = []
    for number in numbers:
        tokens = batch(number, dtype)
        encoding = network.encode(tokens)
        latents = encoding.latents if network.quantizer else encoding.posterior.sample(noise(number))
        losses.append(loss_of(encoding, network.decode(latents), tokens))
    return losses


def native_gradients(*numbers: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of batches, and the gradient of their mean."""
    network = native_network(CONFIG)
    losses = native_losses(network, *numbers)
    torch.stack(losses).mean().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    return [loss.item() for loss in losses], gradients


def made(parallel: ParallelConfig, config: ATokenConfig = CONFIG, dtype: torch.dtype = torch.float64) -> Any:
    initialise_parallel(config, parallel)
    return build_model(config, parallel, native_network(config).state_dict(), dtype=dtype)


def forward_loss(model: nn.Module, number: int, dtype: torch.dtype = torch.float64) -> Tensor:
    tokens = batch(number, dtype)
    output = model(tokens, noise(number))
    return loss_of(output.encoding, output.patches, tokens)


def main_gradients(model: Any) -> dict[str, Tensor]:
    """Gradients that Megatron's data parallelism has collected, by native names."""
    gradients = {name: parameter.main_grad for name, parameter in model.module.named_parameters()}
    return native_state(model.module, gradients)


# ---------------------------------------------------------------------- checks, each in both processes


def check_tensor_parallel(report: Report, folder: Path) -> None:
    model = made(ParallelConfig(tensor_model_parallel_size=2))
    reference, expected = native_gradients(0)
    loss = forward_loss(model, 0)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    report("tp loss", abs(loss.item() - reference[0]) / abs(reference[0]))
    report("tp gradients", of_tensors(native_state(model, gradients), expected))
    report("tp weights", of_tensors(native_state(model), native_network(CONFIG).state_dict()))
    report("tp gradient norm", abs(gradient_norm(model) / norm_of(expected) - 1))
    save_checkpoint(folder / "checkpoint", model, state={"step": 7})
    for multiple in (2, 16):  # FP8 would ask for 16; zeros behind the batch change nothing
        model._packing = partial(padded_packing, multiple)
        report(f"padding to {multiple}", abs(forward_loss(model, 0).item() - reference[0]) / abs(reference[0]))


def check_sequence_parallel(report: Report, _: Path) -> None:
    from megatron.core.distributed import finalize_model_grads

    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    model = data_parallel(made(parallel), parallel)
    reference, expected = native_gradients(0)
    loss = forward_loss(model, 0)
    loss.backward()
    finalize_model_grads([model])
    report("sp loss", abs(loss.item() - reference[0]) / abs(reference[0]))
    report("sp gradients", of_tensors(main_gradients(model), expected))

    parallel = replace(parallel, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    recomputed = data_parallel(made(parallel), parallel)
    forward_loss(recomputed, 0).backward()
    finalize_model_grads([recomputed])
    report("recomputed gradients", of_tensors(main_gradients(recomputed), expected))


def check_pipeline(report: Report, folder: Path) -> None:
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    model = data_parallel(made(parallel), parallel)
    numbers = (0, 1, 2)
    reference, expected = native_gradients(*numbers)

    def step(numbers: Iterator[int], model: Any) -> tuple[Any, Callable[[Any], tuple[Tensor, dict[str, Tensor]]]]:
        number = next(numbers)

        def loss(output: Any) -> tuple[Tensor, dict[str, Tensor]]:
            value = loss_of(output.encoding, output.patches, batch(number))
            return value, {"loss": value.detach().clone()}  # the schedule divides the value in place

        return model(batch(number), noise(number)), loss

    losses = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(numbers),
        model=[model],
        num_microbatches=len(numbers),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    finalize_model_grads([model])
    if parallel_state.is_pipeline_last_stage():
        found = [microbatch["loss"].item() for microbatch in losses]
        report("pp losses", largest(abs(a / b - 1) for a, b in zip(found, reference, strict=True)))
    report("pp gradients", of_tensors(main_gradients(model), expected))
    report("pp weights", of_tensors(native_state(model.module), native_network(CONFIG).state_dict()))
    load_checkpoint(folder / "checkpoint", model)
    report("tp checkpoint at pp", of_tensors(native_state(model.module), native_network(CONFIG).state_dict()))


def check_data_parallel(report: Report, folder: Path) -> None:
    from megatron.core.distributed import finalize_model_grads

    parallel = ParallelConfig()
    model = data_parallel(made(parallel), parallel)
    reference, expected = native_gradients(0, 1)
    loss = forward_loss(model, dist.get_rank())
    loss.backward()
    finalize_model_grads([model])
    report("dp loss", abs(loss.item() / reference[dist.get_rank()] - 1))
    report("dp gradients", of_tensors(main_gradients(model), expected))

    blank = made(parallel)
    for parameter in blank.parameters():
        parameter.data.zero_()
    state = load_checkpoint(folder / "checkpoint", blank)
    report("state", abs(state["step"] - 7))
    report("tp checkpoint at dp", of_tensors(native_state(blank), native_network(CONFIG).state_dict()))
    report("loss after checkpoint", abs(forward_loss(blank, 0).item() / reference[0] - 1))


def check_optimizers(report: Report, folder: Path) -> None:
    """Steps of AdamW on two processes are torch's on their joint batch, and go on from a checkpoint at any layout."""
    torch_weights = native_steps(3)
    for kind, distributed in (("optimizer", False), ("distributed optimizer", True)):
        parallel = ParallelConfig(use_distributed_optimizer=distributed)
        run = training_run(parallel)
        steps(run, 2)
        save_checkpoint(folder / kind, *run)
        weights = steps(run, 1)
        report(f"{kind} weights", of_tensors(weights, torch_weights))
        for layout, ranks in (("same layout", 1), ("tp", 2)):
            resumed = training_run(replace(parallel, tensor_model_parallel_size=ranks))
            for parameter in resumed[0].parameters():
                parameter.data.zero_()
            load_checkpoint(folder / kind, *resumed)
            report(f"{kind} resumed at {layout}", of_tensors(steps(resumed, 1), weights))


def training_run(parallel: ParallelConfig) -> tuple[Any, Any]:
    """A float32 model and its optimizer."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = data_parallel(made(parallel, dtype=torch.float32), parallel)
    options = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        weight_decay=0.0,
        clip_grad=0.0,
        adam_eps=1e-4,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        params_dtype=torch.float32,
    )
    return model, get_megatron_optimizer(options, [model])


def steps(run: tuple[Any, Any], count: int) -> dict[str, Tensor]:
    """The weights after steps on batches 0 and 1, one on each data-parallel rank or both on all."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    model, optimizer = run
    ranks = parallel_state.get_data_parallel_world_size()
    for _ in range(count):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        for number in range(parallel_state.get_data_parallel_rank(), 2, ranks):
            (forward_loss(model, number, torch.float32) * ranks / 2).backward()
        finalize_model_grads([model])
        optimizer.step()
    return native_state(model.module)


def native_steps(count: int) -> dict[str, Tensor]:
    network = native_network(CONFIG, torch.float32)
    adam = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-4)
    for _ in range(count):
        adam.zero_grad()
        torch.stack(native_losses(network, 0, 1, dtype=torch.float32)).mean().backward()
        adam.step()
    return network.state_dict()


def check_refusals(report: Report, folder: Path) -> None:
    """Another model's checkpoint, and no checkpoint: refused by both processes, in one line."""
    other = replace(CONFIG, latent_channels=24)
    model = made(ParallelConfig(tensor_model_parallel_size=2), other)
    for name, source in (("another model refused", "checkpoint"), ("no checkpoint refused", "nowhere")):
        try:
            load_checkpoint(folder / source, model)
        except InputError as error:
            report(name, len(str(error).splitlines()))


def check_discrete(report: Report, _: Path) -> None:
    """Quantiser and linear codes, over two tensor ranks."""
    model = made(ParallelConfig(tensor_model_parallel_size=2), DISCRETE)
    network = native_network(DISCRETE)
    with torch.no_grad():
        loss, reference = forward_loss(model, 0), native_losses(network, 0)[0]
        indices, expected = model(batch(0)).encoding.indices, network.encode(batch(0)).indices
    assert expected is not None
    report("discrete loss", abs(loss.item() / reference.item() - 1))
    report("indices", float((indices.features != expected.features).sum()))


def check_engine_spec(report: Report, folder: Path) -> None:
    """The Transformer Engine spec, its names and its checkpoints, with stand-ins for its layers."""
    from tests.tokenizer.megatron_stand_ins import stand_ins

    parallel = ParallelConfig(tensor_model_parallel_size=2)
    with stand_ins():
        initialise_parallel(CONFIG, parallel)
        engine = replace(parallel, transformer_impl="transformer_engine")
        model = build_model(CONFIG, engine, native_network(CONFIG).state_dict(), dtype=torch.float64)
        reference, expected = native_gradients(0)
        loss = forward_loss(model, 0)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        report("engine loss", abs(loss.item() / reference[0] - 1))
        report("engine gradients", of_tensors(native_state(model, gradients), expected))
        for parameter in model.parameters():
            parameter.data.zero_()
        load_checkpoint(folder / "checkpoint", model)
        report("local checkpoint in engine", of_tensors(native_state(model), native_network(CONFIG).state_dict()))


CHECKS = (
    check_tensor_parallel,
    check_sequence_parallel,
    check_pipeline,
    check_data_parallel,
    check_optimizers,
    check_refusals,
    check_discrete,
    check_engine_spec,
)


def padded_packing(multiple: int, tokens: SparseTokens) -> Any:
    from tokenizer.megatron.packing import pack

    return pack(tokens, CONFIG.tile_steps, multiple)


def gradient_norm(model: nn.Module) -> float:
    """As Megatron's clipping counts it: shares of all tensor ranks, whole parameters once."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    squares = sum(
        (
            parameter.grad.square().sum()
            for parameter in model.parameters()
            if parameter.grad is not None and param_is_not_tensor_parallel_duplicate(parameter)
        ),
        torch.zeros((), dtype=torch.float64),
    )
    dist.all_reduce(squares)
    return float(squares.sqrt())


def norm_of(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.stack([tensor.square().sum() for tensor in tensors.values()]).sum().sqrt())


def refusal_lines() -> int:
    """Lines of what is said to who wants the broken Transformer Engine; 0 if they do not name the cause."""
    try:
        load_megatron(transformer_engine=True)
    except InputError as error:
        return len(str(error).splitlines()) if "no torch extension found" in str(error) else 0
    return 0


def run_checks(folder: Path) -> dict[str, float]:
    """All checks in two processes: the larger of both processes' differences by name.

    They find a Transformer Engine that is only half installed: it raises on import, and must do no harm.
    """
    broken = folder / "transformer_engine"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('no torch extension\\nfound')")
    mp.spawn(_process, args=(str(folder),), nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
    results: dict[str, float] = torch.load(folder / "results.pt", weights_only=True)
    return results


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, float] = {"engine refused": refusal_lines()}
    load_megatron()

    def report(name: str, value: float) -> None:
        found[name] = largest((value, found.get(name, 0.0)))

    with on_cpu():
        for check in CHECKS:
            check(report, Path(folder))
    both: list[Any] = [None, None]
    dist.all_gather_object(both, found)
    if rank == 0:
        names = both[0].keys() | both[1].keys()
        torch.save({n: largest(b.get(n, 0.0) for b in both) for n in names}, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()
