"""The passes over tokens of a block in FP8, in Triton: each reads what a product wrote and writes the next one's input.

A product on Hopper wants both operands with the summed axis last, so what is used forward and backward is written
twice, as [rows, columns] and as [columns, rows]; one byte each, they cost what one bfloat16 copy would. PACK rows
travel through the transposition as one integer of 32 bits: a program takes its rows in PACK interleaved parts.
Rows from `count` on (padding to a multiple of 16) are zeros, which change no sum.

Conventions: tensors are row-major, sums are float32. `scale` multiplies before rounding; `largest` takes max |value| by
atomic maximum, whose result does not depend on the order. Conversion saturates, but what is not finite becomes NaN, so
that a trainer sees it. Sums of columns (gradients of biases and norms) are written for each program of rows, and added
up in a fixed order later.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled(value, scale):
    """value * scale, NaN where that is not finite."""
    value *= scale
    return tl.where(tl.abs(value) < float("inf"), value, float("nan"))


@triton.jit
def pack(packed, last, number, like, part: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr):
    """Add `number` as the `part`-th of PACK numbers of the type `like` points to; `last` is the one before.

    FAST converts pairs with the instruction there is for it. Taking bytes out of what Triton converts was wrong on an
    H100: every second pair of columns (Triton 3.6).
    """
    if FAST:
        if part % 2 == 1:
            if like.dtype.element_ty == tl.float8e5:
                pair = tl.inline_asm_elementwise(
                    "{ .reg .b16 h; cvt.rn.satfinite.e5m2x2.f32 h, $2, $1; cvt.u32.u16 $0, h; }",
                    "=r,f,f", [last, number], dtype=tl.int32, is_pure=True, pack=1,
                )  # fmt: skip
            else:
                pair = tl.inline_asm_elementwise(
                    "{ .reg .b16 h; cvt.rn.satfinite.e4m3x2.f32 h, $2, $1; cvt.u32.u16 $0, h; }",
                    "=r,f,f", [last, number], dtype=tl.int32, is_pure=True, pack=1,
                )  # fmt: skip
            packed |= pair << (8 * (part - 1))
    elif PACK == 4:
        packed |= number.to(like.dtype.element_ty).to(tl.uint8, bitcast=True).to(tl.int32) << (8 * part)
    else:
        packed |= number.to(like.dtype.element_ty).to(tl.uint16, bitcast=True).to(tl.int32) << (16 * part)
    return packed


@triton.jit
def store_part(
    value, scale, plain, place, inside, packed, last, part: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    """Round one part of a tile and store it at `place`; returns `packed` with it, and what it was before rounding."""
    number = scaled(value, scale)
    tl.store(plain + place, number.to(plain.dtype.element_ty), mask=inside)
    return pack(packed, last, number, plain, part, PACK, FAST), number


@triton.jit
def store_turned(packed, turned, row, columns, padded, width, most, largest, PACK: tl.constexpr):
    """Packed rows [rows / PACK, columns] to `turned` [width, padded / PACK], and the largest of `most` to `largest`."""
    inside = (row[None, :] < padded // PACK) & (columns[:, None] < width)
    place = columns[:, None].to(tl.int64) * (padded // PACK) + row[None, :]
    tl.store(turned + place, tl.trans(packed), mask=inside)
    tl.atomic_max(largest, tl.max(most))


@triton.jit
def cast_kernel(
    x, stride, plain, turned, scale, largest, sums, count, padded, width,
    SUMS: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [count, width] with rows `stride` apart; `sums` [programs, width] of columns, if SUMS."""
    row = tl.program_id(0) * (ROWS // PACK) + tl.arange(0, ROWS // PACK)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = columns[None, :] < width
    times = tl.load(scale)
    most = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    total = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    packed = tl.zeros((ROWS // PACK, COLUMNS), tl.int32)
    last = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    for part in tl.static_range(PACK):
        rows = row * PACK + part
        place = rows[:, None].to(tl.int64) * stride + columns[None, :]
        value = tl.load(x + place, mask=(rows[:, None] < count) & exists, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(value))
        if SUMS:
            total += value
        place = rows[:, None].to(tl.int64) * width + columns[None, :]
        inside = (rows[:, None] < padded) & exists
        packed, last = store_part(value, times, plain, place, inside, packed, last, part, PACK, FAST)
    store_turned(packed, turned, row, columns, padded, width, most, largest, PACK)
    if SUMS:
        tl.store(sums + tl.program_id(0) * width + columns, tl.sum(total, axis=0), mask=columns < width)


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """FAST is the hardware's, exact to 2^-11; the interpreter has none."""
    if FAST:
        level = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        level = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return level


@triton.jit
def gelu_kernel(
    x, plain, turned, scale, largest, count, padded, width,
    PACK: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """GELU (tanh approximation) of x [padded, width]."""
    row = tl.program_id(0) * (ROWS // PACK) + tl.arange(0, ROWS // PACK)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = columns[None, :] < width
    times = tl.load(scale)
    most = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    packed = tl.zeros((ROWS // PACK, COLUMNS), tl.int32)
    last = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    for part in tl.static_range(PACK):
        rows = row * PACK + part
        place = rows[:, None].to(tl.int64) * width + columns[None, :]
        value = tl.load(x + place, mask=(rows[:, None] < count) & exists, other=0.0).to(tl.float32)
        inner = 0.7978845608028654 * value * (1.0 + 0.044715 * value * value)
        value = 0.5 * value * (1.0 + tanh(inner, FAST))
        most = tl.maximum(most, tl.abs(value))
        stored = (rows[:, None] < padded) & exists
        packed, last = store_part(value, times, plain, place, stored, packed, last, part, PACK, FAST)
    store_turned(packed, turned, row, columns, padded, width, most, largest, PACK)


@triton.jit
def gelu_backward_kernel(
    gradient, x, plain, turned, scale, largest, sums, count, padded, width,
    SUMS: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of x [padded, width] from that of its GELU."""
    row = tl.program_id(0) * (ROWS // PACK) + tl.arange(0, ROWS // PACK)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = columns[None, :] < width
    times = tl.load(scale)
    most = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    total = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    packed = tl.zeros((ROWS // PACK, COLUMNS), tl.int32)
    last = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    for part in tl.static_range(PACK):
        rows = row * PACK + part
        place = rows[:, None].to(tl.int64) * width + columns[None, :]
        inside = (rows[:, None] < count) & exists
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        above = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        square = value * value
        level = tanh(0.7978845608028654 * value * (1.0 + 0.044715 * square), FAST)
        slope = 0.7978845608028654 * (1.0 + 0.134145 * square)
        below = 0.5 * above * (1.0 + level + value * (1.0 - level * level) * slope)
        most = tl.maximum(most, tl.abs(below))
        if SUMS:
            total += below
        stored = (rows[:, None] < padded) & exists
        packed, last = store_part(below, times, plain, place, stored, packed, last, part, PACK, FAST)
    store_turned(packed, turned, row, columns, padded, width, most, largest, PACK)
    if SUMS:
        tl.store(sums + tl.program_id(0) * width + columns, tl.sum(total, axis=0), mask=columns < width)
