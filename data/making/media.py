"""Pictures and videos as records of a shard: their bytes as found, where a reader of shards knows the format.

Every file is decoded once, so that what cannot be read is told now, with its name, and not in the middle of a training
run. A video may be cut into clips, which are encoded anew, nearly without loss.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.making.captions import Captions
from data.samples import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from data.shards.manifest import Skipped
from data.shards.writer import Record
from tokenizer.errors import InputError
from tokenizer.media import VideoReader, VideoWriter, load_image


@dataclass(frozen=True, slots=True)
class PictureMaker:
    """One picture file -> one record.

    captions: finds caption and label.
    max_side: larger pictures are reduced to it and encoded anew; none by default.
    min_side: smaller pictures are left out.
    """

    captions: Captions
    max_side: int | None = None
    min_side: int = 16

    def __call__(self, file: Path) -> Iterator[Record | Skipped]:
        """The record of a file, or why there is none."""
        name = file.relative_to(self.captions.root).as_posix()
        try:
            facts = self.captions.facts(file)
            pixels = load_image(file)
        except InputError as error:
            yield Skipped(name, str(error))
            return
        height, width = pixels.shape[:2]
        if min(height, width) < self.min_side:
            yield Skipped(name, f"{width}x{height} pixels, at least {self.min_side} a side are asked for")
            return
        extension = file.suffix.lower().removeprefix(".")
        if self.max_side is not None and max(height, width) > self.max_side:
            extension, contents, (height, width) = _reduced(pixels, self.max_side, extension)
        elif extension in IMAGE_EXTENSIONS:
            contents = file.read_bytes()
        else:
            extension, contents = "png", _encoded(pixels, "png")
        yield record(key_of(name), {extension: contents}, facts, file=name, height=height, width=width)


@dataclass(frozen=True, slots=True)
class VideoMaker:
    """One video file -> one record, or one for each clip of it.

    clip_seconds: length of the clips; whole videos by default. A rest shorter than half a clip is left out.
    """

    captions: Captions
    clip_seconds: float | None = None

    def __call__(self, file: Path) -> Iterator[Record | Skipped]:
        """The records of a file, or why there are none."""
        name = file.relative_to(self.captions.root).as_posix()
        try:
            facts = self.captions.facts(file)
            video = VideoReader(file)
            shape = {"height": video.height, "width": video.width, "fps": float(video.fps)}
            if self.clip_seconds is not None:
                yield from self._clips(video, name, facts | shape)
                return
            frames = sum(1 for _ in video.frames())  # decodes all, so that a damaged end is found
        except InputError as error:
            yield Skipped(name, str(error))
            return
        extension = file.suffix.lower().removeprefix(".")
        if extension not in VIDEO_EXTENSIONS:
            yield Skipped(
                name, f"is a .{extension}; shards hold {', '.join(VIDEO_EXTENSIONS)}: convert it, or cut clips"
            )
            return
        yield record(key_of(name), {extension: file.read_bytes()}, facts, file=name, frames=frames, **shape)

    def _clips(self, video: VideoReader, name: str, facts: dict[str, Any]) -> Iterator[Record | Skipped]:
        assert self.clip_seconds is not None
        length = max(1, round(self.clip_seconds * float(video.fps)))
        for number, block in enumerate(video.blocks(length)):
            if number and len(block) < length / 2:
                break
            first = number * length
            yield record(
                f"{key_of(name)}-{number:04d}",
                {"mp4": encoded_clip(block, video.fps)},
                facts,
                file=name,
                first_frame=first,
                frames=len(block),
            )


def record(key: str, files: dict[str, bytes], facts: dict[str, Any], **more: Any) -> Record:
    """A record whose caption lies beside it as text and whose other facts are JSON."""
    facts = dict(facts)
    caption = facts.pop("caption", None)
    text = {"txt": str(caption).encode("utf-8")} if caption else {}
    return Record(key, {**files, **text}, {**facts, **more})


def key_of(name: str) -> str:
    """The key of a file: its name in the set without ending, without the dots that would end a key and without the
    control characters that no key may have."""
    return re.sub(r"[.\x00-\x1f\x7f]", "_", os.path.splitext(name)[0])  # noqa: PTH122 - a name, not a path on this machine


def encoded_clip(frames: NDArray[np.uint8], fps: Fraction | float) -> bytes:
    """uint8 [T, H, W, 3] as an MP4, nearly without loss, at a rate of frames a second."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with VideoWriter(path, fps, frames.shape[1], frames.shape[2]) as writer:
            writer.write(frames)
        return path.read_bytes()


def _reduced(pixels: NDArray[np.uint8], side: int, extension: str) -> tuple[str, bytes, tuple[int, int]]:
    from PIL import Image

    factor = side / max(pixels.shape[:2])
    height, width = (max(1, round(length * factor)) for length in pixels.shape[:2])
    small = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
    extension = "jpg" if extension in ("jpg", "jpeg") else "png"
    return extension, _encoded(np.asarray(small), extension), (height, width)


def _encoded(pixels: NDArray[np.uint8], extension: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if extension == "jpg" else {}
    Image.fromarray(pixels).save(buffer, "JPEG" if extension == "jpg" else "PNG", **options)
    return buffer.getvalue()
