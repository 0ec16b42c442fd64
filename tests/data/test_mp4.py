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
@given(st.integers(0, len(BYTES)), st.binary(min_size=1, max_size=8))
def test_damage_never_raises_nor_changes_the_number_of_frames(place: int, junk: bytes) -> None:
    """Two boxes state the number, too far apart for one piece of junk."""
    track = video_track(BYTES[:place] + junk + BYTES[place + len(junk) :])
    assert track is None or track.frames == VideoReader(CLIP).num_frames


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(BYTES)) | st.integers(BYTES.index(b"moov"), BYTES.index(b"mdat")))
def test_a_file_is_cut_before_its_boxes_end_or_read_as_the_whole(place: int) -> None:
    start = BYTES.index(b"moov") - 4
    end = start + int.from_bytes(BYTES[start : start + 4], "big")
    assert video_track(BYTES[:place]) == (video_track(BYTES) if place >= end else None)


def test_damage_outside_the_boxes_read_changes_nothing_and_without_them_there_is_no_track() -> None:
    whole = video_track(BYTES)
    assert whole is not None
    media = BYTES.index(b"mdat")
    start, end = media + 8, media + int.from_bytes(BYTES[media - 4 : media], "big") - 4
    assert end - start > 10_000
    assert video_track(BYTES[:start] + bytes(end - start) + BYTES[end:]) == whole
    for box in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stts"):
        assert video_track(BYTES.replace(box, b"free")) is None, box


def box(kind: bytes, body: bytes) -> bytes:
    return (8 + len(body)).to_bytes(4, "big") + kind + body


def test_boxes_too_short_and_a_clock_that_stands_still() -> None:
    handler, entries = box(b"hdlr", bytes(8) + b"vide"), box(b"stsd", b"")
    assert video_track(box(b"ftyp", b"isom") + box(b"moov", box(b"trak", handler + entries))) is None
    place = BYTES.index(b"mdhd") + 4 + 12
    assert video_track(BYTES[:place] + bytes(4) + BYTES[place + 4 :]) is None


def test_other_formats_are_left_to_others() -> None:
    for data in (b"", b"ftyp", b"\x1a\x45\xdf\xa3webm" * 9, BYTES[: BYTES.index(b"moov")]):
        assert video_track(data) is None
