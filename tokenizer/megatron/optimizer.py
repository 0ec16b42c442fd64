"""Megatron's optimizer for a run: rates and decay by parameter, norms by part, steps of what a step has touched.

A step trains some tasks, and what no task of it has used is left as it is, moments included, as torch's optimizers do
with parameters that have no gradient. Megatron's gradient buffers hold zeros there, which Adam would take for
gradients, so they are taken away before it looks. torch's Adam then counts the steps of each parameter; Megatron's
checkpoints know one count for all, so the run keeps its own and sets the counts right after loading. The fused Adam of
Transformer Engine and apex has one count anyway, which only matters to its bias correction in the first steps.

Imports Megatron: call `tokenizer.megatron.engine.load_megatron` first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor, nn

from tokenizer.megatron.config import ParallelConfig
from tokenizer.megatron.trained import trained_name
from tokenizer.training.curriculum.config import OptimizerSettings
from tokenizer.training.curriculum.model import PARTS, part_of
from tokenizer.training.curriculum.optimization import decays, group_of, rate_factors


@dataclass(frozen=True, slots=True)
class Piece:
    """What the optimizer of this process moves of one parameter.

    own: the parameter's name in a `MegatronTrained`. name: in a `TrainedModel`.
    main: float32, all of the process's share, or with the distributed optimizer a part of it, flat.
    start: where that part begins in the flat share.
    counted: whether norms count its gradient here; copies on other processes are not.
    """

    own: str
    name: str
    main: Tensor
    start: int
    counted: bool

    def of(self, share: Tensor) -> Tensor:
        """What this piece is of something that has the shape of the process's share."""
        return share.reshape(-1)[self.start : self.start + self.main.numel()].view(self.main.shape)


def make_optimizer(wrapped: Any, settings: OptimizerSettings, parallel: ParallelConfig) -> Any:
    """Megatron's optimizer over a `MegatronTrained` in DistributedDataParallel, as published (PAPER 4).

    Its groups have `lr_mult` and `wd_mult`, which `set_rates` reads, and parameters of one dtype: Megatron loses the
    order of a group that has several.
    """
    factors = rate_factors(settings)

    def kind(parameter: Tensor, name: str) -> tuple[float, float, bool]:
        native = trained_name(name)
        stays_float32 = parallel.bf16 and parameter.dtype == torch.float32
        return factors[group_of(native)], float(decays(native, parameter)), stays_float32

    overrides = {
        ParamKey(
            with_name_predicate=ParamWithNamePredicate(
                name=f"rate {wanted[0]} decay {wanted[1]} float32 {wanted[2]}",
                fn=lambda parameter, name, wanted=wanted: kind(parameter, name) == wanted,
            )
            # Of what tells the groups of a checkpoint apart, this alone is free for the dtype: we read it nowhere.
        ): {"lr_mult": wanted[0], "wd_mult": wanted[1], "is_decoupled_lr": wanted[2]}
        for wanted in product(sorted(set(factors.values())), (0.0, 1.0), (False, True))
    }
    options = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        clip_grad=0.0,
        bf16=parallel.bf16,
        params_dtype=torch.bfloat16 if parallel.bf16 else torch.float32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of groups that are empty on one of two stages
        optimizer = get_megatron_optimizer(options, [wrapped], config_overrides=overrides)
    for part in parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.Adam):
            for state in part.optimizer.state.values():
                state["step"] = torch.zeros(())
    return optimizer


def parts(optimizer: Any) -> list[Any]:
    """Megatron's optimizers behind one that may chain several."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def pieces_of(optimizer: Any, named: Mapping[str, nn.Parameter]) -> list[Piece]:
    """What the optimizer moves on this process.

    Args:
        named: trained parameters by their names in a `MegatronTrained`.
    """
    sharded = [part for part in parts(optimizer) if hasattr(part, "model_param_group_index_map")]
    shares = {
        parameter: (
            part.optimizer.param_groups[group]["params"][order],
            int(part._get_model_param_range_map(parameter)["param"].start),
        )
        for part in sharded
        for parameter, (group, order) in part.model_param_group_index_map.items()
    }
    first_copy = parallel_state.get_data_parallel_rank() == 0
    found = []
    for own, parameter in named.items():
        name, counted = trained_name(own), param_is_not_tensor_parallel_duplicate(parameter)
        if not sharded:
            main = getattr(parameter, "main_param", parameter)
            found.append(Piece(own, name, main, 0, counted and first_copy))
        elif parameter in shares:
            found.append(Piece(own, name, *shares[parameter], counted))
    return found


def set_rates(optimizer: Any, rate: float, settings: OptimizerSettings) -> None:
    """Set rate and decay of all groups of parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_mult"]
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]


@torch.no_grad()
def gradient_norms(pieces: Iterable[Piece], device: torch.device) -> dict[str, float]:
    """L2 norms of the gradients of each part of the model, and of all ("total"); the same numbers on all processes."""
    squares = torch.zeros(len(PARTS), dtype=torch.float64, device=device)
    for piece in pieces:
        if piece.counted and piece.main.grad is not None:
            squares[PARTS.index(part_of(piece.name))] += torch.linalg.vector_norm(piece.main.grad).double().square()
    dist.all_reduce(squares)
    sums: list[float] = squares.tolist()
    return {"total": math.sqrt(sum(sums)), **{part: math.sqrt(s) for part, s in zip(PARTS, sums, strict=True)}}


@torch.no_grad()
def clip_gradients(pieces: Iterable[Piece], norm: float, limit: float) -> None:
    """Scale gradients of total length `norm` down to `limit`, if they are longer."""
    gradients = [piece.main.grad for piece in pieces if piece.main.grad is not None and piece.main.grad.numel()]
    if norm > limit and gradients:
        torch._foreach_mul_(gradients, limit / norm)


@contextmanager
def one_count(optimizer: Any) -> Iterator[None]:
    """Inside, all parameters have taken as many steps as the one with most, as Megatron's checkpoints want it."""
    states = [state for part in parts(optimizer) for state in _counting(part)]
    kept = [state["step"] for state in states]
    most = max((float(step) for step in kept), default=0.0)
    for state in states:
        state["step"] = torch.tensor(most)
    try:
        yield
    finally:
        for state, step in zip(states, kept, strict=True):
            state["step"] = step


def set_counts(optimizer: Any, pieces: Iterable[Piece], counts: Mapping[str, int]) -> None:
    """Tell torch's Adam how many steps each parameter has taken, by its name in a `TrainedModel`."""
    for part in parts(optimizer):
        if isinstance(part.optimizer, torch.optim.Adam):
            for piece in pieces:
                if piece.main in part.optimizer.state:
                    part.optimizer.state[piece.main]["step"] = torch.tensor(float(counts.get(piece.name, 0)))


def _counting(part: Any) -> list[dict[str, Any]]:
    return list(part.optimizer.state.values()) if isinstance(part.optimizer, torch.optim.Adam) else []
