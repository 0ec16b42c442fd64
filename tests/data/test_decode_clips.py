"""Mirrored and transparent clips: training sees them as `tokenizer.media` shows them, which decord does not."""

from __future__ import annotations

import io
import struct
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from data.decode.videos import read_clip
from data.resolution import Size, View

QUARTERS = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], np.uint8)
RED, GREEN, BLUE, WHITE = range(4)


def whole(size: Size) -> View:
    return View(resized=size, corner=(0, 0), size=size)


def encoded(
    pixels: NDArray[np.uint8], container_format: str, codec: str, pixel_format: str, pixels_are: str = "rgb24"
) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as container:
        # libvpx takes alpha only without hidden frames.
        stream: Any = container.add_stream(codec, rate=25, options={"auto-alt-ref": "0"} if codec == "libvpx" else {})
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = pixel_format
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(pixels, format=pixels_are)
            container.mux(stream.encode(frame.reformat(format=pixel_format)))
        container.mux(stream.encode())
    return file.getvalue()


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
    """The matrix takes (x, y), y down, to (a x + c y, b x + d y) (ISO/IEC 14496-12, 6.2.2)."""
    data = bytearray(encoded(QUARTERS.repeat(32, axis=0).repeat(48, axis=1), "mp4", "libx264", "yuv420p"))
    a, b, c, d = (value << 16 for value in matrix)
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    frame = read_clip(bytes(data), "x", whole, lambda _: [1])[0]
    height, width = frame.shape[:2]
    assert (height, width) == ((96, 64) if a == 0 else (64, 96))
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
    frame = read_clip(encoded(pixels, container_format, codec, pixel_format, "rgba"), "x", whole, lambda _: [1])[0]
    np.testing.assert_allclose(frame[8:-8, 8:40].mean(axis=(0, 1)), (200, 100, 0), atol=3)
    np.testing.assert_allclose(frame[8:-8, 56:88].mean(axis=(0, 1)), (255, 255, 255), atol=3)
