"""What an image network sees in each sample, as one more file beside it: a teacher that runs once, not in every step.

KEY.teacher.npy    float16 [D]: pooled features of the network, the mean over the pictures of the sample

The pictures are the sample's own, or some frames of a video, or some views of an asset on white, each reduced to the
square that the network was trained on. A small model that understands learns to tell them as well (`loss.imitation`):
a classifier of photographs knows more about a chair than a few hundred captions say.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from data.decode.assets import decode_views, decode_voxels
from data.decode.images import read_picture
from data.decode.videos import read_clip
from data.resolution import Size, View
from data.samples import IMAGE_EXTENSIONS, TEACHER_EXTENSION, VIDEO_EXTENSIONS, Kind, Raw, SampleError
from data.shards.manifest import Shard, ShardSet, Skipped, read_set
from data.shards.reader import SINGLE, read_shard
from data.shards.tarwriter import KEYS, is_extension, is_key
from data.shards.writer import Record, write_set
from data.urls import UNREACHABLE
from tokenizer.errors import InputError
from tokenizer.losses.networks import ImageNetwork, make_image_network
from tokenizer.losses.pictures import squares

_TOGETHER = 32
"""Pictures that the network is given at least, where there are as many."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """A sample before the network has seen it; pictures: [n, 3, side, side] in [-1, 1], at least one."""

    raw: Raw
    facts: dict[str, Any]
    pictures: Tensor


@dataclass(frozen=True, slots=True)
class Teacher:
    """How samples are taught; what it gives for a shard depends on nothing else.

    kind: of the samples.
    siglip2: folder of a SigLIP 2 checkpoint; None for EfficientNet-Lite0.
    pictures: frames of a video, or views of an asset, that are looked at, evenly spread; all where there are fewer.
    device: where the network computes.
    """

    kind: Kind
    siglip2: str | None
    pictures: int
    device: str

    def __call__(self, shard: Shard) -> Iterator[Record | Skipped]:
        """The samples of a shard with what the network sees in them, in order."""
        waiting: list[_Seen] = []
        keys: set[str] = set()
        side = _network(self.siglip2, self.device).side
        for found in _samples(shard):
            if isinstance(found, SampleError):
                yield Skipped(shard.name, str(found))
                continue
            # Shards of other makers have keys and files that none of ours may have.
            if not is_key(found.key) or found.key in keys:
                why = "there is another sample of this key in its shard" if found.key in keys else KEYS
                yield Skipped(found.id, f"{found.id}: {why}")
                continue
            keys.add(found.key)
            if odd := [extension for extension in found.files if not is_extension(extension)]:
                yield Skipped(f"{found.id}.{odd[0]}", f"{found.id}: its files {', '.join(odd)}: no endings of a shard")
                found = replace(found, files={e: found.files[e] for e in found.files if e not in odd})
            try:
                # Reduced at once: photographs as they were taken fill gigabytes before the network is given any.
                pictures = torch.cat([squares([one], side) for one in _pictures(found, self.kind, self.pictures)])
                waiting.append(_Seen(found, found.facts(), pictures))
            except InputError as error:
                yield Skipped(found.id, str(error))
            if sum(len(seen.pictures) for seen in waiting) >= _TOGETHER:
                yield from self._taught(waiting)
                waiting = []
        yield from self._taught(waiting)

    @torch.inference_mode()
    def _taught(self, samples: list[_Seen]) -> Iterator[Record]:
        if not samples:
            return
        network = _network(self.siglip2, self.device)
        pixels = torch.cat([seen.pictures for seen in samples])
        features = network(pixels.to(self.device)).float().cpu().split([len(seen.pictures) for seen in samples])
        for seen, own in zip(samples, features, strict=True):
            files = {name: content for name, content in seen.raw.files.items() if name != "json"}
            files[TEACHER_EXTENSION] = _npy(own.mean(0).half().numpy())
            yield Record(seen.raw.key, files, seen.facts)


def teach(
    shards: str,
    out: Path,
    *,
    siglip2: str | None = None,
    pictures: int = 8,
    device: str = "cpu",
    workers: int = 1,
    console: Console | None = None,
) -> ShardSet:
    """Write a set again with `KEY.teacher.npy` beside every sample, or what an earlier run left to write of it.

    Args:
        shards: a folder, manifest, tar or pattern of pictures, videos or assets, as `read_set` takes it.
        out: folder for the result.
        siglip2, pictures, device: as in `Teacher`.
        workers: processes.

    Raises:
        InputError: nothing to read, latents, `out` holds something else, weights that are not there, or a shard that
            cannot be reached now (those that are finished stay).
    """
    found = read_set(shards, console=console)
    if found.kind == "latents":
        raise InputError(f"{shards}: holds latents; teach the shards that they were made from")
    name = _network(siglip2, device).name  # which refuses what is not installed before anything is written
    facts: dict[str, Any] = {**found.facts, "teacher": name, "teacher_pictures": pictures}
    make = Teacher(found.kind, siglip2, pictures, device)
    return write_set(
        out, found.kind, found.shards, make, jobs_per_shard=1, workers=workers, facts=facts, console=console
    )


@functools.cache
def _network(siglip2: str | None, device: str) -> ImageNetwork:
    return make_image_network(siglip2, device)


def _samples(shard: Shard) -> Iterator[Raw | SampleError]:
    """The samples of a shard, and what is wrong with those that cannot be read.

    Raises:
        SampleError: "unreachable shard": it may be there later, so nothing is to be concluded from its absence.
    """
    start = 0
    while True:
        try:
            for raw in read_shard(shard.url, start, shard.samples):
                yield raw
                start = raw.index + 1
            return
        except SampleError as error:
            if error.cause == UNREACHABLE:
                raise
            yield error
            if error.cause not in SINGLE:
                return
            start += 1


def _pictures(raw: Raw, kind: Kind, count: int) -> Iterator[Tensor]:
    """[H, W, 3] in [-1, 1], one at a time."""
    if kind == "assets":
        yield from _views(raw, count)
        return
    content = next((raw.files[e] for e in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS) if e in raw.files), None)
    if content is None:
        raise SampleError("no such content", f"{raw.id}: holds neither a picture nor a video")
    if kind == "images":
        yield _signed(read_picture(content, raw.id, _whole))
        return
    for frame in read_clip(content, raw.id, _whole, lambda times: _spread(len(times), count)):
        yield _signed(frame)


def _views(raw: Raw, count: int) -> Iterator[Tensor]:
    stored = decode_voxels(raw.files, raw.facts(), raw.id)
    chosen = _spread(len(stored.seen), count)
    pictures = decode_views(raw.files, stored, chosen, raw.id).pictures.float() / 255
    colours, alpha = pictures[..., :3], pictures[..., 3:]
    yield from 2 * (colours * alpha + (1 - alpha)) - 1


def _spread(total: int, count: int) -> list[int]:
    """`count` numbers below `total`, evenly spread, or all."""
    count = min(count, total)
    return [number * total // count for number in range(count)]


def _whole(size: Size) -> View:
    return View(resized=size, corner=(0, 0), size=size)


def _signed(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels).float() / 127.5 - 1


def _npy(values: NDArray[np.float16]) -> bytes:
    written = io.BytesIO()
    np.save(written, values, allow_pickle=False)
    return written.getvalue()
