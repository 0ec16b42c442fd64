"""What an MP4 or MOV file says of its video track, read from its boxes alone (ISO/IEC 14496-12).

Opening a file with FFmpeg means decoding its first frame, which takes as long as three wanted ones. The boxes say the
same in microseconds. What is odd here is nobody's fault: it is left to FFmpeg.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_CONTAINERS = (b"moov", b"mdia", b"minf", b"stbl")


@dataclass(frozen=True, slots=True)
class VideoTrack:
    """The only video track of a file.

    height, width: of frames as they are coded. turned: whether they are to be shown turned by a quarter.
    frames: how many. seconds: from the first to the end of the last.
    codec: four characters, "avc1".
    """

    height: int
    width: int
    turned: bool
    frames: int
    seconds: float
    codec: str


def is_mp4(data: bytes) -> bool:
    """Whether a file begins as an MP4 or MOV does."""
    return data[4:8] == b"ftyp"


def video_track(data: bytes) -> VideoTrack | None:
    """The video track of a file, or None for another format, a damaged one, one of several video tracks, one whose
    frames come in fragments, or one that is to be shown mirrored."""
    if not is_mp4(data):
        return None
    try:
        moov = next((body for kind, body in _boxes(memoryview(data)) if kind == b"moov"), None)
        if moov is None or any(kind == b"mvex" for kind, _ in _boxes(moov)):
            return None
        tracks = [track for kind, body in _boxes(moov) if kind == b"trak" and (track := _track(body)) is not None]
    except (struct.error, ValueError, LookupError, ZeroDivisionError):
        return None
    return tracks[0] if len(tracks) == 1 else None


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and body of each box at one level."""
    start = 0
    while start + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, start + 8)
            head = 16
        elif size == 0:  # to the end of the file
            size = len(data) - start
        if size < head or start + size > len(data):
            raise ValueError("a box that does not fit")
        yield kind, data[start + head : start + size]
        start += size


def _track(body: memoryview) -> VideoTrack | None:
    """None for a track of something else."""
    parts = dict(_leaves(body))
    if bytes(parts[b"hdlr"][8:12]) != b"vide":
        return None
    (entries,) = struct.unpack_from(">I", parts[b"stsd"], 4)
    if entries != 1:
        raise ValueError("frames of several sorts")
    # A sample entry: size, codec, 6 reserved bytes, data reference, 16 bytes of nothing, width, height.
    (codec,) = struct.unpack_from(">4s", parts[b"stsd"], 12)
    width, height = struct.unpack_from(">HH", parts[b"stsd"], 40)
    (frames,) = struct.unpack_from(">I", parts[b"stsz"], 8)
    if frames != _timed_frames(parts[b"stts"]):
        # The sum is what FFmpeg takes for the number of frames, and decord makes room for that many at once.
        raise ValueError("not as many times as frames")
    # Two times come first, in 64 bits each in version 1, as the duration then is.
    long = parts[b"mdhd"][0] == 1
    timescale, duration = struct.unpack_from(">IQ" if long else ">II", parts[b"mdhd"], 20 if long else 12)
    return VideoTrack(height, width, _turned(parts[b"tkhd"]), frames, duration / timescale, codec.decode("latin-1"))


def _leaves(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The boxes that hold values, at any depth."""
    for kind, body in _boxes(data):
        if kind in _CONTAINERS:
            yield from _leaves(body)
        else:
            yield kind, body


def _timed_frames(runs: memoryview) -> int:
    """How many frames have a time, from runs of a number of frames and the time that each of them lasts."""
    (entries,) = struct.unpack_from(">I", runs, 4)
    if len(runs) != 8 + 8 * entries:  # FFmpeg reads on behind the box
        raise ValueError("not as many runs as there is room for")
    return sum(count for count, _ in struct.iter_unpack(">II", runs[8:]))


def _turned(header: memoryview) -> bool:
    """From the matrix of a track header, which lies behind flags, times, track, duration, layer and volume."""
    a, b, _, c, d = struct.unpack_from(">5i", header, 52 if header[0] == 1 else 40)
    if a * d - b * c < 0:
        raise ValueError("a mirror image, which decord takes for a turned one")
    one = 1 << 16
    return bool(a == 0 == d and abs(b) == one == abs(c))
