"""Queries, keys and values between the joint projection and attention, in Triton: QK norm and rotation, there and back.

The projection is qkv [padded, 3, heads, Dh]. Forward, a program takes tokens through all heads, so that their angles
are read once. Backward, a program takes one head, as wide a tile as the transposed copy wants (`kernels` has the
conventions).
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenizer.fp8.fused.kernels import store_part


@triton.jit
def turn_pairs(value, cosine, sine, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Adjacent pairs of [ROWS, 2 HALF] rotated by angles [ROWS, HALF]."""
    even, odd = tl.split(tl.reshape(value, (ROWS, HALF, 2)))
    return tl.reshape(tl.join(even * cosine - odd * sine, odd * cosine + even * sine), (ROWS, 2 * HALF))


@triton.jit
def angles(table, rows, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines [ROWS, HALF] of tokens, from table [count, WIDTH / 2, 2]."""
    lanes = tl.arange(0, 2 * HALF)
    place = rows[:, None].to(tl.int64) * WIDTH + lanes[None, :]
    both = tl.load(table + place, mask=(rows[:, None] < count) & (lanes[None, :] < WIDTH), other=0.0)
    return tl.split(tl.reshape(both, (ROWS, HALF, 2)))


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
    inside = (rows[:, None] < count) & (lanes[None, :] < WIDTH)
    target, scales = query, query_scale
    if part == 1:
        target, scales = key, key_scale
    if ROTARY:
        cosine, sine = angles(table, rows, count, ROWS, WIDTH, HALF)
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
def heads_backward_kernel(
    query_gradient, key_gradient, value_gradient, qkv, query_scale, key_scale, table,
    plain, turned, scale, largest, scale_sums, sums, count, padded, root,
    NORM: tl.constexpr, ROTARY: tl.constexpr, SUMS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    HALF: tl.constexpr, PACK: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of qkv, rounded both ways, from those of queries, keys and values [count, HEADS, WIDTH].

    `scale_sums` [programs, 2, HEADS, WIDTH] are the gradients of the QK norm, `sums` [programs, 3 HEADS WIDTH] those of
    a bias, for each program of rows. The second axis of programs is that of the 3 HEADS heads.
    """
    wide: tl.constexpr = HEADS * WIDTH
    row = tl.program_id(0) * (ROWS // PACK) + tl.arange(0, ROWS // PACK)
    third = tl.program_id(1) // HEADS
    lanes = tl.arange(0, 2 * HALF)
    column = (tl.program_id(1) % HEADS) * WIDTH + lanes
    exists = lanes < WIDTH
    above, scales = query_gradient, query_scale
    if third == 1:
        above, scales = key_gradient, key_scale
    if third == 2:
        above = value_gradient
    times = tl.load(scale)
    if NORM:
        learned = tl.load(scales + column, mask=exists, other=0.0)[None, :]
    most = tl.zeros((ROWS // PACK, 2 * HALF), tl.float32)
    total = tl.zeros((ROWS // PACK, 2 * HALF), tl.float32)
    of_scale = tl.zeros((ROWS // PACK, 2 * HALF), tl.float32)
    packed = tl.zeros((ROWS // PACK, 2 * HALF), tl.int32)
    last = tl.zeros((ROWS // PACK, 2 * HALF), tl.float32)
    for part in tl.static_range(PACK):
        rows = row * PACK + part
        inside = (rows[:, None] < count) & exists[None, :]
        slope = tl.load(above + rows[:, None].to(tl.int64) * wide + column[None, :], mask=inside, other=0.0)
        slope = slope.to(tl.float32)
        place = rows[:, None].to(tl.int64) * (3 * wide) + third * wide + column[None, :]
        if third < 2:
            if ROTARY:
                cosine, sine = angles(table, rows, count, ROWS // PACK, WIDTH, HALF)
                slope = turn_pairs(slope, cosine, -sine, ROWS // PACK, HALF)
            if NORM:
                value = tl.load(qkv + place, mask=inside, other=0.0).to(tl.float32)
                inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), 1e-12)[:, None]
                value *= inverse
                slope *= root
                of_scale += slope * value
                slope *= learned
                slope = (slope - value * tl.sum(slope * value, axis=1)[:, None]) * inverse
        most = tl.maximum(most, tl.abs(slope))
        if SUMS:
            total += slope
        stored = (rows[:, None] < padded) & exists[None, :]
        packed, last = store_part(slope, times, plain, place, stored, packed, last, part, PACK, FAST)
    target = (third * wide + column[:, None]).to(tl.int64) * (padded // PACK) + row[None, :]
    tl.store(turned + target, tl.trans(packed), mask=exists[:, None] & (row[None, :] < padded // PACK))
    tl.atomic_max(largest, tl.max(most))
    if SUMS:
        tl.store(sums + tl.program_id(0) * (3 * wide) + third * wide + column, tl.sum(total, axis=0), mask=exists)
    if NORM:
        if third < 2:
            first = tl.program_id(0) * (2 * wide) + third * wide
            tl.store(scale_sums + first + column, tl.sum(of_scale, axis=0), mask=exists)
