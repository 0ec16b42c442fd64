"""Boxes of MP4 files against FFmpeg, and damaged ones."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.decode.mp4 import video_track
from tokenizer.demo import CLIP
from tokenizer.media import VideoReader, VideoWriter

BYTES = CLIP.read_bytes()


@pytest.mark.parametrize(("frames", "height", "width", "rate"), [(1, 16, 16, 1), (7, 48, 64, Fraction(30000, 1001))])
def test_boxes_say_what_ffmpeg_says(frames: int, height: int, width: int, rate: int | Fraction, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, rate, height, width) as writer:
        writer.write(np.zeros((frames, height, width, 3), np.uint8))
    track = video_track(path.read_bytes())
    assert track is not None
    assert (track.height, track.width, track.frames, track.codec) == (height, width, frames, "avc1")
    assert track.seconds == pytest.approx(frames / float(rate), abs=1.5 / float(rate))
    assert not track.turned


def test_the_bundled_clip() -> None:
    track, reader = video_track(BYTES), VideoReader(CLIP)
    assert track is not None
    assert (track.height, track.width, track.frames) == (reader.height, reader.width, reader.num_frames)


def test_a_quarter_turn_is_read_from_the_matrix() -> None:
    place = BYTES.index(b"tkhd") + 4 + 40
    one = (1 << 16).to_bytes(4, "big")
    zero, minus = bytes(4), (-(1 << 16)).to_bytes(4, "big", signed=True)
    turned = BYTES[:place] + zero + one + zero + minus + zero + BYTES[place + 20 :]
    track = video_track(turned)
    assert track is not None
    assert track.turned


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(BYTES)), st.binary(min_size=1, max_size=8), st.booleans())
def test_damage_never_raises(place: int, junk: bytes, cut: bool) -> None:
    track = video_track(BYTES[:place] if cut else BYTES[:place] + junk + BYTES[place + len(junk) :])
    assert track is None or track.frames >= 0


def test_other_formats_are_left_to_others() -> None:
    for data in (b"", b"ftyp", b"\x1a\x45\xdf\xa3webm" * 9, BYTES[: BYTES.index(b"moov")]):
        assert video_track(data) is None
