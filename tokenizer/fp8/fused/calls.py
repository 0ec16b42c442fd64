"""Calling compiled kernels without asking Triton each time which one fits.

Triton looks at all arguments at every call, which takes a processor longer than a GPU takes for most passes of a small
batch. Here the same question has a shorter answer: types and alignment of tensors, and what Triton assumes of integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

_ALIGNED = 16
"""What Triton compiles other code for: addresses in bytes and integers that are multiples of it, and the integer 1."""

_COMPILED: dict[tuple[Any, ...], Any] = {}


def call(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants, num_warps=num_warps); `constants` are its compile-time parameters."""
    if not isinstance(kernel, JITFunction):  # the interpreter's
        kernel[grid](*arguments, num_warps=num_warps, **constants)
        return
    key = (
        id(kernel), torch.cuda.current_device(), num_warps, *constants.values(), *[_kind(value) for value in arguments]
    )  # fmt: skip
    compiled = _COMPILED.get(key)
    if compiled is None:
        _COMPILED[key] = kernel[grid](*arguments, num_warps=num_warps, **constants)
        return
    rest = [constants[name] for name in kernel.arg_names[len(arguments) :]]
    compiled[(*grid, 1, 1)[:3]](*arguments, *rest)


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % _ALIGNED
    return (value % _ALIGNED == 0, value == 1) if isinstance(value, int) else None
