"""LayerNorm and RMSNorm in FP8, in Triton: what is known of a row first, then every number (`kernels` has conventions).

Two kernels each way, because rows want programs that hold a whole row, and transposed copies want square tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenizer.fp8.fused.kernels import store_part, store_turned


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
    BIAS: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """(x - mean) * factor * weight + bias of x [count, width]."""
    row = tl.program_id(0) * (ROWS // PACK) + tl.arange(0, ROWS // PACK)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = columns[None, :] < width
    times = tl.load(scale)
    factor_of = tl.load(weight + columns, mask=columns < width, other=0.0)[None, :]
    if BIAS:
        more = tl.load(bias + columns, mask=columns < width, other=0.0)[None, :]
    most = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    packed = tl.zeros((ROWS // PACK, COLUMNS), tl.int32)
    last = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    for part in tl.static_range(PACK):
        rows = row * PACK + part
        place = rows[:, None].to(tl.int64) * width + columns[None, :]
        inside = (rows[:, None] < count) & exists
        mean = tl.load(means + rows, mask=rows < count, other=0.0)[:, None]
        factor = tl.load(factors + rows, mask=rows < count, other=0.0)[:, None]
        value = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean) * factor * factor_of
        if BIAS:
            value += more
        value = tl.where(inside, value, 0.0)
        most = tl.maximum(most, tl.abs(value))
        stored = (rows[:, None] < padded) & exists
        packed, last = store_part(value, times, plain, place, stored, packed, last, part, PACK, FAST)
    store_turned(packed, turned, row, columns, padded, width, most, largest, PACK)


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
    BIAS: tl.constexpr, CAST: tl.constexpr, SUMS: tl.constexpr,
    PACK: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """below = above + the gradient of x [count, width], from `gradient`, that of its norm.

    `below` is rounded too, if CAST. Columns are summed for the norm's weight and bias, and of `below` if SUMS.
    """
    row = tl.program_id(0) * (ROWS // PACK) + tl.arange(0, ROWS // PACK)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = columns[None, :] < width
    factor_of = tl.load(weight + columns, mask=columns < width, other=0.0)[None, :]
    of_weight = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    of_bias = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    if CAST:
        times = tl.load(scale)
        most = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
        total = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
        packed = tl.zeros((ROWS // PACK, COLUMNS), tl.int32)
        last = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    for part in tl.static_range(PACK):
        rows = row * PACK + part
        place = rows[:, None].to(tl.int64) * width + columns[None, :]
        inside = (rows[:, None] < count) & exists
        mean = tl.load(means + rows, mask=rows < count, other=0.0)[:, None]
        factor = tl.load(factors + rows, mask=rows < count, other=0.0)[:, None]
        value = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean) * factor
        slope = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        of_weight += slope * value
        if BIAS:
            of_bias += slope
        result = slope * factor_of - value * tl.load(along + rows, mask=rows < count, other=0.0)[:, None]
        result = (result - tl.load(level + rows, mask=rows < count, other=0.0)[:, None]) * factor
        result += tl.load(above + place, mask=inside, other=0.0).to(tl.float32)
        kept = result.to(below.dtype.element_ty)
        tl.store(below + place, kept, mask=inside)
        if CAST:
            result = tl.where(inside, kept.to(tl.float32), 0.0)
            most = tl.maximum(most, tl.abs(result))
            if SUMS:
                total += result
            stored = (rows[:, None] < padded) & exists
            packed, last = store_part(result, times, plain, place, stored, packed, last, part, PACK, FAST)
    target = tl.program_id(0) * width + columns
    tl.store(weight_sums + target, tl.sum(of_weight, axis=0), mask=columns < width)
    if BIAS:
        tl.store(bias_sums + target, tl.sum(of_bias, axis=0), mask=columns < width)
    if CAST:
        store_turned(packed, turned, row, columns, padded, width, most, largest, PACK)
        if SUMS:
            tl.store(sums + target, tl.sum(total, axis=0), mask=columns < width)
