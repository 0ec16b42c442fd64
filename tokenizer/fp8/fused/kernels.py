"""The passes over tokens of a block in FP8, in Triton: each reads what a product wrote and writes the next one's input.

A product on Hopper wants both operands with the summed axis last, so what is used forward and backward is written
twice, as [rows, columns] and as [columns, rows]; one byte each, they cost what one bfloat16 copy would. PACK rows
travel through the transposition as one integer of 32 bits: a program takes its rows in PACK interleaved parts.
Rows from `count` on (padding to a multiple of 16) are zeros, which change no sum.

A program loads all that it needs before it stores anything. No compiler moves a load past a store that might go to the
same place, so that parts which are loaded, computed and stored one after the other wait for memory PACK times.

Conventions: tensors are row-major, sums are float32. A program's tile starts at row `top` and column `left`; places in
it are counted from there, in 32 bits. ROW_AXIS is the axis of programs along the rows: with 1, programs that run at the
same time share rows, with 0 columns. `scale` multiplies before rounding; `largest` takes max |value| by atomic maximum,
whose result does not depend on the order. Conversion saturates, but what is not finite becomes NaN, so that a trainer
sees it. Sums of columns (gradients of biases and norms) are written for each program of rows, and added up in a fixed
order later.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of_program(width, PACK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_AXIS: tl.constexpr):
    """Where the tile starts, its rows of a part (before they are interleaved) and columns, and which columns exist."""
    top = tl.program_id(ROW_AXIS) * ROWS
    left = tl.program_id(1 - ROW_AXIS) * COLUMNS
    column = tl.arange(0, COLUMNS)
    return top, left, tl.arange(0, ROWS // PACK), column, column < width - left


@triton.jit
def load_parts(x, stride, rows_left, row, column, exists, PACK: tl.constexpr):
    """The parts of the tile that starts at x, whose rows lie `stride` apart; zeros where there is nothing."""
    parts = ()
    for part in tl.static_range(PACK):
        rows = row * PACK + part
        inside = (rows[:, None] < rows_left) & exists[None, :]
        part_of_x = tl.load(x + (rows[:, None] * stride + column[None, :]), mask=inside, other=0.0)
        parts += (part_of_x,)  # type: ignore[assignment]
    return parts


@triton.jit
def load_rows(x, rows_left, row, PACK: tl.constexpr):
    """One number for each row of the tile, [rows, 1] for each part."""
    parts = ()
    for part in tl.static_range(PACK):
        rows = row * PACK + part
        parts += (tl.load(x + rows, mask=rows < rows_left, other=0.0)[:, None],)  # type: ignore[assignment]
    return parts


@triton.jit
def scaled(value, scale):
    """value * scale, NaN where that is not finite, for zero times infinity is."""
    number = value * scale
    return tl.fma(number, 0.0, number)


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
def round_parts(
    parts, plain, stride, times, rows_left, row, column, exists,
    SUMS: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Round the parts of the tile that starts at `plain`, multiplied by `times`, and store them.

    Returns:
        The parts rounded, packed; the largest magnitudes; the sums of rows, if SUMS.
    """
    most = tl.zeros(parts[0].shape, tl.float32)
    total = tl.zeros(parts[0].shape, tl.float32)
    last = tl.zeros(parts[0].shape, tl.float32)
    packed = tl.zeros(parts[0].shape, tl.int32)
    for part in tl.static_range(PACK):
        value = parts[part].to(tl.float32)
        most = tl.maximum(most, tl.abs(value))
        if SUMS:
            total += value
        number = scaled(value, times)
        rows = row * PACK + part
        inside = (rows[:, None] < rows_left) & exists[None, :]
        tl.store(plain + (rows[:, None] * stride + column[None, :]), number.to(plain.dtype.element_ty), mask=inside)
        packed = pack(packed, last, number, plain, part, PACK, FAST)
        last = number
    return packed, most, total


