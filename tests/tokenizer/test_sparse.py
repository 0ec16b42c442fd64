"""The data type: batching loses nothing, and every bad token is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tokenizer.errors import InputError
from tokenizer.sparse import MAX_POSITION, SparseTokens

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def make(lengths: list[int], channels: int = 3, seed: int = 0) -> SparseTokens:
    """Random features at distinct positions, in no order."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    positions = torch.randint(0, MAX_POSITION + 1, (count, 4), generator=generator, dtype=torch.int32)
    positions[:, 0] = torch.arange(count, dtype=torch.int32).flip(0)
    return SparseTokens(torch.randn(count, channels, generator=generator), positions, lengths)


def assert_same(a: SparseTokens, b: SparseTokens) -> None:
    assert torch.equal(a.features, b.features)
    assert torch.equal(a.positions, b.positions)
    assert torch.equal(a.lengths, b.lengths)


@QUICK
@given(LENGTHS)
def test_split_and_cat_are_inverse(lengths: list[int]) -> None:
    tokens = make(lengths)
    items = tokens.split()
    assert [item.lengths.tolist() for item in items] == [[length] for length in lengths]
    assert_same(SparseTokens.cat(items), tokens)


@QUICK
@given(LENGTHS, st.integers(-7, 7), st.integers(-7, 7))
def test_slices_are_those_of_a_list_of_items(lengths: list[int], start: int, stop: int) -> None:
    tokens = make(lengths)
    expected = tokens.split()[start:stop]
    part = tokens[start:stop]
    assert part.batch_size == len(expected)
    if expected:
        assert_same(part, SparseTokens.cat(expected))


def test_negative_index_counts_from_the_end() -> None:
    tokens = make([2, 0, 3])
    assert_same(tokens[-1], tokens[2])
    assert tokens[1].num_tokens == 0


@pytest.mark.parametrize("index", [3, -4])
def test_index_beyond_the_batch(index: int) -> None:
    with pytest.raises(IndexError, match=f"item {index} of a batch of 3"):
        make([1, 1, 1])[index]


def test_slice_with_a_step_is_refused() -> None:
    with pytest.raises(InputError, match="step 1 only"):
        make([1, 1, 1])[::2]


def test_iteration_ends() -> None:
    assert len(list(make([1, 2]))) == len(make([1, 2])) == 2


def test_with_features_shares_what_was_computed_for_the_positions() -> None:
    tokens = make([2, 3])
    other = tokens.with_features(torch.zeros(5, 7))
    assert other.num_channels == 7
    assert tokens.shared("table", lambda: object()) is other.shared("table", lambda: object())


def test_parts_of_a_batch_share_nothing() -> None:
    tokens = make([2, 3])
    table = tokens.shared("table", lambda: object())
    assert tokens[0].shared("table", lambda: object()) is not table


