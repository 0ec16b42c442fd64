"""Fused FP8 blocks in Triton's interpreter, which must be chosen before Triton is imported: a process of its own.

Numbers of 16 bits stand in for FP8, so that what is left beside the exact network is bfloat16's rounding. Prints one
JSON object: relative errors of the output and of all gradients by case.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.fp8_passes import block_scales, passes
from tests.tokenizer.curriculum_worker import fork, status_of
from tests.tokenizer.fp8_networks import tiny_config, tiny_network
from tests.tokenizer.networks import visuals
from tokenizer.fp8 import FP8Config
from tokenizer.fp8.backends import fused_blocks
from tokenizer.fp8.fused import block, launch, products, scales
from tokenizer.fp8.fused.scales import BLOCK_LAYERS, Scales
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.sparse import SparseTokens
from tokenizer.training.curriculum.model import TrainedModel
from tokenizer.training.curriculum.tasks import IMAGE_RECONSTRUCTION
from tokenizer.training.curriculum.torch_engine import compute_again, share_out

HALF = torch.float16
STEPS = 2


def main() -> int:
    for module, name in ((block, "E4M3"), (scales, "E4M3"), (scales, "E5M2")):
        setattr(module, name, HALF)
    exact = gradients(network())
    found: dict[str, dict[str, float]] = {"computed again": computed_again()}
    recipes: tuple[Literal["tensorwise", "delayed"], ...] = ("tensorwise", "delayed")
    for recipe in recipes:
        model = network()
        kept = fuse(model, recipe)
        found[recipe] = errors(gradients(model, kept), exact)
        assert bool(kept.history.any()) == (recipe == "delayed")
        for changed in (model, other := network()):
            with torch.no_grad():
                changed.get_parameter("decoder.transformer.blocks.0.mlp.down.weight").mul_(-1.0)
        found[f"{recipe}, weights changed"] = errors(gradients(model), gradients(other))
    model = network()
    fuse(model, "delayed")
    with torch.no_grad():
        output = run(model)
    # Looking on changes nothing: the first step still finds nothing that is known.
    found["without gradients"] = errors({"output": output}, {"output": exact["output"]})
    with tempfile.TemporaryDirectory() as folder:
        children = [fork(lambda r=rank: shared_out(r, Path(folder), exact)) for rank in range(2)]  # type: ignore[misc]
        assert [status_of(child) for child in children] == [0, 0]
        found["fsdp2"] = json.loads((Path(folder) / "errors.json").read_text())
    for transformer in model.transformers():
        timed = passes(transformer.config, 23, torch.device("cpu"), block_scales(torch.device("cpu")))
        assert {one.tile for one in timed} == set(launch.TILES), "the benchmark has them all"
        for one in timed:
            one.call()
    what_is_broken_stays_broken()
    what_may_be_summed_fast_is_what_was_said()
    print(json.dumps(found))
    return 0


def computed_again() -> dict[str, float]:
    """Blocks that are computed again on the way back, beside blocks that are not."""
    both = []
    for again in (False, True):
        model = network()
        kept = fuse(model, "delayed")
        for transformer in model.transformers():
            for one in transformer.blocks if again else ():
                compute_again(one)
        both.append({**gradients(model, kept), "history": kept.history})
    return errors(both[1], both[0])


def what_is_broken_stays_broken() -> None:
    """Infinities and NaN become NaN both ways, and nothing else does; the step is not remembered."""
    kept = block_scales(torch.device("cpu"))
    x = torch.randn(23, 80, generator=torch.Generator().manual_seed(0))
    x[3, 7], x[4, 7], x[22, 79], x[0, 0] = torch.inf, -torch.inf, torch.nan, 0.0
    for _ in range(2):  # without a history and with one
        operand, sums = launch.cast(x.bfloat16(), launch.Site(kept, 0), sums=True)
        assert torch.equal(operand.plain[:23].isnan(), ~x.isfinite())
        assert torch.equal(operand.turned.T.nan_to_num(-7.0), operand.plain.nan_to_num(-7.0))
        assert sums is not None
        assert torch.equal(sums.isfinite(), x.isfinite().all(0))
        kept.move_on()
        assert not kept.history.any()


def what_may_be_summed_fast_is_what_was_said() -> None:
    """Of each of the eight layers of two blocks: one product forward, and two backward."""
    product, flags = products._product, list[bool]()

    def counted(*operands: Any, fast: bool) -> Tensor:
        flags.append(fast)
        return product(*operands, fast=fast)

    setattr(products, "_product", counted)  # noqa: B010
    try:
        for choice, fast in (("forward", 8), ("all", 24)):
            flags.clear()
            model = network()
            fuse(model, "delayed", fast_accumulation=choice)
            run(model).sum().backward()
            assert len(flags) == 24
            assert sum(flags) == fast
    finally:
        setattr(products, "_product", product)  # noqa: B010


def shared_out(rank: int, folder: Path, exact: dict[str, Tensor]) -> None:
    """The same in one of two processes that share parameters out; both see the same tokens."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    model = TrainedModel(network(), None, None)
    kept = fuse(model.network, "delayed")
    share_out(model, torch.device("cpu"))
    found = gradients(model.network, kept, lambda: reconstruct(model))
    assert all(isinstance(gradient, DTensor) for name, gradient in found.items() if name != "output")
    whole = {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in found.items()}
    if rank == 0:
        (folder / "errors.json").write_text(json.dumps(errors(whole, exact)))
    dist.destroy_process_group()


def reconstruct(model: TrainedModel) -> Tensor:
    decoded: Tensor = model(images(), IMAGE_RECONSTRUCTION)["decoded"]
    return decoded


def network() -> ATokenNetwork:
    """Widths that fill no tile, 23 tokens (of 32 padded ones), and learned parameters that are not ones and zeros."""
    model = tiny_network(tiny_config(width=48, mlp_width=80, heads=2))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.shape == (2, 24):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def fuse(model: ATokenNetwork, recipe: Literal["tensorwise", "delayed"], **options: Any) -> Scales:
    names = [f"{part}.transformer.blocks.0.{layer}" for part in ("encoder", "decoder") for layer in BLOCK_LAYERS]
    # FP8 saturates where a magnitude grows; numbers of 16 bits do not, and need room.
    return fused_blocks(model, names, FP8Config(fp8_recipe=recipe, fp8_margin=2, **options), torch.device("cpu"))


def images() -> SparseTokens:
    return visuals((12, 20), (16, 8), seed=0, dtype=torch.float32)


def run(model: ATokenNetwork) -> Tensor:
    return model.decode(model.encode(images()).latents).features


def gradients(
    model: ATokenNetwork, kept: Scales | None = None, forward: Callable[[], Tensor] | None = None
) -> dict[str, Tensor]:
    """Of the last of some steps without an optimizer, and the "output"."""
    for _ in range(STEPS):
        model.zero_grad()
        output = run(model) if forward is None else forward()
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        if kept is not None:
            kept.move_on()
    return {"output": output.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == exact.keys()
    return {name: ((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}


if __name__ == "__main__":
    torch.set_num_threads(1)  # the threads of products do not survive a fork
    sys.exit(main())
