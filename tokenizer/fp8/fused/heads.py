"""Queries, keys and values between the joint projection and attention, in Triton: QK norm and rotation, there and back.

The projection is qkv [padded, 3, heads, Dh]. Forward, a program takes tokens through all heads, so that their angles
are read once, and loads a head while it computes the one before. Backward, a program takes one head, as wide a tile as
the transposed copy wants (`kernels` has the conventions).
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenizer.fp8.fused.kernels import load_parts, round_parts, store_turned


@triton.jit
def turn_pairs(value, angles, BACK: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Adjacent pairs of [ROWS, 2 HALF] rotated by angles, their cosines and sines in turns; back, if BACK."""
    cosine, sine = tl.split(tl.reshape(angles, (ROWS, HALF, 2)))
    even, odd = tl.split(tl.reshape(value, (ROWS, HALF, 2)))
    if BACK:
        first, second = even * cosine + odd * sine, odd * cosine - even * sine
    else:
        first, second = even * cosine - odd * sine, odd * cosine + even * sine
    return tl.reshape(tl.join(first, second), (ROWS, 2 * HALF))


@triton.jit
def inverse_length(value):
    """1 / |row| of [rows, lanes], as [rows, 1]; never more than 1e12."""
    return tl.rsqrt(tl.maximum(tl.sum(value * value, axis=1), 1e-24))[:, None]


@triton.jit
def heads_kernel(
    qkv, query_scale, key_scale, table, query, key, count, root,
    NORM: tl.constexpr, ROTARY: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """query and key [count, HEADS, WIDTH] of qkv; `root` is the square root of WIDTH. A program for each of the two."""
    wide: tl.constexpr = HEADS * WIDTH
    top = tl.program_id(0) * ROWS
    part = tl.program_id(1)
    row, lane = tl.arange(0, ROWS), tl.arange(0, 2 * HALF)
    exists = lane < WIDTH
    inside = (row[:, None] < count - top) & exists[None, :]
    target, scales = query, query_scale
    if part == 1:
        target, scales = key, key_scale
    source = qkv + top.to(tl.int64) * (3 * wide) + part * wide + (row[:, None] * (3 * wide) + lane[None, :])
    target = target + top.to(tl.int64) * wide + (row[:, None] * wide + lane[None, :])
    if ROTARY:
        table += top.to(tl.int64) * WIDTH
        angles = tl.load(table + (row[:, None] * WIDTH + lane[None, :]), mask=inside, other=0.0)
    following = tl.load(source, mask=inside, other=0.0)
    for head in range(HEADS):
        value = following.to(tl.float32)
        following = tl.load(source + (head + 1) * WIDTH, mask=inside & (head + 1 < HEADS), other=0.0)
        if NORM:
            learned = tl.load(scales + head * WIDTH + lane, mask=exists, other=0.0)[None, :]
            value = value * (inverse_length(value) * root) * learned
        if ROTARY:
            value = turn_pairs(value, angles, False, ROWS, HALF)
        tl.store(target + head * WIDTH, value.to(query.dtype.element_ty), mask=inside)


@triton.jit
def round_head(
    above, qkv, scales, table, plain, scale, rows_left, padded_left, root,
    NORM: tl.constexpr, ROTARY: tl.constexpr, SUMS: tl.constexpr, WIDE: tl.constexpr, WIDTH: tl.constexpr,
    HALF: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some rows of a head, whose gradient starts at `above`, back to the projection, and `plain` of it.

    Returns:
        The rounded rows, packed; the largest magnitudes; sums for a bias and for the norm's scales.
    """
    row, lane = tl.arange(0, ROWS // PACK), tl.arange(0, 2 * HALF)
    exists = lane < WIDTH
    slopes = load_parts(above, WIDE, rows_left, row, lane, exists, PACK)
    if ROTARY:
        angles = load_parts(table, WIDTH, rows_left, row, lane, exists, PACK)
    if NORM:
        values = load_parts(qkv, 3 * WIDE, rows_left, row, lane, exists, PACK)
        learned = tl.load(scales + lane, mask=exists, other=0.0)[None, :] * root
    times = tl.load(scale)
    of_scales = tl.zeros((ROWS // PACK, 2 * HALF), tl.float32)
    parts = ()
    for part in tl.static_range(PACK):
        slope = slopes[part].to(tl.float32)
        if ROTARY:
            slope = turn_pairs(slope, angles[part], True, ROWS // PACK, HALF)
        if NORM:
            value = values[part].to(tl.float32)
            inverse = inverse_length(value)
            value *= inverse
            of_scales += slope * value
            slope *= learned
            slope = (slope - value * tl.sum(slope * value, axis=1)[:, None]) * inverse
        parts += (slope,)  # type: ignore[assignment]
    packed, most, total = round_parts(
        parts, plain, 3 * WIDE, times, padded_left, row, lane, exists, SUMS, PACK, FAST
    )  # fmt: skip
    return packed, most, total, of_scales


@triton.jit
def heads_backward_kernel(
    query_gradient, key_gradient, value_gradient, qkv, query_scale, key_scale, table,
    plain, turned, scale, largest, scale_sums, sums, count, padded, root,
    NORM: tl.constexpr, ROTARY: tl.constexpr, SUMS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    HALF: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, ROW_AXIS: tl.constexpr,
):  # fmt: skip
    """The gradient of qkv, rounded both ways, from those of queries, keys and values [count, HEADS, WIDTH].

    `scale_sums` [programs, 2, HEADS, WIDTH] are the gradients of the QK norm, `sums` [programs, 3 HEADS WIDTH] those of
    a bias, for each program of rows. The other axis of programs is that of the 3 HEADS heads.
    """
    wide: tl.constexpr = HEADS * WIDTH
    band = tl.program_id(ROW_AXIS)
    head = tl.program_id(1 - ROW_AXIS)
    third = head // HEADS
    top = band * ROWS
    start = top.to(tl.int64) * wide + (head % HEADS) * WIDTH
    corner = top.to(tl.int64) * (3 * wide) + head * WIDTH
    table += top.to(tl.int64) * WIDTH
    lane = tl.arange(0, 2 * HALF)
    exists = lane < WIDTH
    if third == 2:
        packed, most, total, of_scales = round_head(
            value_gradient + start, qkv, query_scale, table, plain + corner, scale, count - top, padded - top, root,
            False, False, SUMS, wide, WIDTH, HALF, PACK, FAST, ROWS,
        )  # fmt: skip
    else:
        above, scales = query_gradient, query_scale
        if third == 1:
            above, scales = key_gradient, key_scale
        packed, most, total, of_scales = round_head(
            above + start, qkv + corner, scales + (head % HEADS) * WIDTH, table, plain + corner, scale,
            count - top, padded - top, root, NORM, ROTARY, SUMS, wide, WIDTH, HALF, PACK, FAST, ROWS,
        )  # fmt: skip
    store_turned(
        packed, turned, top, head * WIDTH, tl.arange(0, ROWS // PACK), lane, exists, padded, most, largest, PACK
    )
    if SUMS:
        tl.store(sums + band * (3 * wide) + head * WIDTH + lane, tl.sum(total, axis=0), mask=exists)
    if NORM:
        if third < 2:
            target = scale_sums + band * (2 * wide) + head * WIDTH + lane
            tl.store(target, tl.sum(of_scales, axis=0) * root, mask=exists)
