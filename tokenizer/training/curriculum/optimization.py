"""AdamW as published, its schedule, and gradients measured by part; on parameters that may be shared out (FSDP2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.training.curriculum.config import OptimizerSettings
from tokenizer.training.curriculum.model import PARTS, part_of
from tokenizer.training.curriculum.processes import Processes
from tokenizer.training.muon import Muon

GROUPS = ("encoder", "codes", "refiner", "rest")
"""Groups of learning rates, as logs name them."""


def make_optimizers(
    model: nn.Module, settings: OptimizerSettings, *, shared: bool = False
) -> list[torch.optim.Optimizer]:
    """AdamW over a `TrainedModel` (PAPER 4): the encoder at its own rate, matrices alone decayed.

    With `muon_lr`, Muon trains the matrices inside transformer blocks. Each group has a "name", a "factor" of the
    learning rate, and "plain" where none of its parameters may be decayed; `set_rates` reads them.

    Args:
        shared: parameters are shared out (FSDP2), which the fused kernel does not take on every device.
    """
    groups: dict[tuple[str, str], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = group_of(name)
        if rate_factors(settings)[rate] == 0:
            parameter.requires_grad_(False)
            continue
        groups.setdefault((rate, _sort(name, parameter, settings)), []).append(parameter)
    adamw: list[dict[str, Any]] = []
    muon: list[dict[str, Any]] = []
    for (rate, sort), parameters in groups.items():
        group = {
            "params": parameters,
            "weight_decay": 0.0 if sort == "plain" else settings.weight_decay,
            "name": rate if sort != "muon" else f"{rate} matrices",
            "factor": _factor(rate, sort, settings),
            "plain": sort == "plain",
        }
        (muon if sort == "muon" else adamw).append(group)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(adamw, lr=settings.lr, betas=settings.betas, fused=not shared)
    ]
    if muon and settings.muon_lr is not None:
        optimizers.append(Muon(muon, lr=settings.muon_lr))
    return optimizers


def rate_factors(settings: OptimizerSettings) -> dict[str, float]:
    """Factors of the learning rate by group (`GROUPS`); 0 leaves parameters as they are."""
    return {
        "encoder": settings.encoder_lr_factor,
        "codes": settings.codes_lr_factor,
        "refiner": settings.refiner_lr_factor,
        "rest": 1.0,
    }


def _sort(name: str, parameter: Tensor, settings: OptimizerSettings) -> str:
    """How a parameter is trained: "plain" without decay, "decayed", or by "muon"."""
    if not decays(name, parameter):
        return "plain"
    return "muon" if settings.muon_lr is not None and ".blocks." in name and parameter.ndim == 2 else "decayed"


def _factor(rate: str, sort: str, settings: OptimizerSettings) -> float:
    """Of the scheduled learning rate."""
    factor = rate_factors(settings)[rate]
    if sort == "muon" and settings.muon_lr is not None:
        return factor * settings.muon_lr / settings.lr
    if sort == "plain" and rate not in ("codes", "refiner") and settings.plain_lr is not None:
        return factor * settings.plain_lr / settings.lr
    return factor


def group_of(name: str) -> str:
    """The group of learning rates that a parameter belongs to.

    The encoder is what SigLIP 2 brings: transformer and pool. The layer that writes the posterior is new.
    """
    if name.startswith(("network.encoder.transformer.", "network.encoder.pool.")):
        return "encoder"
    if name.startswith("network.refiner."):
        return "refiner"
    return "codes" if name.startswith("network.skip.") and ".links." not in name else "rest"


def decays(name: str, parameter: Tensor) -> bool:
    """Whether a parameter of a `TrainedModel`, or a share of one, is decayed."""
    # Scales of the QK norm are [heads, channels], the position table [256, channels]: no matrices of a layer.
    plain = name.endswith((".scale", "positions.weight", "refiner.place")) or ".skip." in name
    return parameter.ndim >= 2 and not plain


def rate_at(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Learning rate of step number `step` (from 0) of `steps`: linear warm-up, then as `schedule` says to `min_lr`."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "plateau":
        decay = max(1, round(steps * settings.decay_fraction))
        fall = math.sqrt(max(0.0, min(1.0, (step + decay + 1 - steps) / decay)))
        return settings.lr - (settings.lr - settings.min_lr) * fall
    progress = (step - settings.warmup) / max(1, steps - 1 - settings.warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return settings.min_lr + (settings.lr - settings.min_lr) * cosine


def set_rates(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> dict[str, float]:
    """Set the rates of all groups, and return them by name; of a name's groups that of the matrices."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = rate * group["factor"]
    # Groups of an earlier version's state do not say what they are. A weight_decay of 0 would not tell them apart.
    return {group["name"]: group["lr"] for group in sorted(groups, key=lambda group: not group.get("plain"))}


