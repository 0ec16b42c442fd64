"""Odd and damaged media: read where what is odd is not the picture, else refused in one line that names the file."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.data.made_samples import displayed, encoded
from tokenizer.errors import InputError
from tokenizer.media import VideoReader, media_kind
from tokenizer.media.containers import index_frames

FRAMES = 5
TITLE = b"Cafe del mar"


def film(folder: Path, ending: str, codec: str) -> Path:
    """Five frames of 48 x 32 with a title."""
    path = folder / f"film.{ending}"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = TITLE.decode()
        stream: Any = container.add_stream(codec, rate=25)  # typed as audio too
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number in range(FRAMES):
            pixels = np.full((32, 48, 3), 40 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("ending", "codec"), [("avi", "mpeg4"), ("mp4", "libx264"), ("mkv", "libx264")])
def test_a_title_that_is_not_utf_8_is_no_reason_to_refuse_a_film(tmp_path: Path, ending: str, codec: str) -> None:
    path = film(tmp_path, ending, codec)
    whole, data = VideoReader(path).read(), path.read_bytes()
    assert TITLE in data
    path.write_bytes(data.replace(TITLE, "Café del mar".encode("latin-1")))
    np.testing.assert_array_equal(VideoReader(path).read(), whole)
    assert len(whole) == FRAMES


@pytest.mark.parametrize(
    ("ending", "codec", "known", "unknown"),
    [("avi", "mpeg4", b"FMP4", b"QQ4Q"), ("mkv", "libx264", b"V_MPEG4/ISO/AVC", b"V_MPQQQ/ISO/AVC")],
)
def test_a_codec_that_nobody_knows_is_named(
    tmp_path: Path, ending: str, codec: str, known: bytes, unknown: bytes
) -> None:
    path = film(tmp_path, ending, codec)
    data = path.read_bytes()
    assert known in data
    path.write_bytes(data.replace(known, unknown))
    with pytest.raises(InputError, match=rf"film\.{ending}: its video is of a codec that FFmpeg does not know"):
        VideoReader(path)


@pytest.mark.parametrize(("seconds", "rate"), [(1e6, Fraction(1, 1_000_000)), (1500.0, Fraction(1, 1001))])
def test_frames_hours_apart_still_have_a_rate(seconds: float, rate: Fraction) -> None:
    for declared in (None, Fraction(25)):
        index = index_frames(np.array([0.0, seconds]), 0.01, declared)
        assert index.fps == rate
        assert not index.variable


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(30000, 1001), Fraction(30), Fraction(60), Fraction(240)])
@pytest.mark.parametrize("count", [2, 3, 5, 10, 100])
def test_times_in_milliseconds_do_not_hide_the_rate_of_a_short_clip(rate: Fraction, count: int) -> None:
    """Matroska and WebM count in milliseconds: two frames at 30 a second stand 33 of them apart, as if at 30.3."""
    times = np.round(np.arange(count) / float(rate), 3)
    assert index_frames(times, 0.001, rate).fps == rate
    assert index_frames(times, 0.001, 2 * rate).fps != 2 * rate


def test_a_frame_larger_than_its_animation_is_no_bomb(tmp_path: Path) -> None:
    """The second frame of a GIF says that it has 65,535 pixels a side."""
    shades: list[NDArray[np.uint8]] = [np.full((8, 8), shade, np.uint8) for shade in (0, 100)]
    first, second = (Image.fromarray(shade) for shade in shades)
    coded = io.BytesIO()
    first.save(coded, "GIF", save_all=True, append_images=[second])
    data = bytearray(coded.getvalue())
    place = data.rindex(b"\x2c\x00\x00\x00\x00\x08\x00\x08\x00")
    data[place + 5 : place + 9] = b"\xff\xff\xff\xff"
    path = tmp_path / "bomb.gif"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"bomb\.gif: is truncated or damaged \(Image size"):
        VideoReader(path)
    assert media_kind(path) in ("image", "video")


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), "RG BW"),
        ((-1, 0, 0, 1), "GR WB"),
        ((1, 0, 0, -1), "BW RG"),
        ((-1, 0, 0, -1), "WB GR"),
        ((0, 1, -1, 0), "BR WG"),
        ((0, -1, 1, 0), "GW RB"),
        ((0, 1, 1, 0), "RB GW"),
        ((0, -1, -1, 0), "WG BR"),
    ],
)
def test_mirrored_and_turned_films_are_upright(tmp_path: Path, matrix: tuple[int, int, int, int], shown: str) -> None:
    path = tmp_path / "film.mp4"
    colours = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}
    quarters = np.array([[colours["R"], colours["G"]], [colours["B"], colours["W"]]], np.uint8)
    plain = encoded(quarters.repeat(32, axis=0).repeat(48, axis=1), "mp4", "libx264", "yuv420p")
    path.write_bytes(displayed(plain, matrix))

    reader = VideoReader(path)
    assert (reader.height, reader.width) == ((96, 64) if matrix[0] == 0 else (64, 96))
    frame = reader.read()[0]
    middles = frame[reader.height // 4 :: reader.height // 2, reader.width // 4 :: reader.width // 2] > 128
    names = {tuple(value > 128 for value in colour): name for name, colour in colours.items()}
    assert " ".join("".join(names[tuple(pixel)] for pixel in row) for row in middles.tolist()) == shown
