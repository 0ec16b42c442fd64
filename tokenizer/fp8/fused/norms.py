"""LayerNorm and RMSNorm in FP8, in Triton: what is known of a row first, then every number (`kernels` has conventions).

Two kernels each way, because rows want programs that hold a whole row, and transposed copies want square tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenizer.fp8.fused.kernels import load_parts, load_rows, store_tile, tile_of_program


@triton.jit
def statistics_kernel(
    x, update, added, means, factors, count, epsilon,
    ADD: tl.constexpr, RMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean (zero for RMS) and 1 / deviation of a row of x, or of x + update, which is written to `added`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = (columns < WIDTH) & (row < count)
    value = tl.load(x + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(update + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        number = value.to(added.dtype.element_ty)
        tl.store(added + row * WIDTH + columns, number, mask=inside)
        value = number.to(tl.float32)
    mean = 0.0
    if not RMS:
        mean = tl.sum(value, axis=0) / WIDTH
        value = tl.where(inside, value - mean, 0.0)
    tl.store(means + row, mean)
    tl.store(factors + row, tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + epsilon))


@triton.jit
def norm_kernel(
    x, weight, bias, means, factors, plain, turned, scale, largest, count, padded, width,
    BIAS: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_AXIS: tl.constexpr,
):  # fmt: skip
    """(x - mean) * factor * weight + bias of x [count, width]."""
    top, left, row, column, exists = tile_of_program(width, PACK, ROWS, COLUMNS, ROW_AXIS)
    values = load_parts(x + top.to(tl.int64) * width + left, width, count - top, row, column, exists, PACK)
    mean_of = load_rows(means + top, count - top, row, PACK)
    factor_of = load_rows(factors + top, count - top, row, PACK)
    learned = tl.load(weight + left + column, mask=exists, other=0.0)[None, :]
    if BIAS:
        more = tl.load(bias + left + column, mask=exists, other=0.0)[None, :]
    times = tl.load(scale)
    parts = ()
    for part in tl.static_range(PACK):
        value = (values[part].to(tl.float32) - mean_of[part]) * factor_of[part]
        if BIAS:
            value = tl.fma(value, learned, more)
            value = tl.where((row * PACK + part < count - top)[:, None], value, 0.0)
        else:
            value *= learned
        parts += (value,)  # type: ignore[assignment]
    store_tile(
        parts, plain, turned, times, largest, largest, top, left, row, column, exists, padded, width,
        False, PACK, FAST, ROW_AXIS,
    )  # fmt: skip


@triton.jit
def slopes_kernel(
    x, gradient, weight, means, factors, along, level,
    RMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the gradient of a row lacks: the means of slope * normed x, and of the slope (zero for RMS)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    value = tl.load(x + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    value = (value - tl.load(means + row)) * tl.load(factors + row)
    slope = tl.load(gradient + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    slope *= tl.load(weight + columns, mask=inside, other=0.0)
    tl.store(along + row, tl.sum(slope * value, axis=0) / WIDTH)
    tl.store(level + row, 0.0 if RMS else tl.sum(slope, axis=0) / WIDTH)


@triton.jit
def norm_backward_kernel(
    x, gradient, above, weight, means, factors, along, level, below, plain, turned, scale, largest,
    weight_sums, bias_sums, sums, count, padded, width,
    BIAS: tl.constexpr, CAST: tl.constexpr, SUMS: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROW_AXIS: tl.constexpr,
):  # fmt: skip
    """below = above + the gradient of x [count, width], from `gradient`, that of its norm.

    `below` is rounded too, if CAST. Columns are summed for the norm's weight and bias, and of `below` if SUMS.
    """
    top, left, row, column, exists = tile_of_program(width, PACK, ROWS, COLUMNS, ROW_AXIS)
    corner = top.to(tl.int64) * width + left
    values = load_parts(x + corner, width, count - top, row, column, exists, PACK)
    slopes = load_parts(gradient + corner, width, count - top, row, column, exists, PACK)
    others = load_parts(above + corner, width, count - top, row, column, exists, PACK)
    mean_of = load_rows(means + top, count - top, row, PACK)
    factor_of = load_rows(factors + top, count - top, row, PACK)
    along_of = load_rows(along + top, count - top, row, PACK)
    level_of = load_rows(level + top, count - top, row, PACK)
    learned = tl.load(weight + left + column, mask=exists, other=0.0)[None, :]
    of_weight = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    of_bias = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    if CAST:
        times = tl.load(scale)
    parts = ()
    for part in tl.static_range(PACK):
        factor = factor_of[part]
        value = (values[part].to(tl.float32) - mean_of[part]) * factor
        slope = slopes[part].to(tl.float32)
        of_weight += slope * value
        if BIAS:
            of_bias += slope
        result = slope * learned - (value * along_of[part] + level_of[part])
        result = tl.fma(result, factor, others[part].to(tl.float32))
        rows = row * PACK + part
        inside = (rows[:, None] < count - top) & exists[None, :]
        place = rows[:, None] * width + column[None, :]
        tl.store(below + corner + place, result.to(below.dtype.element_ty), mask=inside)
        parts += (result,)  # type: ignore[assignment]
    target = tl.program_id(ROW_AXIS) * width + left + column
    tl.store(weight_sums + target, tl.sum(of_weight, axis=0), mask=exists)
    if BIAS:
        tl.store(bias_sums + target, tl.sum(of_bias, axis=0), mask=exists)
    if CAST:
        store_tile(
            parts, plain, turned, times, largest, sums, top, left, row, column, exists, padded, width,
            SUMS, PACK, FAST, ROW_AXIS,
        )  # fmt: skip
