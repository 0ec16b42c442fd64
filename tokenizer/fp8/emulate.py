"""The arithmetic of FP8 linear layers in plain torch, for any device; slower than bfloat16, and for numerics alone.

A tensor is multiplied by a scale that brings its largest value to the largest of the type, or by the power of two below
it, and rounded to FP8 (to nearest, ties to even, saturating). The three products of a layer take the rounded numbers:

    y  = X_q W_q^T / (s_x s_w)        forward, both E4M3
    dx = G_q W_q   / (s_g s_w)        gradients are E5M2 in the hybrid format
    dW = G_q^T X_q / (s_g s_x)

FP8 numbers are exact in float32, and so are their products; sums are in float32, as in the kernels. Weights are rounded
from their float32 masters. A tensor that is not finite makes the product NaN, which a trainer sees; saturation would
hide it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tokenizer.fp8.config import FP8Config
from tokenizer.fp8.rows import in_padded_rows

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

Role = Literal["input", "weight", "gradient"]
ROLES: tuple[Role, ...] = ("input", "weight", "gradient")


@dataclass(frozen=True, slots=True)
class Quantised:
    """A tensor in FP8: `values` (of an FP8 type) over the scalar `scale`, both on the device."""

    values: Tensor
    scale: Tensor


def largest_magnitude(x: Tensor) -> Tensor:
    """max |x| as a float32 scalar; NaN where there is one."""
    return x.detach().abs().amax().float()


def scale_for(largest: Tensor, limit: Tensor | float, margin: int = 0, *, power_of_two: bool = False) -> Tensor:
    """What to multiply by: `limit` / `largest` / 2^margin, float32 of the shape of `largest`.

    One for an all-zero tensor. Finite for a largest value that is not zero, however small.

    Args:
        limit: the type's largest number, of each tensor or of all.
        power_of_two: round down to one.
    """
    scale = (limit / largest.float()).clamp_max(torch.finfo(torch.float32).max)
    if power_of_two:  # without the bits of its fraction
        scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.where(largest == 0, 1.0, scale * 2.0**-margin)


def quantise(x: Tensor, kind: torch.dtype, scale: Tensor) -> Quantised:
    """x * scale rounded to `kind`; beyond its range to its largest number, NaN stays NaN."""
    limit = torch.finfo(kind).max
    return Quantised((x.float() * scale).clamp(-limit, limit).to(kind), scale)


def product(a: Quantised, b: Quantised) -> Tensor:
    """a @ b in float32."""
    return (a.values.float() @ b.values.float()) * (a.scale.reciprocal() * b.scale.reciprocal())


def transposed(a: Quantised) -> Quantised:
    return Quantised(a.values.t(), a.scale)


class _Linear(torch.autograd.Function):
    """x [N, in], weight [out, in] -> float32 [N, out]; see the module text."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: EmulatedLinear, remember: bool) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            left, right = layer.quantised("input", x, remember), layer.quantised("weight", weight, remember)
            ctx.save_for_backward(left.values, left.scale, right.values, right.scale)
            ctx.layer, ctx.types = layer, (x.dtype, weight.dtype)
            return product(left, transposed(right))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_values, x_scale, weight_values, weight_scale = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            above = ctx.layer.quantised("gradient", gradient, True)
            for_x = for_weight = None
            if ctx.needs_input_grad[0]:
                for_x = product(above, Quantised(weight_values, weight_scale)).to(ctx.types[0])
            if ctx.needs_input_grad[1]:
                for_weight = product(transposed(above), Quantised(x_values, x_scale)).to(ctx.types[1])
        return for_x, for_weight, None, None


class EmulatedLinear(nn.Linear):
    """A linear layer whose products are FP8, with the parameters of another.

    Args:
        linear: whose weight and bias it takes, the same objects under the same names.
        config: format and recipe.

    The delayed recipe keeps `amax_history` [3, length] float32, newest first, of inputs, weights and gradients. It is
    no part of the state dict (`Conversion.state_dict` has it) and calls without gradients do not change it. While a
    history is empty the tensor's own largest value counts; Transformer Engine scales by one then, which loses small
    gradients.
    """

    amax_history: Tensor | None

    def __init__(self, linear: nn.Linear, config: FP8Config) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.config = config
        delayed = config.fp8_recipe == "delayed"
        shape = (len(ROLES), config.fp8_amax_history_len)
        history = torch.zeros(shape, dtype=torch.float32, device=linear.weight.device) if delayed else None
        self.register_buffer("amax_history", history, persistent=False)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in] -> [N, out] in the type that autocast says, or that of x."""
        place = x.device.type
        kind = torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else x.dtype
        return in_padded_rows(self._product, x.to(kind)).to(kind)

    def _product(self, x: Tensor) -> Tensor:
        result: Tensor = _Linear.apply(x, self.weight, self, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        return result if self.bias is None else result + self.bias.float()

    def kind_of(self, role: Role) -> torch.dtype:
        """The FP8 type of inputs, weights or gradients."""
        return E5M2 if role == "gradient" and self.config.fp8_format == "hybrid" else E4M3

    @torch.no_grad()
    def quantised(self, role: Role, x: Tensor, remember: bool) -> Quantised:
        """x in FP8, scaled as the recipe says; `remember` its largest value for later calls."""
        kind, own = self.kind_of(role), largest_magnitude(x)
        if self.amax_history is None:
            scale = self._scale(own, kind)
        else:
            scale = self._delayed_scale(self.amax_history[ROLES.index(role)], own, kind, remember)
        # Saturation would make a finite number of infinity: say NaN for the whole tensor instead.
        return quantise(x, kind, torch.where(own.isfinite(), scale, torch.nan))

    def _scale(self, largest: Tensor, kind: torch.dtype, margin: int = 0) -> Tensor:
        return scale_for(largest, torch.finfo(kind).max, margin, power_of_two=self.config.power_of_two_scales)

    def _delayed_scale(self, history: Tensor, own: Tensor, kind: torch.dtype, remember: bool) -> Tensor:
        before = history.amax() if self.config.fp8_amax_compute_algo == "max" else history[0]
        scale = self._scale(torch.where(before == 0, own, before), kind, self.config.fp8_margin)
        if remember:
            # A broken step must not be remembered for a thousand more.
            newest = torch.where(own.isfinite(), own, history[0])
            history.copy_(torch.cat([newest[None], history[:-1]]))
        return scale
