"""The order of an epoch: every sample once, whatever the processes, the lanes and the interruptions."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Span, deal, joined, shuffled, subtract
from data.stream import Position, Reading, Stream
from tokenizer.errors import InputError

QUICK = settings(max_examples=150, deadline=None)
COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(sum)
READINGS = st.builds(
    Reading,
    lanes=st.integers(1, 5),
    window=st.integers(1, 12),
    chunk=st.integers(1, 9),
    shuffle=st.booleans(),
    epochs=st.just(3),
)


def stream(counts: list[int], reading: Reading, rank: int = 0, world: int = 1) -> Stream:
    return Stream("s", counts, reading, seed=7, rank=rank, world=world)


def read(source: Stream, count: int | None = None, ahead: int = 3) -> list[Position]:
    """Takes up to `count` samples, planning up to `ahead` chunks, as a loader does."""
    taken: list[Position] = []
    while count is None or len(taken) < count:
        while source.planned < ahead and source.plan() is not None:
            pass
        if not source.planned:
            break
        taken.append(source.take())
    return taken


def epochs(positions: list[Position], counts: list[int], number: int = 3) -> None:
    """Each epoch has every sample exactly once."""
    want = {Position(e, shard, place) for e in range(number) for shard, n in enumerate(counts) for place in range(n)}
    assert Counter(positions) == Counter(want)


@QUICK
@given(COUNTS, READINGS, st.integers(1, 4))
def test_an_epoch_gives_every_sample_once(counts: list[int], reading: Reading, world: int) -> None:
    parts = [read(stream(counts, reading, rank, world)) for rank in range(world)]
    epochs([position for part in parts for position in part], counts)
    for part in parts:
        assert [position.epoch for position in part] == sorted(position.epoch for position in part)


@QUICK
@given(COUNTS, READINGS, st.integers(0, 80), st.integers(1, 6), st.integers(1, 6))
def test_a_stream_goes_on_exactly(counts: list[int], reading: Reading, before: int, ahead: int, again: int) -> None:
    whole = stream(counts, reading)
    resumed = stream(counts, reading)
    first = read(whole, before, ahead)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    skipped = resumed.taken_of_first
    assert first + read(resumed, None, again) == read(stream(counts, reading))
    assert 0 <= skipped < reading.chunk


@QUICK
@given(
    COUNTS,
    READINGS,
    st.lists(st.tuples(st.integers(1, 4), st.lists(st.integers(0, 40), min_size=4, max_size=4)), max_size=3),
    st.data(),
)
def test_other_numbers_of_processes_lose_and_repeat_nothing(
    counts: list[int], reading: Reading, runs: list[tuple[int, list[int]]], data: st.DataObject
) -> None:
    """Runs that stop after some samples each, every process at another place, some samples still waiting."""
    used: list[Position] = []
    states: list[dict[str, object]] = []
    waiting: list[list[Position]] = []
    for world, amounts in [*runs, (2, [10**6] * 4)]:
        processes = [stream(counts, reading, rank, world) for rank in range(world)]
        if states:
            for process in processes:
                process.deal_anew(json.loads(json.dumps(states)), waiting)
        waiting = []
        for process, amount in zip(processes, amounts, strict=False):
            taken = read(process, amount)
            held = set(data.draw(st.lists(st.sampled_from(taken), max_size=4, unique=True))) if taken else set()
            if amount == 10**6:
                held = set()
            used += [position for position in taken if position not in held]
            waiting.append(sorted(held))
        states = [process.state_dict() for process in processes]
    epochs(used, counts)


def test_an_epoch_that_is_over_but_for_a_waiting_sample_opens_no_other_again() -> None:
    reading = Reading(lanes=1, window=1, chunk=1, shuffle=False, epochs=3)
    before, after = stream([1], reading), stream([1], reading)
    taken = read(before, 2)
    after.deal_anew([before.state_dict()], [[taken[0]]])
    assert read(after) == [taken[0], Position(2, 0, 0)]


def test_lanes_alternate_and_chunks_stay_in_their_window() -> None:
    source = stream([20, 20], Reading(lanes=2, window=8, chunk=5, shuffle=False, epochs=1))
    chunks = list(iter(source.plan, None))
    assert [(c.lane, c.shard, c.start, c.stop) for c in chunks if c is not None] == [
        *[(0, 0, 0, 5), (1, 1, 0, 5), (0, 0, 5, 8), (1, 1, 5, 8), (0, 0, 8, 13), (1, 1, 8, 13)],
        *[(0, 0, 13, 16), (1, 1, 13, 16), (0, 0, 16, 20), (1, 1, 16, 20)],
    ]


def test_shuffling_changes_with_the_epoch_and_the_seed() -> None:
    reading = Reading(window=100)
    orders = [tuple(reading.window_order(seed, epoch, 0, 0, 100)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert reading.window_order(0, 0, 5, 1, 130) != [*range(100, 130)]
    assert sorted(reading.window_order(0, 0, 5, 1, 130)) == [*range(100, 130)]
    # Fixed for ever: a checkpoint of today must mean the same tomorrow.
    assert shuffled(8, "samples", 0, 0) == PINNED


PINNED = [0, 2, 7, 1, 6, 4, 3, 5]


def test_small_sets_feed_every_process_and_too_small_ones_say_so() -> None:
    dealt = deal([Span(0, 0, 64)], [0], processes=4, lanes=2, window=8)
    assert all(sum(span.size for lane in process for span in lane) == 16 for process in dealt)
    endless = Reading(window=8)
    assert stream([8], endless, 0, 2).plan() is not None
    assert stream([8], endless, 1, 2).plan() is None
    with pytest.raises(InputError, match="no samples"):
        stream([0, 0], endless)


@pytest.mark.parametrize(("counts", "world"), [([640], 4), ([1000], 3), ([1000], 6), ([500, 500], 3)])
def test_samples_of_a_small_set_are_seen_equally_often(counts: list[int], world: int) -> None:
    """All processes take as many samples in as many steps, also where one has twice as many windows as another."""
    processes = [stream(counts, Reading(window=128), rank, world) for rank in range(world)]
    seen = Counter(position[1:] for process in processes for position in read(process, 30 * sum(counts)))
    assert len(seen) == sum(counts)
    # Each process is somewhere in a round of as many epochs as there are processes.
    assert max(seen.values()) - min(seen.values()) <= world
    assert min(seen.values()) > 30 * world - 2 * world


def test_a_checkpoint_from_before_parts_changed_places_goes_on_in_its_epoch() -> None:
    reading, counts = Reading(lanes=2, window=4, chunk=2), [22]
    before = [stream(counts, reading, rank, 3) for rank in range(3)]
    for process in before:
        process._turns_from = 10**6
    taken = [read(process, 20) for process in before]
    states = [process.state_dict() for process in before]
    for state in states:
        del state["turns_from"]
    after = [stream(counts, reading, rank, 3) for rank in range(3)]
    for process, state in zip(after, states, strict=True):
        process.load_state_dict(state)
    for old, new, had in zip(before, after, taken, strict=True):
        here = had[-1].epoch
        rest = [position for position in read(old, 20) if position.epoch == here]
        assert read(new, len(rest)) == rest
        # From then on as any other: also after another stop.
        again = stream(counts, reading, before.index(old), 3)
        again.load_state_dict(json.loads(json.dumps(new.state_dict())))
        assert read(again, 50) == read(new, 50)


def test_of_a_checkpoint_from_before_nothing_is_lost_on_other_numbers_of_processes() -> None:
    reading, counts = Reading(lanes=2, window=4, chunk=2, epochs=4), [22]
    before = [stream(counts, reading, rank, 3) for rank in range(3)]
    for process in before:
        process._turns_from = 10**6
    used = [position for process in before for position in read(process, 20)]
    states = [{k: v for k, v in process.state_dict().items() if k != "turns_from"} for process in before]
    assert len({state["epoch"] for state in states}) > 1
    for rank in range(2):
        process = stream(counts, reading, rank, 2)
        process.deal_anew(states, [[], [], []])
        used += read(process)
    epochs(used, counts, 4)


@QUICK
@given(st.lists(st.integers(0, 30), max_size=12, unique=True), st.sets(st.integers(0, 30), max_size=12))
def test_spans_are_sets_of_places(places: list[int], taken: set[int]) -> None:
    spans = joined([Span(p % 3, p, p + 1) for p in places])
    left = subtract(spans, joined([Span(p % 3, p, p + 1) for p in taken]))
    assert [p for s in left for p in range(s.start, s.stop)] == sorted(set(places) - taken, key=lambda p: (p % 3, p))
    pairs = itertools.pairwise(spans)
    assert all(a.shard < b.shard or a.stop < b.start for a, b in pairs)
