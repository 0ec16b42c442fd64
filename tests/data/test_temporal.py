"""Which frames of a clip are seen: always as many as a patch wants, in order, inside the clip."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.decode.temporal import DRAWS, FRAMES, MAX_FRAMES, reconstruction_frames, understanding_frames

UNIT = st.floats(0, 1, exclude_max=True)
DRAWN = st.tuples(*[UNIT] * DRAWS)


@given(st.integers(1, 800), st.one_of(st.none(), DRAWN), st.sampled_from([1, 2, 4, 8]))
@example(1, None, 4)
@example(3, (0.9, 0.9, 0.9, 0.99), 4)
def test_a_run_is_even_whole_and_inside(count: int, drawn: tuple[float, ...] | None, multiple: int) -> None:
    indices = reconstruction_frames(count, drawn, frames=(16, 32), multiple=multiple)
    assert indices == reconstruction_frames(count, drawn, frames=(16, 32), multiple=multiple)
    assert len(indices) % multiple == 0
    assert 0 <= indices[0] <= indices[-1] < count
    assert len(indices) <= FRAMES[1]
    if count >= multiple:
        steps = {later - earlier for earlier, later in pairwise(indices)}
        assert len(steps) <= 1  # evenly spaced
        assert steps <= set(range(1, 13))
        assert len(indices) >= min(FRAMES[0], count // multiple * multiple)
    else:
        assert indices == [*range(count), *[count - 1] * (multiple - count)]


@settings(max_examples=40)
@given(st.floats(0, 0.999), st.floats(0, 0.999), st.floats(0, 0.999))
def test_a_long_clip_gets_the_strides_of_its_regime(pace: float, size: float, begin: float) -> None:
    for regime, strides in ((0.2, range(1, 4)), (0.7, range(4, 13))):
        indices = reconstruction_frames(1000, (regime, pace, size, begin))
        assert indices[1] - indices[0] == strides[int(pace * len(strides))]
        assert len(indices) == range(16, 33, 4)[int(size * 5)]


def test_a_short_clip_shrinks_the_stride_before_the_length() -> None:
    longest = (0.99, 0.99, 0.99, 0.0)  # 32 frames, stride 12: 373 frames
    assert reconstruction_frames(373, longest) == list(range(0, 373, 12))
    assert reconstruction_frames(372, longest) == list(range(0, 342, 11))
    assert reconstruction_frames(32, longest) == list(range(32))
    assert reconstruction_frames(31, longest) == list(range(28))


def test_runs_reach_both_ends_of_a_clip() -> None:
    starts = {reconstruction_frames(20, (0.0, 0.0, 0.0, k / 100))[0] for k in range(100)}
    assert starts == {0, 1, 2, 3, 4}  # 16 frames of 20


@settings(max_examples=50)
@given(
    st.lists(st.floats(0, 3), max_size=150),
    UNIT,
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from([4, 16, MAX_FRAMES]),
)
def test_moments_are_shown_frames(gaps: list[float], phase: float, fps: float, most: int) -> None:
    times = np.cumsum([7.0, *gaps])
    indices = understanding_frames(times, phase, fps=fps, max_frames=most)
    assert indices == understanding_frames(times, phase, fps=fps, max_frames=most)
    assert len(indices) % 4 == 0
    assert 4 <= len(indices) <= most
    assert indices == sorted(indices)
    assert 0 <= indices[0] <= indices[-1] < len(times)


@pytest.mark.parametrize("rate", [10, 24, 30, 30000 / 1001])
def test_one_frame_a_second(rate: float) -> None:
    times = np.arange(round(20 * rate)) / rate
    middle = understanding_frames(times)
    assert len(middle) == 20
    np.testing.assert_allclose(times[middle], np.arange(20) + 0.5, atol=1 / rate)
    assert understanding_frames(times, 0.0)[:3] == [0, int(rate + 1e-3), int(2 * rate + 2e-3)]


def test_variable_rates_count_in_seconds() -> None:
    times = np.concatenate([np.arange(0, 4, 1 / 100), [4.0, 8.0, 12.0]])  # fast, then slides
    indices = understanding_frames(times)
    assert indices[:4] == [50, 150, 250, 350]
    assert indices[4:] == [400] * 4 + [401] * 4


def test_long_clips_are_spread_and_short_ones_repeated() -> None:
    long = understanding_frames(np.arange(10_000) / 10, 0.5)
    assert len(long) == 64
    assert set(np.diff(long).tolist()) <= {156, 157}
    assert understanding_frames(np.arange(50) / 10, 0.0) == [0, 10, 20, 30, 40, 40, 40, 40]
    assert understanding_frames(np.zeros(1)) == [0, 0, 0, 0]
