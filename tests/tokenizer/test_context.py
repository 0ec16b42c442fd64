"""Decoding with context: the plans against the definition, and streaming tile by tile against the whole batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer.networks import random_latents, random_network, visuals
from tokenizer.errors import InputError
from tokenizer.model.context import ContextPlanner, Tiling, context_tiles
from tokenizer.model.transformer import BlockCache
from tokenizer.sparse import SparseTokens

Seen = dict[int, tuple[int, frozenset[tuple[int, int]]]]
"""Row of a query -> its local time, and the rows of its keys with the local time each has as a key."""


def by_definition(times: list[list[int]], stride: int, context: int) -> Seen:
    """FORMAT 10 word by word, with a list of cached (item, row, local time)."""
    tokens = [(item, t) for item, steps in enumerate(times) for t in steps]
    seen: Seen = {}
    cache: list[tuple[int, int, int]] = []
    start, last = min(t for _, t in tokens), max(t for _, t in tokens)
    started = False
    for window in range(start, last + 1, stride):
        offset = context if started else 0
        current = [
            (item, row, t - window + offset) for row, (item, t) in enumerate(tokens) if window <= t < window + stride
        ]
        if not current:
            continue
        started = True
        present = [entry for entry in cache if entry[0] <= max(item for item, _, _ in current)] + current
        for item, row, local in current:
            seen[row] = (local, frozenset((r, t) for i, r, t in present if i == item))
        first_kept = max(t for _, _, t in present) - context + 1
        cache = [(i, r, t - first_kept) for i, r, t in present if t >= first_kept]
    return seen


def by_plans(tokens: SparseTokens, stride: int, context: int) -> Seen:
    seen: Seen = {}
    cached = torch.zeros(0, dtype=torch.int64)
    for rows, plan in context_tiles(tokens, stride, context):
        assert plan.carry is not None
        together = torch.cat([cached, rows])
        queries = plan.gather(rows[:, None])[:, 0].tolist()
        keys = list(zip(together[plan.carry.keys].tolist(), plan.carry.key_positions[:, 0].tolist(), strict=True))
        times = plan.positions[:, 0].tolist()
        query_bounds, key_bounds = plan.segments.query_offsets.tolist(), plan.segments.key_offsets.tolist()
        for (q0, q1), (k0, k1) in zip(itertools.pairwise(query_bounds), itertools.pairwise(key_bounds), strict=True):
            for query in range(q0, q1):
                assert len(set(keys[k0:k1])) == k1 - k0
                seen[queries[query]] = (times[query], frozenset(keys[k0:k1]))
        assert sum(count * q for count, q, _ in plan.segments.runs) == len(rows)
        cached = together[plan.carry.keep]
    return seen


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(3, 18), min_size=1, max_size=8, unique=True), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_plans_follow_the_definition(times: list[list[int]], stride: int, context: int) -> None:
    """Any steps, gaps and orders; items that start late or end early."""
    flat = torch.tensor([t for item in times for t in item])
    positions = torch.zeros(len(flat), 4, dtype=torch.int32)
    positions[:, 0] = flat
    tokens = SparseTokens(torch.zeros(len(flat), 1), positions, [len(item) for item in times])
    assert by_plans(tokens, stride, context) == by_definition(times, stride, context)


BATCHES = {
    "one video": ((33, 8, 12),),
    "different lengths": ((8, 4), (33, 8, 4), (16, 8, 12), (21, 4, 4)),
    "images only": ((8, 12), (16, 4)),
}


@pytest.mark.parametrize("shapes", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("tiling", [(12, 4), (8, 8), (4, 8), (4, 4)])
def test_tile_by_tile_equals_the_whole_batch(shapes: tuple[tuple[int, ...], ...], tiling: tuple[int, int]) -> None:
    """What a streaming decoder does: feed the planner one tile at a time, keeping nothing but the caches."""
    network = random_network()
    assert network.decoder is not None
    latents = random_latents(visuals(*shapes))
    whole = network.decode(latents, Tiling(stride=tiling[0], context=tiling[1])).features

    stride, context = tiling[0] // 4, tiling[1] // 4
    item = torch.repeat_interleave(torch.arange(latents.batch_size), latents.lengths)
    planner, caches = ContextPlanner(context, latents.device), list[BlockCache]()
    streamed = torch.zeros_like(whole)
    for tile in range(int(latents.positions[:, 0].max()) // stride + 1):
        rows = torch.nonzero(latents.positions[:, 0] // stride == tile).flatten()
        local = latents.positions[rows].long()
        local[:, 0] -= tile * stride
        plan = planner.next(local, item[rows])
        streamed[rows] = network.decoder(latents.features[rows], plan, caches)
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-12)


def test_context_is_used_and_only_where_there_is_one() -> None:
    network = random_network()
    latents = random_latents(visuals((32, 8, 12)))
    step = latents.positions[:, 0]
    plain = network.decode(latents, Tiling(stride=8)).features
    with_context = network.decode(latents, Tiling(stride=8, context=8)).features
    torch.testing.assert_close(with_context[step < 2], plain[step < 2], rtol=0, atol=1e-12)
    assert (with_context[step >= 2] - plain[step >= 2]).abs().max() > 1e-2


def test_an_image_needs_no_context() -> None:
    network = random_network()
    latents = random_latents(visuals((8, 12), (16, 16)))
    plain = network.decode(latents).features
    torch.testing.assert_close(
        network.decode(latents, Tiling(stride=12, context=4)).features, plain, rtol=0, atol=1e-12
    )


def test_context_works_under_autocast() -> None:
    network = random_network(dtype=torch.float32)
    latents = random_latents(visuals((8, 8), (33, 8, 4), dtype=torch.float32))
    exact = network.decode(latents, Tiling(stride=12, context=4)).features
    with torch.autocast("cpu", torch.bfloat16):
        ours = network.decode(latents, Tiling(stride=12, context=4)).features
    assert float((ours - exact).std() / exact.std()) < 3e-2


def test_the_default_is_the_released_tiling() -> None:
    network = random_network()
    latents = random_latents(visuals((33, 8, 8)))
    assert torch.equal(network.decode(latents).features, network.decode(latents, Tiling(stride=16)).features)


def test_nothing_to_tile() -> None:
    empty = SparseTokens(torch.zeros(0, 1), torch.zeros(0, 4, dtype=torch.int32), [])
    assert list(context_tiles(empty, 2, 1)) == []


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (Tiling(stride=6), "tile stride must be a positive multiple of 4 frames, got 6"),
        (Tiling(stride=0), "tile stride must be a positive multiple of 4 frames, got 0"),
        (Tiling(stride=8, context=3), "tile context must be a multiple of 4 frames, got 3"),
        (Tiling(stride=8, context=-4), "tile context must be a multiple of 4 frames, got -4"),
        (Tiling(stride=12, context=8), r"12 \+ context 8 is more than the 16 frames"),
        (Tiling(stride=20), r"20 \+ context 0 is more than the 16 frames"),
    ],
)
def test_illegal_tilings(tiling: Tiling, message: str) -> None:
    latents = random_latents(visuals((16, 4, 4)))
    with pytest.raises(InputError, match=message):
        random_network().decode(latents, tiling)
