"""Muon for the matrices inside transformer blocks: momentum whose singular values are all made nearly one.

torch has one too (`torch.optim.Muon`); it orthogonalises in bfloat16 whatever the device, which on CPUs without such
instructions takes several times as long as the rest of a step. Here matrices of one shape go through together, in the
type that the device is fast in.

    m <- mu m + (1 - mu) g,   u = g + mu (m - g),   w <- (1 - lr decay) w - lr 0.2 sqrt(max(rows, columns)) O(u)

O(u) comes from five quintic Newton-Schulz steps (Jordan et al. 2024); the factor makes the length of a step that of
AdamW's, so that rates can be compared (Liu et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tokenizer.errors import InputError

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_AS_ADAMW = 0.2


class Muon(torch.optim.Optimizer):
    """See the module text.

    Args:
        params: groups of matrices [R, C], each with "lr" and "weight_decay".
        lr: where a group has none.
        momentum: mu.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on all parameters that have a gradient."""
        if closure is not None:
            raise InputError("Muon takes gradients as they are: call backward before step, and step without a closure")
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for parameters in alike.values():
                self._move(parameters, group)

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        momentum, rate = group["momentum"], group["lr"]
        updates = []
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - momentum)
            updates.append(gradient.lerp(state["momentum"], momentum))
        rows, columns = parameters[0].shape
        directions = orthogonalised(torch.stack(updates))
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_add_(
            parameters,
            list(directions.to(parameters[0].dtype).unbind()),
            alpha=-rate * _AS_ADAMW * max(rows, columns) ** 0.5,
        )


def orthogonalised(matrices: Tensor) -> Tensor:
    """[n, R, C] -> the same directions with singular values of about one (0.7 to 1.2), [n, R, C]."""
    kind = torch.bfloat16 if matrices.device.type == "cuda" else torch.float32
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).to(kind)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
