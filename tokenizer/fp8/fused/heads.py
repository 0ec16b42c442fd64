"""Queries, keys and values between the joint projection and attention, in Triton: QK norm, rotation, and their way back.

The projection is qkv [padded, 3, heads, Dh]. Forward, a program takes tokens through all heads, so that their angles
are read once. Backward, what is known of a head comes first (with a QK norm), then every number in square tiles, as the
transposed copy wants them (`kernels` has conventions).
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenizer.fp8.fused.kernels import pack, scaled, store_turned


@triton.jit
def turn_pairs(value, cosine, sine, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Adjacent pairs of [ROWS, 2 HALF] rotated by angles [ROWS, HALF]."""
    even, odd = tl.split(tl.reshape(value, (ROWS, HALF, 2)))
    return tl.reshape(tl.join(even * cosine - odd * sine, odd * cosine + even * sine), (ROWS, 2 * HALF))


@triton.jit
def angles(table, rows, pairs, inside, WIDTH: tl.constexpr):
    """Cosines and sines of some pairs of heads, from table [count, WIDTH / 2, 2]."""
    place = rows[:, None].to(tl.int64) * WIDTH + 2 * pairs[None, :]
    return tl.load(table + place, mask=inside, other=0.0), tl.load(table + place + 1, mask=inside, other=0.0)


