"""Calls of the kernels: what they allocate, how they are divided into programs, and what is added up after them.

Nothing here waits for the device. T is the number of tokens, P the next multiple of 16: what is rounded, and every
product, has P rows. "Sums" are those of columns, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tokenizer.fp8.fused.calls import call
from tokenizer.fp8.fused.heads import heads_backward_kernel, heads_kernel
from tokenizer.fp8.fused.kernels import cast_kernel, gelu_backward_kernel, gelu_kernel
from tokenizer.fp8.fused.norms import norm_backward_kernel, norm_kernel, slopes_kernel, statistics_kernel
from tokenizer.fp8.fused.scales import Scales
from tokenizer.megatron.fp8 import FP8_MULTIPLE
from tokenizer.megatron.rows import padded_count
from tokenizer.model.transformer import NORM_EPS

TILES: dict[str, dict[str, int]] = {
    "cast": {"ROWS": 128, "COLUMNS": 64, "ROW_AXIS": 1, "num_warps": 8},
    "gelu": {"ROWS": 64, "COLUMNS": 128, "ROW_AXIS": 1, "num_warps": 8},
    "gelu_backward": {"ROWS": 64, "COLUMNS": 64, "ROW_AXIS": 1, "num_warps": 4},
    "norm": {"ROWS": 64, "COLUMNS": 64, "ROW_AXIS": 1, "num_warps": 4},
    "norm_backward": {"ROWS": 64, "COLUMNS": 64, "ROW_AXIS": 1, "num_warps": 4},
    "heads": {"ROWS": 16, "num_warps": 4},
    "heads_backward": {"ROWS": 32, "ROW_AXIS": 1, "num_warps": 4},
}
"""Rows and columns of a program, which axis of programs its rows are (see `kernels`), and its warps.