@triton.jit
def store_turned(packed, turned, top, left, row, column, exists, padded, most, largest, PACK: tl.constexpr):
    """Packed rows [rows / PACK, columns] to their place in `turned` [width, padded / PACK], and max(most) to `largest`.

    The maximum orders nothing else: a stricter one would wait for all stores, and empty a cache that others use.
    """
    length = padded // PACK
    first = left.to(tl.int64) * length + top // PACK
    inside = (row[None, :] < (padded - top) // PACK) & exists[:, None]
    tl.store(turned + first + (column[:, None] * length + row[None, :]), tl.trans(packed), mask=inside)
    tl.atomic_max(largest, tl.max(most), sem="relaxed")


@triton.jit
def store_tile(
    parts, plain, turned, times, largest, sums, top, left, row, column, exists, padded, width,
    SUMS: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr, ROW_AXIS: tl.constexpr,
):  # fmt: skip
    """All that is kept of a tile's parts: both copies, the largest magnitude, and sums of columns, if SUMS."""
    corner = plain + top.to(tl.int64) * width + left
    packed, most, total = round_parts(
        parts, corner, width, times, padded - top, row, column, exists, SUMS, PACK, FAST
    )  # fmt: skip
    store_turned(packed, turned, top, left, row, column, exists, padded, most, largest, PACK)
    if SUMS:
        tl.store(sums + tl.program_id(ROW_AXIS) * width + left + column, tl.sum(total, axis=0), mask=exists)


@triton.jit
def cast_kernel(
    x, stride, plain, turned, scale, largest, sums, count, padded, width,
    SUMS: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_AXIS: tl.constexpr,
):  # fmt: skip
    """x [count, width] with rows `stride` apart; `sums` [programs, width] of columns, if SUMS."""
    top, left, row, column, exists = tile_of_program(width, PACK, ROWS, COLUMNS, ROW_AXIS)
    values = load_parts(x + top.to(tl.int64) * stride + left, stride, count - top, row, column, exists, PACK)
    times = tl.load(scale)
    store_tile(
        values, plain, turned, times, largest, sums, top, left, row, column, exists, padded, width,
        SUMS, PACK, FAST, ROW_AXIS,
    )  # fmt: skip


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
    PACK: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_AXIS: tl.constexpr,
):  # fmt: skip
    """GELU of x [padded, width]: x (1 + tanh(z)) / 2 with z = sqrt(2 / pi) (x + 0.044715 x^3)."""
    top, left, row, column, exists = tile_of_program(width, PACK, ROWS, COLUMNS, ROW_AXIS)
    values = load_parts(x + top.to(tl.int64) * width + left, width, count - top, row, column, exists, PACK)
    times = tl.load(scale)
    parts = ()
    for part in tl.static_range(PACK):
        value = values[part].to(tl.float32)
        level = tanh(value * tl.fma(value * value, 0.035677408136300125, 0.7978845608028654), FAST)
        half = 0.5 * value
        value = tl.fma(half, level, half)
        parts += (value,)  # type: ignore[assignment]
    store_tile(
        parts, plain, turned, times, largest, largest, top, left, row, column, exists, padded, width,
        False, PACK, FAST, ROW_AXIS,
    )  # fmt: skip


@triton.jit
def gelu_backward_kernel(
    gradient, x, plain, turned, scale, largest, sums, count, padded, width,
    SUMS: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_AXIS: tl.constexpr,
):  # fmt: skip
    """The gradient of x [padded, width] from that of its GELU: times (1 + tanh(z) + x (1 - tanh(z)^2) z') / 2."""
    top, left, row, column, exists = tile_of_program(width, PACK, ROWS, COLUMNS, ROW_AXIS)
    values = load_parts(x + top.to(tl.int64) * width + left, width, count - top, row, column, exists, PACK)
    gradients = load_parts(gradient + top.to(tl.int64) * width + left, width, count - top, row, column, exists, PACK)
    times = tl.load(scale)
    parts = ()
    for part in tl.static_range(PACK):
        value = values[part].to(tl.float32)
        square = value * value
        level = tanh(value * tl.fma(square, 0.035677408136300125, 0.7978845608028654), FAST)
        # -x z': the sign is here so that no multiplication has to be negated.
        fall = value * tl.fma(square, -0.10703222440890037, -0.7978845608028654)
        half = 0.5 * gradients[part].to(tl.float32)
        below = tl.fma(half, tl.fma(fall, tl.fma(level, level, -1.0), level), half)
        parts += (below,)  # type: ignore[assignment]
    store_tile(
        parts, plain, turned, times, largest, sums, top, left, row, column, exists, padded, width,
        SUMS, PACK, FAST, ROW_AXIS,
    )  # fmt: skip