@triton.jit
def heads_kernel(
    qkv, query_scale, key_scale, table, query, key, count, root,
    NORM: tl.constexpr, ROTARY: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """query and key [count, HEADS, WIDTH] of qkv; `root` is the square root of WIDTH. A program for each of the two."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    lanes = tl.arange(0, 2 * HALF)
    pairs = tl.arange(0, HALF)
    inside = (rows[:, None] < count) & (lanes[None, :] < WIDTH)
    target, scales = query, query_scale
    if part == 1:
        target, scales = key, key_scale
    if ROTARY:
        cosine, sine = angles(table, rows, pairs, (rows[:, None] < count) & (pairs[None, :] < WIDTH // 2), WIDTH)
    source = qkv + rows[:, None].to(tl.int64) * (3 * HEADS * WIDTH) + part * (HEADS * WIDTH) + lanes[None, :]
    place = rows[:, None].to(tl.int64) * (HEADS * WIDTH) + lanes[None, :]
    for head in range(HEADS):
        value = tl.load(source + head * WIDTH, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            length = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)
            value *= (root / length)[:, None]
            value *= tl.load(scales + head * WIDTH + lanes, mask=lanes < WIDTH, other=0.0)[None, :]
        if ROTARY:
            value = turn_pairs(value, cosine, sine, ROWS, HALF)
        tl.store(target + place + head * WIDTH, value.to(target.dtype.element_ty), mask=inside)


@triton.jit
def head_slopes_kernel(
    query_gradient, key_gradient, qkv, query_scale, key_scale, table, inverses, dots, count, root,
    ROTARY: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of each head of queries and keys [count, 2, HEADS]: 1 / length, and the slope along the normed head."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    lanes = tl.arange(0, 2 * HALF)
    pairs = tl.arange(0, HALF)
    exists = rows[:, None] < count
    inside = exists & (lanes[None, :] < WIDTH)
    above, scales = query_gradient, query_scale
    if part == 1:
        above, scales = key_gradient, key_scale
    if ROTARY:
        cosine, sine = angles(table, rows, pairs, exists & (pairs[None, :] < WIDTH // 2), WIDTH)
    source = qkv + rows[:, None].to(tl.int64) * (3 * HEADS * WIDTH) + part * (HEADS * WIDTH) + lanes[None, :]
    place = rows[:, None].to(tl.int64) * (HEADS * WIDTH) + lanes[None, :]
    for head in range(HEADS):
        value = tl.load(source + head * WIDTH, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(above + place + head * WIDTH, mask=inside, other=0.0).to(tl.float32)
        if ROTARY:
            slope = turn_pairs(slope, cosine, -sine, ROWS, HALF)
        slope *= tl.load(scales + head * WIDTH + lanes, mask=lanes < WIDTH, other=0.0)[None, :] * root
        inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)
        target = (rows * 2 + part) * HEADS + head
        tl.store(inverses + target, inverse, mask=rows < count)
        tl.store(dots + target, tl.sum(slope * value, axis=1) * inverse, mask=rows < count)


@triton.jit
def heads_backward_kernel(
    query_gradient, key_gradient, value_gradient, qkv, query_scale, key_scale, table, inverses, dots,
    plain, turned, scale, largest, scale_sums, sums, count, padded, root,
    NORM: tl.constexpr, ROTARY: tl.constexpr, SUMS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    PACK: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of qkv, rounded both ways, from those of queries, keys and values [count, HEADS, WIDTH].

    `scale_sums` [programs, 2, HEADS, WIDTH] are the gradients of the QK norm, `sums` [programs, 3 HEADS WIDTH] those of
    a bias, for each program of rows. Programs of the second axis are tiles of one of the three.
    """
    wide: tl.constexpr = HEADS * WIDTH
    tiles: tl.constexpr = (wide + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) * (ROWS // PACK) + tl.arange(0, ROWS // PACK)
    third = tl.program_id(1) // tiles
    first = (tl.program_id(1) % tiles) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    pairs = first // 2 + tl.arange(0, COLUMNS // 2)
    exists = columns[None, :] < wide
    above, scales = query_gradient, query_scale
    if third == 1:
        above, scales = key_gradient, key_scale
    if third == 2:
        above = value_gradient
    times = tl.load(scale)
    most = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    total = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    of_scale = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    packed = tl.zeros((ROWS // PACK, COLUMNS), tl.int32)
    last = tl.zeros((ROWS // PACK, COLUMNS), tl.float32)
    for part in tl.static_range(PACK):
        rows = row * PACK + part
        inside = (rows[:, None] < count) & exists
        slope = tl.load(above + rows[:, None].to(tl.int64) * wide + columns[None, :], mask=inside, other=0.0)
        slope = slope.to(tl.float32)
        if third < 2:
            if ROTARY:
                known = (rows[:, None] < count) & (pairs[None, :] < wide // 2)
                cosine, sine = angles(table, rows, pairs % (WIDTH // 2), known, WIDTH)
                slope = turn_pairs(slope, cosine, -sine, ROWS // PACK, COLUMNS // 2)
            if NORM:
                head = (rows[:, None] * 2 + third) * HEADS + columns[None, :] // WIDTH
                inverse = tl.load(inverses + head, mask=inside, other=0.0)
                value = tl.load(
                    qkv + rows[:, None].to(tl.int64) * (3 * wide) + third * wide + columns[None, :],
                    mask=inside, other=0.0,
                ).to(tl.float32) * inverse  # fmt: skip
                slope *= root
                of_scale += slope * value
                slope *= tl.load(scales + columns, mask=columns < wide, other=0.0)[None, :]
                slope = (slope - value * tl.load(dots + head, mask=inside, other=0.0)) * inverse
        most = tl.maximum(most, tl.abs(slope))
        if SUMS:
            total += slope
        number = scaled(slope, times)
        place = rows[:, None].to(tl.int64) * (3 * wide) + third * wide + columns[None, :]
        tl.store(plain + place, number.to(plain.dtype.element_ty), mask=(rows[:, None] < padded) & exists)
        packed = pack(packed, last, number, plain, part, PACK, FAST)
        last = number
    store_turned(packed, turned + third.to(tl.int64) * wide * (padded // PACK), row, columns, padded, wide, PACK)
    tl.atomic_max(largest, tl.max(most))
    if SUMS:
        target = tl.program_id(0) * (3 * wide) + third * wide + columns
        tl.store(sums + target, tl.sum(total, axis=0), mask=columns < wide)
    if NORM:
        if third < 2:
            target = tl.program_id(0) * (2 * wide) + third * wide + columns
            tl.store(scale_sums + target, tl.sum(of_scale, axis=0), mask=columns < wide)
