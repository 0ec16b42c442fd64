"""The three products of a linear layer from operands in FP8.

On CUDA they are `torch._scaled_mm`. The product forward sums as fast as the hardware can (with about 14 bits), the ones
backward in full float32, as Transformer Engine does, unless they are asked to be `fast` too. Elsewhere, where kernels
run in Triton's interpreter, they are computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.fp8.fused.launch import Kept, Operand


def forward(x: Operand, weight: Operand) -> Tensor:
    """x [P, I], weight [O, I] -> x weight^T + its bias [P, O] in bfloat16."""
    return _product(x.plain, weight.plain, x.inverse, weight.inverse, weight.bias, torch.bfloat16, fast=True)


def of_inputs(gradient: Operand, weight: Kept, *, fast: bool) -> Tensor:
    """gradient [P, O], weight [O, I] -> gradient weight [P, I] in bfloat16."""
    return _product(gradient.plain, weight.turned, gradient.inverse, weight.inverse, None, torch.bfloat16, fast=fast)


def of_weight(gradient: Operand, x: Kept, *, fast: bool) -> Tensor:
    """gradient [P, O], x [P, I] -> gradient^T x [O, I] in float32."""
    return _product(gradient.turned, x.turned, gradient.inverse, x.inverse, None, torch.float32, fast=fast)


def _product(
    a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, bias: Tensor | None, kind: torch.dtype, *, fast: bool
) -> Tensor:
    """a b^T in `kind`, with the summed axis last in both."""
    if a.device.type == "cuda":
        result: Tensor = torch._scaled_mm(
            a, b.t(), scale_a=a_inverse, scale_b=b_inverse, bias=bias, out_dtype=kind, use_fast_accum=fast
        )
        return result
    product = (a.float() @ b.float().t()) * (a_inverse * b_inverse)
    return (product if bias is None else product + bias.float()).to(kind)