`python -m benchmarks.fp8_passes --tiles` tries others. These were chosen by what is compiled for an H100: loads in
flight, registers, instructions for each number.
"""

Launch = Callable[[Tensor, Tensor, Tensor, Tensor, int], object]
"""Runs a kernel that writes (plain, turned) by (scale, largest); the last argument is its PACK."""


class Kept(NamedTuple):
    """What the way back needs of an operand: `turned` [C, R] in FP8, times `inverse`, a scalar."""

    turned: Tensor
    inverse: Tensor


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor in FP8 both ways: `plain` [R, C] and `turned` [C, R]. It is either times `inverse`, a scalar.

    bias: of a weight, in bfloat16.
    """

    plain: Tensor
    turned: Tensor
    inverse: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """Where a tensor is rounded: number `number` of `scales`; `remember` its magnitude for later steps."""

    scales: Scales
    number: int
    remember: bool = True

    def rounded(self, rows: int, columns: int, like: Tensor, launch: Launch) -> Operand:
        """What `launch` writes."""
        plain, turned, packed = _both_ways(rows, columns, self.scales.kinds[self.number], like)
        inverse = self.scales.rounded(
            self.number,
            lambda scale, largest: launch(plain, packed, scale, largest, 4 // plain.itemsize),
            remember=self.remember,
        )
        return Operand(plain, turned, inverse)


def _both_ways(rows: int, columns: int, kind: torch.dtype, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty [rows, columns] and [columns, rows], and the latter as kernels write it: several rows in one integer."""
    plain, turned = (like.new_empty(shape, dtype=kind) for shape in ((rows, columns), (columns, rows)))
    return plain, turned, turned.view(torch.int32)


def padded(count: int) -> int:
    return padded_count(count, FP8_MULTIPLE)


def cast(x: Tensor, site: Site, *, sums: bool = False) -> tuple[Operand, Tensor | None]:
    """x [T, C] rounded, and its sums [C]. Rows may lie apart."""
    count, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows = padded(count)
    parts = _room(sums, _programs("cast", rows), width, x)
    operand = site.rounded(
        rows,
        width,
        x,
        lambda plain, turned, scale, largest, pack: call(
            cast_kernel, _grid("cast", rows, width),
            x, x.stride(0), plain, turned, scale, largest, parts, count, rows, width,
            SUMS=sums, PACK=pack, FAST=x.is_cuda, **TILES["cast"],
        ),
    )  # fmt: skip
    return operand, parts.sum(0) if sums else None


def cast_weight(weight: Tensor, scale: Tensor, kind: torch.dtype, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [O, I] rounded by a known scale, both ways. O is a multiple of 16; `ignored` is a scalar to write to."""
    rows, width = weight.shape
    plain, turned, packed = _both_ways(rows, width, kind, weight)
    call(
        cast_kernel, _grid("cast", rows, width),
        weight, weight.stride(0), plain, packed, scale, ignored, ignored, rows, rows, width,
        SUMS=False, PACK=4 // plain.itemsize, FAST=weight.is_cuda, **TILES["cast"],
    )  # fmt: skip
    return plain, turned


def gelu(x: Tensor, count: int, site: Site) -> Operand:
    """GELU (tanh approximation) of x [P, C], rounded."""
    rows, width = x.shape
    return site.rounded(
        rows,
        width,
        x,
        lambda plain, turned, scale, largest, pack: call(
            gelu_kernel, _grid("gelu", rows, width),
            x, plain, turned, scale, largest, count, rows, width, PACK=pack, FAST=x.is_cuda, **TILES["gelu"],
        ),
    )  # fmt: skip


def gelu_backward(gradient: Tensor, x: Tensor, count: int, site: Site, *, sums: bool) -> tuple[Operand, Tensor | None]:
    """The gradient of x [P, C] from that of its GELU, rounded, and its sums [C]."""
    rows, width = x.shape
    parts = _room(sums, _programs("gelu_backward", rows), width, x)
    operand = site.rounded(
        rows,
        width,
        x,
        lambda plain, turned, scale, largest, pack: call(
            gelu_backward_kernel, _grid("gelu_backward", rows, width),
            gradient, x, plain, turned, scale, largest, parts, count, rows, width,
            SUMS=sums, PACK=pack, FAST=x.is_cuda, **TILES["gelu_backward"],
        ),
    )  # fmt: skip
    return operand, parts.sum(0) if sums else None


@dataclass(frozen=True, slots=True)
class Normed:
    """The norm of some tokens: rounded, and what its backward pass needs. `x` [T, D] is what was normed."""

    operand: Operand
    x: Tensor
    means: Tensor
    factors: Tensor


def norm(x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor | None, site: Site, *, rms: bool) -> Normed:
    """The norm of x [T, D], or of x + update [P, D]."""
    count, width = x.shape
    rows = padded(count)
    means, factors = x.new_empty(2, rows, dtype=torch.float32).unbind()
    added = x if update is None else torch.empty_like(x)
    call(
        statistics_kernel, (rows,),
        x, x if update is None else update, added, means, factors, count, NORM_EPS,
        ADD=update is not None, RMS=rms, WIDTH=width, **_whole_row(width),
    )  # fmt: skip
    operand = site.rounded(
        rows,
        width,
        x,
        lambda plain, turned, scale, largest, pack: call(
            norm_kernel, _grid("norm", rows, width),
            added, weight, weight if bias is None else bias, means, factors, plain, turned, scale, largest,
            count, rows, width,
            BIAS=bias is not None, PACK=pack, FAST=x.is_cuda, **TILES["norm"],
        ),
    )  # fmt: skip
    return Normed(operand, added, means, factors)


@dataclass(frozen=True, slots=True)
class NormGradients:
    """x: [T, D] with the gradient that was there before. operand, sums: x rounded and its sums [D], if asked for."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    operand: Operand | None
    sums: Tensor | None


def norm_backward(
    gradient: Tensor,
    above: Tensor,
    normed: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    *,
    rms: bool,
    bias: bool,
    site: Site | None = None,
    sums: bool = False,
) -> NormGradients:
    """Through a norm and the addition around it.

    Args:
        gradient: [P, D] of the norm. above: [T, D] of what else was made of x. normed: (x, means, factors).
        site: where the result is rounded, if it is.
    """
    x, means, factors = normed
    count, width = x.shape
    rows, below = padded(count), torch.empty_like(x)
    along, level = x.new_empty(2, rows, dtype=torch.float32).unbind()
    call(
        slopes_kernel, (count,),
        x, gradient, weight, means, factors, along, level, RMS=rms, WIDTH=width, **_whole_row(width),
    )  # fmt: skip
    parts = x.new_empty(3, _programs("norm_backward", rows), width, dtype=torch.float32)
    of_weight, of_bias, of_below = parts.unbind()

    def launch(plain: Tensor, turned: Tensor, scale: Tensor, largest: Tensor, pack: int) -> None:
        call(
            norm_backward_kernel, _grid("norm_backward", rows, width),
            x, gradient, above, weight, means, factors, along, level, below, plain, turned, scale, largest,
            of_weight, of_bias, of_below, count, rows, width,
            BIAS=bias, CAST=site is not None, SUMS=sums, PACK=pack, FAST=x.is_cuda, **TILES["norm_backward"],
        )  # fmt: skip

    operand = None
    if site is not None:
        operand = site.rounded(rows, width, x, launch)
    else:
        launch(below, below, below, below, 4)
    # Rows of `parts` that nobody asked for were not written, and are not looked at.
    totals = parts.sum(1).unbind()
    return NormGradients(below, totals[0], totals[1] if bias else None, operand, totals[2] if sums else None)


@dataclass(frozen=True, slots=True)
class Heads:
    """How a projection becomes queries and keys. scales: of the QK norm, [H, Dh] each. table: of the rotation."""

    heads: int
    width: int
    scales: tuple[Tensor, Tensor] | None
    table: Tensor | None

    def options(self) -> dict[str, int | bool]:
        """What kernels are compiled for; HALF is as many pairs as a program has lanes for."""
        return {
            "NORM": self.scales is not None,
            "ROTARY": self.table is not None,
            "HEADS": self.heads,
            "WIDTH": self.width,
            "HALF": triton.next_power_of_2(self.width) // 2,
        }


def split_heads(qkv: Tensor, count: int, heads: Heads) -> tuple[Tensor, Tensor]:
    """Queries and keys [T, H, Dh], normed and rotated, from qkv [P, 3 H Dh]."""
    query, key = qkv.new_empty(2, count, heads.heads, heads.width).unbind()
    call(
        heads_kernel, (_programs("heads", count), 2),
        qkv, *(heads.scales or (qkv, qkv)), qkv if heads.table is None else heads.table, query, key,
        count, math.sqrt(heads.width), **heads.options(), **TILES["heads"],
    )  # fmt: skip
    return query, key


def split_heads_backward(
    gradients: tuple[Tensor, Tensor, Tensor], qkv: Tensor, heads: Heads, site: Site, *, sums: bool
) -> tuple[Operand, tuple[Tensor, Tensor] | None, Tensor | None]:
    """The gradient of qkv, rounded; those of the QK norm's scales; and its sums.

    Args:
        gradients: of queries, keys and values, [T, H, Dh] each. qkv: not read without a QK norm.
    """
    count, wide = gradients[0].shape[0], heads.heads * heads.width
    rows = padded(count)
    programs = _programs("heads_backward", rows)
    of_scales = _room(heads.scales is not None, programs, 2 * wide, qkv)
    parts = _room(sums, programs, 3 * wide, qkv)
    operand = site.rounded(
        rows,
        3 * wide,
        qkv,
        lambda plain, turned, scale, largest, pack: call(
            heads_backward_kernel, _in_order("heads_backward", programs, 3 * heads.heads),
            *gradients, qkv, *(heads.scales or (qkv, qkv)), qkv if heads.table is None else heads.table,
            plain, turned, scale, largest, of_scales, parts, count, rows, math.sqrt(heads.width),
            SUMS=sums, PACK=pack, FAST=qkv.is_cuda, **heads.options(), **TILES["heads_backward"],
        ),
    )  # fmt: skip
    for_scales = None
    if heads.scales is not None:
        first, second = of_scales.sum(0).view(2, heads.heads, heads.width).unbind()
        for_scales = first, second
    return operand, for_scales, parts.sum(0) if sums else None


def _whole_row(width: int) -> dict[str, int]:
    """A program for each row."""
    return {"BLOCK": triton.next_power_of_2(width), "num_warps": 4}


def _programs(kernel: str, rows: int) -> int:
    return -(-rows // TILES[kernel]["ROWS"])


def _grid(kernel: str, rows: int, columns: int) -> tuple[int, int]:
    return _in_order(kernel, _programs(kernel, rows), -(-columns // TILES[kernel]["COLUMNS"]))


def _in_order(kernel: str, down: int, across: int) -> tuple[int, int]:
    return (across, down) if TILES[kernel]["ROW_AXIS"] else (down, across)


def _room(needed: bool, rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows, columns] where programs leave numbers; something else where none are needed, which they do not touch."""
    return like.new_empty(rows, columns, dtype=torch.float32) if needed else like
