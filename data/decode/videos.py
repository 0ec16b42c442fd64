"""Clips in shards -> the chosen frames, resized and cut.

Two ways. decord is fast: it decodes only from the key frame before a wanted frame, and scales while it converts
colours. But it hides damage and miscounts frames of some formats, so that it gets the formats that it reads as the
container says, and what it makes of a clip is checked. Everything else goes through `tokenizer.media`, frame by frame:
GIFs, MPEG streams, AV1, what is mirrored or transparent, and whatever decord stumbles over, which is thereby read after
all or found to be damaged.

decord reads from a file without a name and not from memory: in memory its constructor crashes the process on files with
a damaged header (0.6.0).
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.decode.images import cut
from data.decode.mp4 import is_mp4, video_track
from data.resolution import Size, View
from data.samples import SampleError
from tokenizer.errors import InputError
from tokenizer.media.images import MAX_PIXELS
from tokenizer.media.videos import VideoReader

DAMAGED = "damaged video"

ChooseView = Callable[[Size], View]
"""What is to be seen of upright frames of so many rows and columns."""

ChooseFrames = Callable[[NDArray[np.float64]], Sequence[int]]
"""Which frames, ascending, of those shown at these seconds."""

_FAST_FORMATS = ("matroska,webm", "avi")
"""Beside MP4 and MOV, whose boxes tell what FFmpeg does not before it has decoded a frame: whether to turn it."""

_SLOW_CODECS = ("vp8", "png", "qtrle", "prores", "ffv1")
_SLOW_TAGS = ("vp08", "av01", "png ", "rle ", "ap4h", "ap4x")
"""Packets of VP8 that hold no frame to show are counted by decord; AV1 it cannot decode. The others may be transparent:
decord shows what lies below, not white."""

_MISSING_SECONDS = 0.5
"""A container may declare this much more than its frames take (rounding); more may be missing from its end."""

_BLOCK = 8
"""Frames in memory at full width at a time."""

_EOF_RETRIES = "2048"
"""Fewer than decord's 10,240, lest a file whose end cannot be decoded keep a worker busy. With 16 it gives up where it
can still go on, and which way a clip goes should not depend on how busy the machine is."""

_NOTHING_RECOVERED = 1e-6
"""Share of frames that decord may replace by their neighbours: less than one frame."""


def read_clip(data: bytes, name: str, view: ChooseView, frames: ChooseFrames, *, threads: int = 1) -> NDArray[np.uint8]:
    """Decode, turn upright, resize and cut some frames of a clip.

    Args:
        data: the file.
        name: of the sample, for errors.
        view, frames: errors of both pass through.
        threads: of the decoder; workers of a loader are many already.

    Returns:
        uint8 [T, H, W, 3], RGB, of the size of the view.

    Raises:
        SampleError: "damaged video" for what is no video, is truncated, or cannot be decoded.
        InputError: decord is not installed.
    """
    # On Linux the file has no name in its folder: nothing stays behind, also of a worker that is killed.
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        path = Path(f"/dev/fd/{file.fileno()}")
        header = _read_header(path, data)
        if header is not None:
            chosen = view(header.size)
            with contextlib.suppress(*_decord_errors()):
                return _read_fast(path, header, chosen, frames, threads)
        return _read_slowly(path, name, view, frames)


@dataclass(frozen=True, slots=True)
class _Header:
    """What a container says of itself: rows and columns of upright frames, number of frames (0: unknown), seconds."""

    size: Size
    frames: int
    seconds: float


class _DisagreementError(Exception):
    """decord and the container disagree."""


def _read_header(path: Path, data: bytes) -> _Header | None:
    """None: not for decord, whatever it is."""
    header = _boxed_header(data) if is_mp4(data) else _probed_header(path)
    if header is None or not 0 < header.size[0] * header.size[1] < MAX_PIXELS:
        return None
    # Damaged; decord makes room for as many frames as are declared, or aborts the process.
    return None if header.frames > len(data) else header


def _boxed_header(data: bytes) -> _Header | None:
    track = video_track(data)
    if track is None or track.codec in _SLOW_TAGS:
        return None
    size = (track.width, track.height) if track.turned else (track.height, track.width)
    return _Header(size, track.frames, track.seconds)


def _probed_header(path: Path) -> _Header | None:
    import av

    try:
        # The least probing: these formats name size and codec in their headers, and more means decoding.
        with av.open(str(path), options={"probesize": "32"}) as container:
            stream = container.streams.video[0]
            codec: Any = stream.codec_context
            if container.format.name not in _FAST_FORMATS or codec.name in _SLOW_CODECS:
                return None
            if stream.metadata.get("alpha_mode") == "1":
                return None
            return _Header((codec.height, codec.width), stream.frames, (container.duration or 0) / 1e6)
    except Exception:  # PyAV raises its own errors, and standard ones for fields that make no sense
        return None


def _read_fast(path: Path, header: _Header, view: View, frames: ChooseFrames, threads: int) -> NDArray[np.uint8]:
    (rows, columns), (top, left), (height, width) = view.resized, view.corner, view.size
    reader = _decord().VideoReader(
        str(path), width=columns, height=rows, num_threads=threads, fault_tol=_NOTHING_RECOVERED
    )
    times = np.asarray(reader.get_frame_timestamp(range(len(reader))), np.float64)
    starts = times[:, 0]
    whole = len(reader) >= header.frames and header.seconds - float(times[-1, 1] - starts[0]) <= _MISSING_SECONDS
    if not whole or not np.isfinite(starts).all() or bool((np.diff(starts) < 0).any()):
        raise _DisagreementError
    wanted, places = np.unique(frames(starts), return_inverse=True)
    seen = np.empty((len(wanted), height, width, 3), np.uint8)
    for first in range(0, len(wanted), _BLOCK):
        block = reader.get_batch(wanted[first : first + _BLOCK]).asnumpy()
        seen[first : first + _BLOCK] = block[:, top : top + height, left : left + width]
    return seen if len(wanted) == len(places) else seen[places]


def _read_slowly(path: Path, name: str, view: ChooseView, frames: ChooseFrames) -> NDArray[np.uint8]:
    with _decoding(path, name):
        reader = VideoReader(path)
    chosen, wanted = view((reader.height, reader.width)), frames(reader.timestamps)
    seen: dict[int, NDArray[np.uint8]] = {}
    with _decoding(path, name), closing(reader.frames()) as decoded:  # type: ignore[type-var]  # a generator
        for number, frame in enumerate(decoded):
            if number in wanted:
                seen[number] = cut(frame, chosen)
            if number == wanted[-1]:
                break
    if missing := set(wanted) - set(seen):
        raise SampleError(DAMAGED, f"{name}: frame {min(missing)} of {reader.num_frames} cannot be decoded")
    return np.stack([seen[number] for number in wanted])


@contextmanager
def _decoding(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise SampleError(DAMAGED, str(error).replace(str(path), name)) from None
    except Exception as error:  # as for headers
        raise SampleError(DAMAGED, f"{name}: the video is damaged ({' '.join(str(error).split())})") from None


@functools.cache
def _decord() -> Any:
    import av  # noqa: F401  before decord, whose FFmpeg would otherwise be taken by PyAV's codecs for their own

    # Read by decord's native code whenever it comes to the end of a file.
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", _EOF_RETRIES)
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _decord_errors() -> tuple[type[Exception], ...]:
    decord = _decord()
    # RuntimeError, AssertionError: a file that does not open, or without frames.
    return (_DisagreementError, decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError)
