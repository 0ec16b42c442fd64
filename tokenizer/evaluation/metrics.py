"""PSNR and SSIM of reconstructions, in plain numpy.

Both compare uint8 pixels in RGB, so a reconstruction is measured as it would be stored. Over a video the squared error
is pooled over all frames before the logarithm (one perfect frame does not make the figure infinite), and SSIM is the
mean over the frames.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenizer.errors import InputError

SSIM_WINDOW: Final = 7
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(reference: NDArray[np.uint8], image: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB over all values of two uint8 arrays of one shape; infinite if they are equal."""
    _check(reference, image)
    return _decibels(_squared_error(reference, image) / reference.size)


def ssim(reference: NDArray[np.uint8], image: NDArray[np.uint8]) -> float:
    """Structural similarity of two pictures [H, W, 3], uint8, at most 1.

    The mean over channels and over all places of a uniform 7x7 window, with sample covariances: what
    `skimage.metrics.structural_similarity(..., channel_axis=2)` computes by default. Pictures with a side below 7 are
    measured with the largest odd window that fits.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment", equation 13.
    """
    _check(reference, image)
    if reference.ndim != 3:
        raise InputError(f"SSIM compares pictures [H, W, 3], these are {list(reference.shape)}")
    side = min(SSIM_WINDOW, (min(reference.shape[:2]) - 1) // 2 * 2 + 1)
    x, y = reference.astype(np.float64), image.astype(np.float64)
    mean_x, mean_y = _window_mean(x, side), _window_mean(y, side)
    count = side * side
    unbiased = count / (count - 1) if count > 1 else 1.0
    variance_x = unbiased * (_window_mean(x * x, side) - mean_x**2)
    variance_y = unbiased * (_window_mean(y * y, side) - mean_y**2)
    covariance = unbiased * (_window_mean(x * y, side) - mean_x * mean_y)
    likeness = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    energy = (mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2)
    return float(np.mean(likeness / energy))


class ReconstructionMeter:
    """PSNR and SSIM of a picture or video that arrives in blocks."""

    def __init__(self) -> None:
        self._error, self._values = 0.0, 0
        self._ssim, self._frames = 0.0, 0

    def update(self, reference: NDArray[np.uint8], reconstruction: NDArray[np.uint8]) -> None:
        """Add frames: two uint8 arrays [T, H, W, 3] of one shape."""
        _check(reference, reconstruction)
        for original, copy in zip(reference, reconstruction, strict=True):
            self._error += _squared_error(original, copy)
            self._values += original.size
            self._ssim += ssim(original, copy)
            self._frames += 1

    @property
    def psnr(self) -> float:
        """dB over all frames so far."""
        return _decibels(self._error / self._values)

    @property
    def ssim(self) -> float:
        """Mean over the frames so far."""
        return self._ssim / self._frames


def _check(reference: NDArray[np.uint8], image: NDArray[np.uint8]) -> None:
    if reference.shape != image.shape or reference.size == 0:
        raise InputError(
            f"metrics compare arrays of one shape, these are {list(reference.shape)} and {list(image.shape)}"
        )
    if reference.dtype != np.uint8 or image.dtype != np.uint8:
        raise InputError(f"metrics compare uint8 pixels, these are {reference.dtype} and {image.dtype}")


def _squared_error(reference: NDArray[np.uint8], image: NDArray[np.uint8]) -> float:
    difference = reference.astype(np.int64) - image.astype(np.int64)
    return float(np.square(difference).sum())


def _decibels(mean_squared_error: float) -> float:
    return math.inf if mean_squared_error == 0 else 10 * math.log10(255**2 / mean_squared_error)


def _window_mean(values: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Means over all windows of side x side that lie inside [H, W, C], by differences of running sums."""
    for axis in (0, 1):
        sums = np.cumsum(values, axis=axis)
        sums = np.insert(sums, 0, 0.0, axis=axis)
        length = sums.shape[axis]
        values = np.take(sums, range(side, length), axis) - np.take(sums, range(length - side), axis)
    return values / side**2