def is_shared(tensor: Tensor) -> bool:
    """Whether this process holds a share of a tensor alone (a `DTensor`)."""
    return hasattr(tensor, "to_local")


def holders(tensor: Tensor, world: int) -> int:
    """How many processes hold the same numbers of a tensor: all, or of what is shared out within nodes one of each."""
    if not is_shared(tensor):
        return world
    shared: Any = tensor
    return math.prod(shared.device_mesh.size(n) for n, place in enumerate(shared.placements) if place.is_replicate())


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that is shared out; any other tensor as it is."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


@torch.no_grad()
def gradient_norms(
    named: Iterable[tuple[str, nn.Parameter]], processes: Processes, *, shared: bool
) -> dict[str, float]:
    """L2 norms of the gradients of each part of the model, and of all ("total"); 0 for a part without any.

    Args:
        shared: each process holds a part of every gradient; otherwise each holds all of it.
    """
    held = [(name, parameter, parameter.grad) for name, parameter in named if parameter.grad is not None]
    norms = torch._foreach_norm([local(gradient) for _, _, gradient in held]) if held else ()
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    counts: dict[str, list[int]] = {part: [] for part in PARTS}
    for (name, parameter, _), norm in zip(held, norms, strict=True):
        found[part_of(name)].append(norm)
        # What several processes hold is counted by all of them.
        counts[part_of(name)].append(holders(parameter, processes.world) if shared else 1)
    sums = [_sum_of_squares(found[part], counts[part]) for part in PARTS]
    if shared:
        sums = processes.sum(sums)
    result = {part: math.sqrt(value) for part, value in zip(PARTS, sums, strict=True)}
    return {"total": math.sqrt(sum(sums)), **result}


def _sum_of_squares(norms: Sequence[Tensor], counts: Sequence[int]) -> float:
    """Of norms that are counted so many times each; 0 without any."""
    if not norms:
        return 0.0
    squares = torch.stack(list(norms)).double().square()
    if max(counts) > 1:
        squares = squares / torch.tensor(counts, dtype=torch.float64, device=squares.device)
    return float(squares.sum())


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Scale gradients of total length `norm` down to `limit`, if they are longer."""
    if norm > limit:
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, limit / norm)


def averaging_weight(decay: float, step: int, warmup: int) -> float:
    """How far an average moves towards the parameters after step number `step`, from 0; further in `warmup` steps.

    There it remembers about a tenth of the steps so far, so that it does not hold on to where a run began.
    """
    return 1.0 - (min(decay, (1 + step) / (10 + step)) if step < warmup else decay)


class Average:
    """Exponential moving average of parameters, with a shorter memory in the first steps.

    Args:
        parameters: by name; shared-out ones are averaged share by share.
        decay: how much of the average stays in each step. warmup: the number of those first steps.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, warmup: int) -> None:
        self.decay, self.warmup = decay, warmup
        self.parameters = parameters
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters after step number `step` (from 0)."""
        weight = averaging_weight(self.decay, step, self.warmup)
        values = [local(value) for value in self.values.values()]
        torch._foreach_lerp_(values, [local(parameter.detach()) for parameter in self.parameters.values()], weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters with their averages; twice is as before, bit for bit."""
        for name, parameter in self.parameters.items():
            mine, theirs = local(self.values[name]), local(parameter.detach())
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)
