"""Optimisers, the learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

from tokenizer.training.config import OptimizerConfig
from tokenizer.training.muon import Muon

_Network = TypeVar("_Network", bound=nn.Module)


def make_optimizers(network: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or AdamW plus Muon for the matrices inside transformer blocks.

    Biases, norms, scales and position tables are not decayed; the linear codes, which start at a good place with small
    weights, get `skip_lr` and no decay, or stay fixed. Each group remembers its peak rate as "peak".
    """
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    skip: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        path = f".{name}"
        if path.startswith(".skip.") and ".links." not in path:
            parameter.requires_grad_(config.skip_lr > 0)
            skip.append(parameter)
        elif parameter.ndim < 2 or "positions" in name or "norm" in name:
            plain.append(parameter)
        elif config.muon_lr is not None and ".blocks." in path:
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0, "lr": config.plain_lr or config.lr},
        {"params": [p for p in skip if p.requires_grad], "weight_decay": 0.0, "lr": config.skip_lr},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)
    ]
    if matrices and config.muon_lr is not None:
        optimizers.append(Muon([{"params": matrices, "weight_decay": config.weight_decay}], lr=config.muon_lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Share of the peak rate at `step` of `steps`: linear warm-up, plateau, then 1 - sqrt(progress) down to zero."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    decay = max(1, round(steps * config.decay_fraction))
    progress = (step - (steps - decay)) / decay
    return 1.0 if progress <= 0 else float(max(0.0, 1.0 - progress**0.5))


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


class MovingAverage(Generic[_Network]):
    """Exponential moving average of the parameters, with a shorter memory in the first steps."""

    def __init__(self, network: _Network, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move the average towards `network` after step number `step` (counted from 0)."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        theirs = [p.detach() for p in network.parameters()]
        torch._foreach_lerp_(list(self.network.parameters()), theirs, weight)