def test_to_changes_the_type_of_floats_only() -> None:
    tokens = make([2])
    assert tokens.to(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert tokens.to(dtype=torch.float32) is tokens
    indices = tokens.with_features(torch.zeros(2, 8, dtype=torch.int32))
    assert indices.to(dtype=torch.bfloat16).dtype == torch.int32


def test_copies_to_the_cpu_wait_and_others_do_not() -> None:
    """The host may read what came to it at once; a copy that is still under way would be garbage."""
    waits: dict[str, bool] = {}

    class Recorder(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is Tensor.to and kwargs and "non_blocking" in kwargs:
                waits[str(kwargs["device"])] = not kwargs["non_blocking"]
            return func(*args, **(kwargs or {}))

    with Recorder():
        for device in ("cpu", "meta"):
            make([2]).to(device)
    assert waits == {"cpu": True, "meta": False}


def test_repr_says_what_is_in_it() -> None:
    assert repr(make([2, 3])) == "SparseTokens(items=2, tokens=5, channels=3, dtype=float32, device=cpu)"


# ---------------------------------------------------------------------- structure


@pytest.mark.parametrize(
    ("features", "positions", "lengths", "message"),
    [
        (torch.zeros(2), torch.zeros(2, 4, dtype=torch.int32), [2], r"features must be \[N, C\], got shape \(2,\)"),
        (torch.zeros(2, 3), torch.zeros(2, 5, dtype=torch.int32), [2], r"positions must be \[N, 4\]"),
        (torch.zeros(2, 3), torch.zeros(3, 4, dtype=torch.int32), [2], "2 rows but positions have 3"),
        (torch.zeros(2, 3), torch.zeros(2, 4), [2], "positions must be integers, got float32"),
        (torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int32), [1], "lengths sum to 1 but there are 2 tokens"),
        (torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int32), [3, -1], "non-negative"),
        (torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int32), [[2]], "one non-negative count for each item"),
    ],
)
def test_what_does_not_fit_together(features: Tensor, positions: Tensor, lengths: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SparseTokens(features, positions, lengths)


def test_features_must_fit_the_positions() -> None:
    with pytest.raises(InputError, match=r"must be \[5, C\]"):
        make([2, 3]).with_features(torch.zeros(4, 3))


def test_cat_names_the_odd_one() -> None:
    with pytest.raises(InputError, match="number 1 is SparseTokens"):
        SparseTokens.cat([make([2]), make([2], channels=4)])
    with pytest.raises(InputError, match="number 1"):
        SparseTokens.cat([make([2]), make([2]).to(dtype=torch.float64)])
    with pytest.raises(InputError, match="empty list"):
        SparseTokens.cat([])


# ---------------------------------------------------------------------- values


@QUICK
@given(LENGTHS)
def test_good_tokens_pass(lengths: list[int]) -> None:
    tokens = make(lengths)
    assert tokens.validate() is tokens


@QUICK
@given(LENGTHS.filter(any), st.data())
def test_first_bad_row_is_named(lengths: list[int], data: st.DataObject) -> None:
    tokens = make(lengths)
    rows = data.draw(st.sets(st.integers(0, sum(lengths) - 1), min_size=1))
    kind = data.draw(st.sampled_from(["nan", "inf", "negative", "large"]))
    for row in rows:
        if kind in ("nan", "inf"):
            tokens.features[row, data.draw(st.integers(0, 2))] = float(kind)
        else:
            tokens.positions[row, data.draw(st.integers(0, 3))] = -1 if kind == "negative" else MAX_POSITION + 1
    row = min(rows)
    item = int(torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[row])
    t, x, y, z = tokens.positions[row].tolist()
    what = "NaN or infinite" if kind in ("nan", "inf") else "outside 0..4095"
    with pytest.raises(InputError) as caught:
        tokens.validate()
    assert str(caught.value).startswith(f"row {row} (item {item}, position t={t} x={x} y={y} z={z}) ")
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_infinities_that_cancel_are_found() -> None:
    tokens = make([3])
    tokens.features[1] = torch.tensor([float("inf"), float("-inf"), 0.0])
    with pytest.raises(InputError, match="row 1 "):
        tokens.validate()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_finite_features_pass(dtype: torch.dtype) -> None:
    features = torch.full((40, 3), torch.finfo(dtype).max, dtype=dtype)
    SparseTokens(features, make([40]).positions, [40]).validate()


def test_a_position_used_twice_in_an_item_is_refused() -> None:
    tokens = make([3, 4])
    tokens.positions[5] = tokens.positions[3]
    with pytest.raises(InputError, match=r"row 5 \(item 1, .* same position as an earlier token"):
        tokens.validate()


def test_two_items_may_use_the_same_positions() -> None:
    item = make([3])
    SparseTokens.cat([item, item]).validate()


@pytest.mark.parametrize("coordinate", [2**32 + 5, -(2**32) + 5, 2**31, 2**62])
def test_large_int64_coordinates_do_not_wrap_into_legal_ones(coordinate: int) -> None:
    positions = make([3]).positions.long()
    positions[1, 2] = coordinate
    with pytest.raises(InputError, match="row 1 "):
        SparseTokens(torch.zeros(3, 1), positions, [3]).validate()


def test_extreme_positions_are_told_apart() -> None:
    corners = torch.cartesian_prod(*[torch.tensor([0, MAX_POSITION], dtype=torch.int32)] * 4)
    SparseTokens(torch.zeros(16, 1), corners, [16]).validate()


def test_nothing_is_valid() -> None:
    SparseTokens(torch.zeros(0, 3), torch.zeros(0, 4, dtype=torch.int32), []).validate()
