"""The Megatron engine of the curriculum (`tokenizer.training.curriculum.engine`): the plain one's step, at any layout.

    loss of a micro-batch x copies of the model    Megatron takes the mean of gradients over copies, the objective is
                                                   written for their sum
    forward and backward of all micro-batches      one after the other, or through Megatron's pipeline schedule
    finalize_model_grads                           sums over copies, tensor ranks and stages
    norms, clipping, AdamW, averages               on this process's shares (`tokenizer.megatron.optimizer`)

With bf16 the network's parameters are bfloat16 and the optimizer keeps them in float32, from the start of a run to the
averages and the model that is saved; the plain engine keeps float32 parameters and computes in bfloat16.

A checkpoint is Megatron's distributed one (parameters, moments, the state of FP8) and, in `weights.pt`, the averaged
model whole: other runs start from it, and it is cut into shares again at any layout.

Imports Megatron: call `tokenizer.megatron.engine.load_megatron` first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from tokenizer.config import read_mapping
from tokenizer.errors import InputError
from tokenizer.gaussians.decoder import GaussianDecoder
from tokenizer.megatron.average import ShareAverage
from tokenizer.megatron.build import build_model, data_parallel
from tokenizer.megatron.checkpoint import STATE_FILE, load_checkpoint, save_checkpoint
from tokenizer.megatron.config import ParallelConfig
from tokenizer.megatron.exchange import native_state, own_tensors, to_megatron
from tokenizer.megatron.optimizer import (
    clip_gradients,
    gradient_norms,
    make_optimizer,
    one_count,
    pieces_of,
    set_counts,
    set_rates,
)
from tokenizer.megatron.trained import NETWORK, MegatronTrained, trained_name
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.sparse import SparseTokens
from tokenizer.text.alignment import TextAlignment
from tokenizer.training.curriculum.config import RunConfig
from tokenizer.training.curriculum.engine import Outcome
from tokenizer.training.curriculum.model import Imitation, Outputs, TrainedModel, save_trained
from tokenizer.training.curriculum.objective import Objective
from tokenizer.training.curriculum.optimization import group_of, rate_at, rate_factors
from tokenizer.training.curriculum.preparation import Prepared
from tokenizer.training.curriculum.processes import Processes
from tokenizer.training.curriculum.tasks import is_understanding

Losses = dict[str, Tensor]

_DISTRIBUTED = "use_distributed_optimizer"


class MegatronEngine:
    """See `tokenizer.training.curriculum.engine.ShardedEngine`.

    Megatron's groups must have been made (`initialise_parallel`); on a CPU everything happens inside `on_cpu()`.

    Args:
        model: float32, the same weights in every process.
        objective, config: what is minimised, and how.
        parallel: the layout; bf16 as `config.precision` says, and without communication during the passes, which
            needs every parameter in every step.
        processes: a `tokenizer.megatron.copies.Copies`.
        device: of this process.
    """

    def __init__(
        self,
        model: TrainedModel,
        objective: Objective,
        config: RunConfig,
        parallel: ParallelConfig,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self.objective, self.config, self.parallel, self.processes = objective, config, parallel, processes
        self._device = device
        # The pictures and the validation of every process use what interprets Gaussians.
        gaussians = model.gaussians.to(device) if model.gaussians is not None else None
        self._native = (model.alignment, gaussians, model.imitation)
        self.stages = parallel_state.get_pipeline_model_parallel_world_size()
        network = build_model(model.network.config, parallel, model.network.state_dict(), device=device)
        beside = self._native if network.post_process else (None, None, None)
        self.model = MegatronTrained(network, *beside).to(device=device)
        groups = {group_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.factors = {g: f for g, f in rate_factors(config.optimizer).items() if f and g in groups}
        for name, parameter in self.model.named_parameters():
            if group_of(trained_name(name)) not in self.factors:
                parameter.requires_grad_(False)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._used: set[str] = set()
        for name, parameter in trained.items():
            parameter.register_hook(partial(self._note, trained_name(name)))
        self.wrapped = data_parallel(self.model, parallel)
        self.optimizer = make_optimizer(self.wrapped, config.optimizer, parallel)
        self.pieces = pieces_of(self.optimizer, trained)
        self._begin_from(model.state_dict())
        group = parallel_state.get_data_parallel_group() if parallel.use_distributed_optimizer else None
        decay, warmup = config.optimizer.ema, config.optimizer.ema_warmup
        self.average = ShareAverage(trained, self.pieces, decay, warmup, group)
        self.counts = {trained_name(name): 0 for name in trained}

    @property
    def device(self) -> torch.device:
        return self._device

    # ------------------------------------------------------------------ a step

    def forward_backward(self, prepared: Sequence[Prepared]) -> dict[str, float]:
        names = ["loss", *(n for task in dict.fromkeys(p.task for p in prepared) for n in self.objective.names(task))]
        self._used.clear()
        self.model.set_is_first_microbatch()  # FP8 layers keep cast weights between the micro-batches of a step
        found = self._pipelined(prepared) if self.stages > 1 else [self._one_by_one(part) for part in prepared]
        finalize_model_grads([self.wrapped])
        self._used = {name for name in self._used if _is_used(name, [part.task for part in prepared])}
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        for place, name in enumerate(names):
            for losses in found:
                sums[place] += losses.get(name, 0.0)
        if self.stages > 1:  # losses are known on the last stage
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(sums, last, group=parallel_state.get_pipeline_model_parallel_group())
        return dict(zip(names, self.processes.sum(sums.tolist()), strict=True))

    def clip_and_step(self, step: int, loss: float) -> Outcome:
        settings = self.config.optimizer
        rate = rate_at(step, self.config.steps, settings)
        set_rates(self.optimizer, rate, settings)
        self.optimizer.prepare_grads()
        for piece in self.pieces:
            if piece.name not in self._used:
                piece.main.grad = None
        norms = gradient_norms(self.pieces, self.device)
        # Loss and norms are the same numbers in every process, so all of them decide alike.
        done = math.isfinite(loss) and math.isfinite(norms["total"])
        if done:
            clip_gradients(self.pieces, norms["total"], settings.max_grad_norm)
            self.optimizer.step_with_ready_grads()
            self.average.update(step)
            for name in self._used:
                self.counts[name] += 1
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        return Outcome(done, norms, {group: rate * factor for group, factor in self.factors.items()})

    def _one_by_one(self, part: Prepared) -> Losses:
        loss, losses = self._losses(part, self.wrapped(part.tokens, part.task, self._generator(part.seed)))
        if loss.requires_grad:  # as in the plain engine
            (loss * self.processes.world).backward()
        return losses

    def _pipelined(self, prepared: Sequence[Prepared]) -> list[Losses]:
        """The losses of all micro-batches on the last stage, nothing on the first."""
        # The schedule takes the mean over micro-batches.
        factor = float(self.processes.world * len(prepared))

        def loss_of(part: Prepared, outputs: Outputs) -> tuple[Tensor, Losses]:
            loss, losses = self._losses(part, outputs)
            return loss * factor, losses

        def step(batches: Iterator[Prepared], model: Any) -> tuple[Any, Callable[[Any], tuple[Tensor, Losses]]]:
            part = next(batches)
            return model(part.tokens, part.task, self._generator(part.seed)), partial(loss_of, part)

        return self._schedule(step, prepared, forward_only=False)

    def _schedule(self, step: Callable[..., Any], batches: Sequence[Any], *, forward_only: bool) -> list[Any]:
        found: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=[self.wrapped],
            num_microbatches=len(batches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return found

    def _losses(self, part: Prepared, outputs: Outputs) -> tuple[Tensor, Losses]:
        alignment = self.model.alignment
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.parallel.bf16):
            loss, terms = self.objective(
                part, outputs, alignment.scale if alignment is not None else None, self.model.gaussians
            )
        return loss, {"loss": loss.detach().clone(), **terms}

    def _note(self, name: str, _: Tensor) -> None:
        self._used.add(name)

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(device=self.device).manual_seed(seed)

    # ------------------------------------------------------------------ looking at it

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with self.average.inside():
            self.model.set_is_first_microbatch()
            yield
        self.model.set_is_first_microbatch()

    @torch.no_grad()
    def infer(self, tokens: SparseTokens, task: str) -> Outputs:
        # Transformer Engine would use what it rounded of the weights before the last update.
        self.model.set_is_first_microbatch()
        if self.stages == 1:
            outputs: Outputs = self.wrapped(tokens, task)
            return outputs

        def step(batches: Iterator[SparseTokens], model: Any) -> tuple[Any, Callable[[Any], tuple[Tensor, Outputs]]]:
            return model(next(batches), task), lambda outputs: (tokens.features.new_zeros(()), outputs)

        found = self._schedule(step, [tokens], forward_only=True)
        return {name: value.to(self.device) for name, value in self._of_last_stage(_on_cpu(found[0] if found else {}))}

    # ------------------------------------------------------------------ what is kept

    def state_dict(self) -> dict[str, Any]:
        average = self._whole_average()
        return {"model": {}, "average": average, "buffers": {}, "optimizer": {}} if self.processes.first else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        found = self._shares(state["average"])
        for name, parameter in self.average.parameters.items():
            if name not in found or found[name].shape != parameter.shape:
                raise InputError(f"the checkpoint is of another model: {trained_name(name)} is missing or differs")
        self.average.load(found)

    def save_shards(self, folder: Path) -> None:
        counts: dict[str, int] = {}
        for stage in self._of_all_stages(self.counts):
            counts.update(stage)
        with one_count(self.optimizer):
            state = {"counts": counts, _DISTRIBUTED: self.parallel.use_distributed_optimizer}
            save_checkpoint(folder, self.wrapped, self.optimizer, state)

    def load_shards(self, folder: Path) -> None:
        # Megatron keeps the moments of its two optimizers in two forms.
        distributed = read_mapping(folder / STATE_FILE)["state"][_DISTRIBUTED]
        if distributed != self.parallel.use_distributed_optimizer:
            raise InputError(
                f"{folder}: holds another optimizer; set megatron.{_DISTRIBUTED}={str(distributed).lower()}"
            )
        counts = load_checkpoint(folder, self.wrapped, self.optimizer)["counts"]
        self.counts = {name: int(counts.get(name, 0)) for name in self.counts}
        set_counts(self.optimizer, self.pieces, self.counts)

    def save_model(self, folder: Path) -> None:
        whole = self._whole_average()
        if not self.processes.first:
            return
        alignment, gaussians, imitation = self._native
        model = TrainedModel(
            ATokenNetwork(self.model.network_config),
            TextAlignment(alignment.config) if alignment is not None else None,
            GaussianDecoder(gaussians.config) if gaussians is not None else None,
            Imitation(imitation.in_features, imitation.out_features) if imitation is not None else None,
        )
        model.load_state_dict(whole)
        save_trained(model, folder)

    def _whole_average(self) -> dict[str, Tensor]:
        """The averaged model by the names of a `TrainedModel`, on the CPU; what is not trained is its own average."""
        values = self.average.whole()
        own = own_tensors(self.model.network)
        network = native_state(self.model.network, {name: values.get(NETWORK + name, t) for name, t in own.items()})
        beside = {name: t for name, t in self.model.state_dict().items() if not name.startswith(NETWORK)}
        beside = {name: values.get(name, tensor) for name, tensor in beside.items()}
        whole = {NETWORK + name: tensor for name, tensor in network.items()}
        return {**_on_cpu(whole), **dict(self._of_last_stage(_on_cpu(beside)))}

    def _shares(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a tensor rank has of all weights of a `TrainedModel`, by the names of a `MegatronTrained`."""
        rank, ranks = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        native = {name.removeprefix(NETWORK): value for name, value in whole.items() if name.startswith(NETWORK)}
        shares = to_megatron(self.model.network_config, native, rank, ranks, self.parallel.transformer_impl)
        return {**whole, **{NETWORK + name: share for name, share in shares.items()}}

    @torch.no_grad()
    def _begin_from(self, whole: Mapping[str, Tensor]) -> None:
        """Give the optimizer the weights that the run starts with as they are: Megatron's has them from bfloat16."""
        shares = self._shares(whole)
        for piece in self.pieces:
            piece.main.copy_(piece.of(shares[piece.own]))

    def _of_all_stages(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.stages
        dist.all_gather_object(found, value, group=parallel_state.get_pipeline_model_parallel_group())
        return found

    def _of_last_stage(self, tensors: dict[str, Tensor]) -> Any:
        """Named tensors of the last stage, on all of a copy's processes with this tensor rank."""
        last: dict[str, Tensor] = tensors if self.stages == 1 else self._of_all_stages(tensors)[-1]
        return last.items()


def _is_used(name: str, tasks: Sequence[str]) -> bool:
    """Whether tasks use a parameter: between stages travels what a task may not use, and brings back zeros."""
    if name.startswith("network.encoder.pool."):
        return any(is_understanding(task) for task in tasks)
    return not name.startswith("network.encoder.to_posterior.") or not all(is_understanding(task) for task in tasks)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, so that training may go on."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
