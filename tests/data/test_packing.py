"""Packing: nothing lost, nothing mixed, the budget kept, and streams that go on at whatever point they were cut."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import Oversized, Packer, best_subset, fullest
from tokenizer.errors import InputError
from tokenizer.sparse import SparseTokens

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
BUDGET = 20
SIZES = st.lists(st.integers(1, 26), max_size=40)
"""Some are larger than the budget."""

Numbered = tuple[int, int]
"""A sample: its number and its tokens."""


def numbered(sizes: list[int]) -> list[Numbered]:
    return list(enumerate(sizes))


def tokens_of(sample: Numbered) -> int:
    return sample[1]


def packer(buffer: int = 5, oversized: Oversized = "skip", budget: int = BUDGET) -> Packer[Numbered]:
    return Packer(budget, tokens_of, buffer=buffer, oversized=oversized)


@QUICK
@given(SIZES, st.integers(1, 9))
def test_every_sample_that_fits_comes_out_once_within_the_budget(sizes: list[int], buffer: int) -> None:
    skipped: list[tuple[Numbered, str]] = []
    packing = Packer(BUDGET, tokens_of, buffer=buffer, on_skip=lambda *named: skipped.append(named))
    batches = list(packing.batches(numbered(sizes)))
    assert all(batch == sorted(batch) and 0 < sum(map(tokens_of, batch)) <= BUDGET for batch in batches)
    assert sorted(itertools.chain(*batches)) == [sample for sample in numbered(sizes) if sample[1] <= BUDGET]
    assert [sample for sample, _ in skipped] == [sample for sample in numbered(sizes) if sample[1] > BUDGET]
    assert all(reason == f"larger than the budget: {n} tokens, at most 20 fit a batch" for (_, n), reason in skipped)
    assert packing.report.skipped == len(skipped)


@QUICK
@given(SIZES, st.integers(1, 9))
def test_samples_over_the_budget_may_travel_alone(sizes: list[int], buffer: int) -> None:
    batches = list(packer(buffer, "alone").batches(numbered(sizes)))
    assert sorted(itertools.chain(*batches)) == numbered(sizes)
    assert all(len(batch) == 1 or sum(map(tokens_of, batch)) <= BUDGET for batch in batches)


@QUICK
@given(
    SIZES, st.integers(1, 9), st.lists(st.integers(0, 6), min_size=1, max_size=6), st.sampled_from(("skip", "alone"))
)
def test_streams_go_on_wherever_they_were_cut(
    sizes: list[int], buffer: int, cuts: list[int], oversized: Oversized
) -> None:
    whole = packer(buffer, oversized)
    expected = list(whole.batches(numbered(sizes)))
    packing = packer(buffer, oversized)
    batches: list[list[Numbered]] = []
    for cut in cuts:
        batches += itertools.islice(packing.batches(numbered(sizes)[packing.replay_from :]), cut)
        state = json.loads(json.dumps(packing.state_dict()))
        packing = packer(buffer, oversized)
        packing.load_state_dict(state)
        assert packing.state_dict() == state
    batches += packing.batches(numbered(sizes)[packing.replay_from :])
    assert batches == expected
    assert packing.report == whole.report


@QUICK
@given(SIZES, st.integers(1, 9))
def test_no_sample_waits_for_more_batches_than_there_were_samples_before_it(sizes: list[int], buffer: int) -> None:
    taken = 0

    def source() -> itertools.chain[Numbered]:
        def count(sample: Numbered) -> Numbered:
            nonlocal taken
            taken += 1
            return sample

        return itertools.chain(map(count, numbered(sizes)))

    entered: dict[int, int] = {}
    before: dict[int, int] = {}
    gone: set[int] = set()
    for number, batch in enumerate(packer(buffer, "alone").batches(source())):
        for place in range(len(entered), taken):
            entered[place], before[place] = number, place - len(gone)
        assert all(number - entered[place] <= before[place] for place, _ in batch)
        gone |= {place for place, _ in batch}


@QUICK
@given(st.integers(1, 6), st.integers(1, 9))
def test_a_batch_of_small_samples_is_full(tokens: int, buffer: int) -> None:
    """However few samples are asked for: as many are looked at as a batch needs."""
    packing = packer(buffer)
    list(packing.batches(numbered([tokens] * 60)))
    assert packing.report.running.batches > 1
    assert packing.report.running.largest == BUDGET % tokens


@QUICK
@given(st.lists(st.integers(1, 12), max_size=9), st.integers(0, 40))
def test_the_best_subset_is_the_best_of_all_subsets(sizes: list[int], room: int) -> None:
    chosen = best_subset(sizes, room)
    assert chosen == sorted(set(chosen))
    every = (subset for count in range(len(sizes) + 1) for subset in itertools.combinations(sizes, count))
    assert sum(sizes[index] for index in chosen) == max(total for subset in every if (total := sum(subset)) <= room)


@QUICK
@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(1, 7), st.integers(0, 60), st.integers(1, 60))
def test_the_choice_is_the_one_that_needs_the_fewest_of_the_oldest(
    counts: list[int], unit: int, room: int, first: int
) -> None:
    """Whatever is left out of the search to save time, equal sizes beyond the room and a divisor of all."""
    sizes = [unit * count for count in counts]
    reach = [{0}]
    for size in sizes:
        reach.append(reach[-1] | {total + size for total in reach[-1] if total + size <= room})
    left, expected = max(reach[-1]), []
    for index in reversed(range(len(sizes))):
        if left not in reach[index]:
            expected.append(index)
            left -= sizes[index]
    assert best_subset(sizes, room) == expected[::-1]
    assert fullest([first, *sizes], first + room) == [0, *(index + 1 for index in expected[::-1])]


def test_a_room_that_cannot_be_filled_takes_no_memory() -> None:
    """The search ends where nothing fuller can come: 8,192 whole numbers of 65,535 bits would be 67 MB."""
    tracemalloc.start()
    chosen = best_subset([1024] * 8192, 65535)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert chosen == list(range(63))
    assert peak < 500_000  # bytes; the sizes in units are 66,000 of them


def test_older_samples_win_between_equals() -> None:
    assert best_subset([3, 5, 2, 3, 5], 5) == [1]
    assert best_subset([3, 2, 5, 5], 5) == [0, 1]


def test_the_report_counts_what_was_left_free() -> None:
    packing = packer(buffer=3)
    batches = list(packing.batches(numbered([11, 12, 9, 21, 6, 18, 4])))
    assert [[tokens for _, tokens in batch] for batch in batches] == [[11, 9], [12, 6], [18], [4]]
    running, draining = packing.report.running, packing.report.draining
    assert (running.batches, running.tokens, running.wasted, running.largest, running.mean) == (2, 38, 2, 2, 1.0)
    assert (draining.batches, draining.tokens, draining.wasted, draining.largest, draining.mean) == (2, 22, 18, 16, 9.0)
    assert packing.report.skipped == 1


def test_sizes_of_training_leave_almost_nothing_free() -> None:
    """Native-resolution pictures, 64 to 512 pixels a side: 16 to 1024 tokens under a budget of 4096."""
    generator = random.Random(0)
    sizes = [generator.randint(4, 32) * generator.randint(4, 32) for _ in range(1500)]
    packing = packer(buffer=64, budget=4096)
    list(packing.batches(numbered(sizes)))
    assert packing.report.running.batches > 100
    assert packing.report.running.largest <= 4  # measured: 0


def test_an_epoch_after_an_epoch() -> None:
    packing = packer()
    first, second = numbered([7, 8, 9]), [(3, 10), (4, 11)]
    assert sorted(itertools.chain(*packing.batches(first))) == first
    assert packing.replay_from == 3
    assert sorted(itertools.chain(*packing.batches(second))) == second


def test_tokens_of_samples_are_not_mixed() -> None:
    """Batches as the model gets them: each item holds the tokens of one sample, and there is no other token."""

    def tokens(sample: Numbered) -> SparseTokens:
        positions = torch.zeros(sample[1], 4, dtype=torch.int32)
        positions[:, 1] = torch.arange(sample[1])
        return SparseTokens(torch.full((sample[1], 2), float(sample[0])), positions, [sample[1]])

    seen = []
    for batch in packer().batches(numbered([7, 13, 20, 1, 8, 3, 9])):
        packed = SparseTokens.cat([tokens(sample) for sample in batch])
        assert packed.num_tokens == sum(map(tokens_of, batch)) <= BUDGET
        for sample, item in zip(batch, packed.split(), strict=True):
            assert item.features.unique().tolist() == [sample[0]]
            seen.append((sample[0], item.num_tokens))
    assert sorted(seen) == numbered([7, 13, 20, 1, 8, 3, 9])


def test_other_settings_and_other_sources_are_refused_on_resume() -> None:
    source = numbered([11, 12, 13, 14, 15, 16])
    packing = packer()
    next(packing.batches(source))
    state = packing.state_dict()
    with pytest.raises(InputError, match="same, or start"):
        packer(buffer=6).load_state_dict(state)
    resumed = packer()
    resumed.load_state_dict(state)
    with pytest.raises(InputError, match=r"sample 1 of the source has 11 tokens, but had 12"):
        next(resumed.batches(source))  # not from `replay_from` on
    with pytest.raises(InputError, match=r"ends before sample 3, but 5 had been read"):
        next(resumed.batches(source[1:3]))


def test_samples_and_settings_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(InputError, match="sample 1 of the source has 0 tokens"):
        list(packer().batches(numbered([1, 0])))
    with pytest.raises(InputError, match="sample 1 of the source is larger than the budget: 21 tokens"):
        list(packer(oversized="refuse").batches(numbered([1, 21])))
    with pytest.raises(InputError, match="at least 1"):
        packer(buffer=0)
    with pytest.raises(InputError, match="'skip', 'alone' or 'refuse'"):
        packer(oversized="drop")  # type: ignore[arg-type]


def test_no_more_of_equal_sizes_are_searched_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[list[int]] = []
    monkeypatch.setattr("data.packing.best_subset", lambda sizes, _: searched.append(sizes) or [])  # type: ignore[func-returns-value]
    fullest([10, *[7] * 50, *[31] * 50, *[30] * 50], 40)
    assert searched == [[7] * 4 + [30]]
