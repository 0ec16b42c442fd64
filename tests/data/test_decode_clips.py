"""Mirrored and transparent clips: training sees them as `tokenizer.media` shows them, which decord does not."""

from __future__ import annotations

import numpy as np
import pytest

from data.decode.videos import read_clip
from data.resolution import Size, View
from tests.data.made_samples import displayed, encoded

QUARTERS = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], np.uint8)
RED, GREEN, BLUE, WHITE = range(4)


def whole(size: Size) -> View:
    return View(resized=size, corner=(0, 0), size=size)


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), [RED, GREEN, BLUE, WHITE]),
        ((-1, 0, 0, 1), [GREEN, RED, WHITE, BLUE]),
        ((1, 0, 0, -1), [BLUE, WHITE, RED, GREEN]),
        ((-1, 0, 0, -1), [WHITE, BLUE, GREEN, RED]),
        ((0, 1, -1, 0), [BLUE, RED, WHITE, GREEN]),
        ((0, 1, 1, 0), [RED, BLUE, GREEN, WHITE]),
    ],
)
def test_mirrored_and_turned_clips_are_upright(matrix: tuple[int, int, int, int], shown: list[int]) -> None:
    plain = encoded(QUARTERS.repeat(32, axis=0).repeat(48, axis=1), "mp4", "libx264", "yuv420p")
    frame = read_clip(displayed(plain, matrix), "x", whole, lambda _: [1])[0]
    height, width = frame.shape[:2]
    assert (height, width) == ((96, 64) if matrix[0] == 0 else (64, 96))
    middles = frame[height // 4 :: height // 2, width // 4 :: width // 2].reshape(4, 3)
    np.testing.assert_allclose(middles, QUARTERS.reshape(4, 3)[shown], atol=6)


@pytest.mark.parametrize(
    ("container_format", "codec", "pixel_format"),
    [
        ("webm", "libvpx-vp9", "yuva420p"),
        ("webm", "libvpx", "yuva420p"),
        ("mov", "prores_ks", "yuva444p10le"),
        ("mov", "qtrle", "argb"),
        ("mov", "png", "rgba"),
        ("avi", "png", "rgba"),
        ("matroska", "ffv1", "bgra"),
    ],
)
def test_transparent_clips_are_on_white(container_format: str, codec: str, pixel_format: str) -> None:
    pixels = np.full((64, 96, 4), (200, 100, 0, 255), np.uint8)
    pixels[:, 48:, 3] = 0
    frame = read_clip(encoded(pixels, container_format, codec, pixel_format), "x", whole, lambda _: [1])[0]
    np.testing.assert_allclose(frame[8:-8, 8:40].mean(axis=(0, 1)), (200, 100, 0), atol=3)
    np.testing.assert_allclose(frame[8:-8, 56:88].mean(axis=(0, 1)), (255, 255, 255), atol=3)
