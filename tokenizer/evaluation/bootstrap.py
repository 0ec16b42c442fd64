"""How sure a figure is: percentile bootstrap intervals (Efron and Tibshirani 1993, chapter 13).

The samples of a test set are drawn again with replacement, many times, and the figure is computed of each draw; the
middle 95 % of these figures are the interval. A sample is what was drawn from the world: a picture, a clip, an asset;
never a frame of a clip, because the frames of one clip are alike and would make the interval too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenizer.errors import InputError

RESAMPLES: Final = 1000
LEVEL: Final = 0.95
_CHUNK: Final = 2**22
"""Draws held at once, 8 bytes each."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its interval.

    Attributes:
        value: the figure of all samples.
        low: lower end, None for a single sample, about whose spread nothing is known.
        high: upper end, or None.
        n: number of samples.
    """

    value: float
    low: float | None
    high: float | None
    n: int


def bootstrap_mean(
    values: ArrayLike, seed: int | Sequence[int] = 0, level: float = LEVEL, resamples: int = RESAMPLES
) -> Interval:
    """Interval of a mean. Of an accuracy too: the mean of ones (right) and zeros (wrong).

    Args:
        values: [n], one finite number for each sample.
        seed: the same seed and values give the same interval.
        level: share of the draws inside the interval, between 0 and 1.
        resamples: number of draws.

    Raises:
        InputError: no values, or one that is not finite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    return bootstrap_ratio(numbers, np.ones_like(numbers), seed, level, resamples)


def bootstrap_ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    seed: int | Sequence[int] = 0,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Interval:
    """Interval of a ratio of sums, such as bits per pixel over pictures of several sizes.

    Args:
        numerators: [n], of each sample (its bits).
        denominators: [n], positive (its pixels).
        seed, level, resamples: see `bootstrap_mean`.

    Raises:
        InputError: no values, numbers of values that differ, one that is not finite, a denominator of zero or less.
    """
    top, bottom = (np.asarray(numbers, dtype=np.float64) for numbers in (numerators, denominators))
    _check(top, bottom)
    value = float(top.sum() / bottom.sum())
    if len(top) == 1:
        return Interval(value, None, None, 1)
    ends = (1 - level) / 2, (1 + level) / 2
    low, high = np.quantile(_ratios(top, bottom, np.random.default_rng(seed), resamples), ends)
    return Interval(value, float(low), float(high), len(top))


def _ratios(
    top: NDArray[np.float64], bottom: NDArray[np.float64], rng: np.random.Generator, resamples: int
) -> NDArray[np.float64]:
    """The ratio in each of `resamples` draws."""
    step = max(1, _CHUNK // len(top))
    ratios = []
    for start in range(0, resamples, step):
        drawn = rng.integers(0, len(top), (min(step, resamples - start), len(top)))
        ratios.append(top[drawn].sum(axis=1) / bottom[drawn].sum(axis=1))
    return np.concatenate(ratios)


def _check(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> None:
    if top.ndim != 1 or top.shape != bottom.shape or len(top) == 0:
        raise InputError(
            f"an interval needs one number for each sample, not {list(top.shape)} and {list(bottom.shape)} of them"
        )
    if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
        raise InputError("an interval needs finite numbers: leave out the samples that have none")
    if (bottom <= 0).any():
        raise InputError("a ratio needs positive denominators: leave out the samples that have none")
