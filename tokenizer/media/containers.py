"""Frames of video files (MP4, WebM, MKV, AVI, MOV, ...) through PyAV, that is FFmpeg.

PyAV and not decord: on intact MP4 and MKV files both give the same bytes, but decord repeats neighbouring frames where
its seek index is wrong (MPEG program streams), takes a truncated WebM or MKV for a short one, and prints to stderr
from native code, which a command line with one-line errors cannot have.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenizer.errors import InputError, require_package
from tokenizer.media.images import damaged, to_rgb

if TYPE_CHECKING:
    import av

# A container may end this much before the duration it declares (rounding, a last frame without a duration).
_MISSING_SECONDS = 0.5

_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

# 32 bits a pixel for the sake of speed: recorders leave anything in the last 8.
_UNUSED_ALPHA = ("rawvideo", "huffyuv")


@dataclass(frozen=True)
class FrameIndex:
    """When each frame of a video is shown, found without decoding it."""

    timestamps: NDArray[np.float64]
    """Seconds from the first frame, ascending, one per frame."""
    fps: Fraction
    """Frames per second, averaged over the video."""
    variable: bool
    """Whether the time between frames varies by more than rounding."""


def index_frames(timestamps: NDArray[np.float64], tick: float, declared_rate: Fraction | None) -> FrameIndex:
    """Make a `FrameIndex` of presentation times.

    Args:
        timestamps: seconds, at least one, any order.
        tick: resolution of the times in seconds; steps that differ by up to two ticks count as equal.
        declared_rate: frames per second that the file states; used when the times agree on a constant rate.
    """
    times = np.sort(timestamps)
    times = times - times[0]
    steps = np.diff(times)
    if len(steps) == 0 or times[-1] <= 0:
        return FrameIndex(times, declared_rate or Fraction(25), variable=False)
    variable = bool(steps.max() - steps.min() > max(2 * tick, 0.05 * float(np.median(steps))) + 1e-9)
    seconds = float(times[-1])
    # Frames hours apart, as damaged times have them, would round to none a second.
    average = Fraction(len(steps) / seconds).limit_denominator(1001) or Fraction(len(steps), round(seconds))
    agrees = declared_rate is not None and abs(float(declared_rate / average) - 1) < 0.01
    if declared_rate and 4 * tick * declared_rate <= 1:
        # In a short clip, the rounding of its first and last time may be more than one in a hundred.
        agrees |= abs(float(len(steps) / declared_rate) - seconds) <= tick + 1e-9
    rate = declared_rate if declared_rate is not None and agrees and not variable else average
    return FrameIndex(times, rate, variable)


def scan(path: Path) -> FrameIndex:
    """Read all packets of a video file, decoding none: frame times, and whether the file is whole.

    Raises:
        InputError: not a video, no video stream or no frames in it, or data missing at the end.
    """
    with _open(path) as (container, stream):
        times: list[float] = []
        packets, end = 0, 0.0
        try:
            for packet in container.demux():
                time = packet.pts if packet.pts is not None else packet.dts
                if packet.size == 0 or time is None or packet.time_base is None:
                    continue  # the empty packets that end each stream
                end = max(end, float((time + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index == stream.index:
                    packets += 1
                    if _is_shown(packet, stream.codec_context.name, first=not times):
                        times.append(float(time * packet.time_base))
        except _ffmpeg_errors() as error:
            raise damaged(str(path), error) from error
        if not times:
            raise InputError(f"{path}: is a video with no frames")
        start = (container.start_time or 0) / 1e6
        _check_whole(path, container, stream.frames, packets, end - start)
        tick = float(stream.time_base) if stream.time_base is not None else 0.0
        return index_frames(np.array(times), tick, stream.average_rate or stream.guessed_rate)


def decode(path: Path) -> Generator[NDArray[np.uint8], None, None]:
    """Decode a video file frame by frame, upright, as uint8 [H, W, 3] RGB, transparent pixels on white.

    Raises:
        InputError: a frame is damaged.
    """
    with _open(path) as (container, stream):
        stream.thread_type = "AUTO"
        count = rotation = 0
        matrix = (1, 0, 0, 1)
        try:
            for frame in _frames(container, stream):
                if frame.is_corrupt:
                    raise InputError(f"{path}: is truncated or damaged (frame {count} cannot be decoded whole)")
                pixels = _rgb(frame, stream.codec_context.name, str(path))
                if not count or frame.rotation != rotation:
                    rotation, matrix = frame.rotation, _display_matrix(frame)
                yield _upright(pixels, *matrix)
                count += 1
        except _ffmpeg_errors() as error:
            raise damaged(str(path), error) from error


def _frames(container: Any, stream: Any) -> Iterator[av.VideoFrame]:
    """Decode with what FFmpeg takes by itself, but for WebM with alpha, whose alpha only another decoder knows."""
    import av

    decoder: Any = None
    if stream.metadata.get("alpha_mode") == "1" and stream.codec_context.name in _ALPHA_DECODERS:
        with contextlib.suppress(av.codec.codec.UnknownCodecError):  # a build without it shows what lies below
            decoder = av.CodecContext.create(_ALPHA_DECODERS[stream.codec_context.name], "r")
    if decoder is None:
        yield from container.decode(stream)
        return
    for packet in container.demux(stream):
        yield from decoder.decode(packet if packet.size else None)


def _rgb(frame: av.VideoFrame, codec: str, name: str) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] as stored, on white where it is transparent."""
    if codec not in _UNUSED_ALPHA and any(component.is_alpha for component in frame.format.components):
        return to_rgb(Image.fromarray(frame.to_ndarray(format="rgba")), name)
    return np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c, d: a pixel at (x, y) is to be shown at (a x + c y, b x + d y), y down.

    `frame.rotation` alone does not know mirror images, as front cameras record them: it takes them for half turns.
    Not for every frame: the side data and its frame refer to each other, and both stay until Python looks for cycles.
    """
    from av.sidedata.sidedata import Type

    data: Any = frame.side_data  # typed as if its keys were strings alone
    if (matrix := data.get(Type.DISPLAYMATRIX)) is None:
        return 1, 0, 0, 1
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    return a, b, c, d


def _upright(pixels: NDArray[np.uint8], a: int, b: int, c: int, d: int) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] mirrored and turned by quarters as a display matrix says."""
    if a * d - b * c < 0:
        pixels, a, b = pixels[:, ::-1], -a, -b
    return np.ascontiguousarray(np.rot90(pixels, -round(math.atan2(b, a) / (math.pi / 2))))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
    require_package("av", "reading and writing videos")
    import av

    # PyAV's logging stays off, as it is by default: its callback takes the GIL from decoder threads, and closing a file
    # that is not read to its end then waits for those threads forever.
    try:
        # Titles and comments are of no use here, and many are in Latin-1 or damaged.
        container = av.open(str(path), metadata_errors="replace")
    except _ffmpeg_errors() as error:
        raise InputError(f"{path}: is not a video that can be read, or it is truncated ({_reason(error)})") from error
    with container:
        if not container.streams.video:
            raise InputError(f"{path}: has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise InputError(f"{path}: its video is of a codec that FFmpeg does not know, or its header is damaged")
        yield container, stream


def _is_shown(packet: Any, codec: str, *, first: bool) -> bool:
    """Whether decoding gives a frame to show for this packet; `first` if none before it did."""
    if packet.is_discard:
        return False  # cut off by the container's edit list
    if codec == "vp8" and not memoryview(packet)[0] & 0x10:
        return False  # a reference for other frames (RFC 6386, 9.1: the show_frame bit)
    return packet.is_keyframe or not first  # a recording that starts midway can be decoded from its first key frame


def _check_whole(path: Path, container: Any, declared_frames: int, frames: int, seconds: float) -> None:
    if frames < declared_frames:
        raise InputError(f"{path}: is truncated: it declares {declared_frames} frames and holds {frames}")
    declared_seconds = (container.duration or 0) / 1e6
    if declared_seconds - seconds > _MISSING_SECONDS:
        raise InputError(f"{path}: is truncated: it declares {declared_seconds:.1f} s and holds {seconds:.1f} s")


def _ffmpeg_errors() -> tuple[type[Exception], ...]:
    import av

    return (av.error.FFmpegError, OSError)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
