"""One sample, looked at: what it measures and, where it is wanted, a small picture of it.

Pictures are decoded to their end, so that damage shows; of clips only three frames are, the first, middle and last;
of assets the voxels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.decode.assets import StoredVoxels, decode_views, decode_voxels
from data.decode.images import read_picture
from data.decode.videos import read_clip
from data.latents.format import LatentItem, decode_latents
from data.mixture import Task
from data.resolution import Size, View, token_count
from data.samples import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    VIEWS_EXTENSION,
    Item,
    Kind,
    Raw,
    SampleError,
)
from tokenizer.errors import InputError
from tokenizer.patches import PATCH_SIZE

_TASKS: dict[Kind, Task] = {
    "images": Task.IMAGE_RECONSTRUCTION,
    "videos": Task.VIDEO_RECONSTRUCTION,
    "assets": Task.ASSET_RECONSTRUCTION,
    "latents": Task.IMAGE_RECONSTRUCTION,
}
_UNSEEN: Size = (16, 16)
"""Size to which pictures are reduced that nobody will look at."""

STILLS = 3
"""Frames of a clip that are shown side by side."""

Picture = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Look:
    """A sample -> an item whose facts are what it measures ("height", "seconds", "voxels", "label", ...).

    kind: of the samples.
    shown: shard and number of the samples of which a picture is wanted; `pixels` of the item, uint8 [H, W, 3].
    box: rows and columns that it has to fit.
    """

    kind: Kind
    shown: frozenset[tuple[str, int]]
    box: Size

    def __call__(self, raw: Raw, epoch: int) -> Item:  # noqa: ARG002 - looks the same in every epoch
        """Look at one sample.

        Raises:
            SampleError: whatever is wrong with it; causes as from `data.decode.decoder.Decoder`.
        """
        try:
            words: dict[str, Any] = {"caption": raw.caption(), "label": raw.label()}
        except InputError as error:
            raise SampleError("damaged caption or facts", str(error)) from None
        caption = words.pop("caption")
        if caption is not None:
            words |= {"caption_characters": len(caption), "caption_words": len(caption.split())}
        words["shown"] = shown = (raw.shard, raw.index) in self.shown
        measures, picture = self._measured(raw, shown)
        pixels = None if picture is None else torch.from_numpy(np.ascontiguousarray(picture))
        tokens = int(measures["tokens"])
        task = _TASKS[self.kind]
        return Item(raw.id, "show", task, tokens, pixels=pixels, caption=caption, facts={**words, **measures})

    def _measured(self, raw: Raw, shown: bool) -> tuple[dict[str, Any], Picture | None]:
        if self.kind == "latents":
            latents = decode_latents(raw)
            return {"tokens": len(latents.positions)}, _false_colours(latents) if shown else None
        if self.kind == "assets":
            stored = decode_voxels(raw.files, raw.facts(), raw.id)
            picture = _first_view(raw, stored) if shown else None
            return {"tokens": len(stored.features), "voxels": len(stored.features)}, picture
        measure = _picture if self.kind == "images" else _clip
        return measure(raw, self.box if shown else _UNSEEN)


def _picture(raw: Raw, box: Size) -> tuple[dict[str, Any], Picture]:
    sizes: list[Size] = []
    picture = read_picture(_content(raw, IMAGE_EXTENSIONS), raw.id, lambda size: _fitting(size, box, sizes))
    height, width = sizes[-1]
    return _sides(height, width) | {"tokens": max(1, token_count((height, width)))}, picture


def _clip(raw: Raw, box: Size) -> tuple[dict[str, Any], Picture]:
    sizes: list[Size] = []
    measures: dict[str, Any] = {}

    def choose(times: NDArray[np.float64]) -> list[int]:
        count = len(times)
        step = float(np.median(np.diff(times))) if count > 1 else 0.0
        measures.update(frames=count, seconds=float(times[-1] - times[0]) + step)
        measures.update({"frames_per_second": 1 / step} if step > 0 else {})
        return [round(number * (count - 1) / (STILLS - 1)) for number in range(STILLS)]

    part = (box[0], box[1] // STILLS)
    frames = read_clip(_content(raw, VIDEO_EXTENSIONS), raw.id, lambda size: _fitting(size, part, sizes), choose)
    height, width = sizes[-1]
    tokens = max(1, token_count((height, width), measures["frames"], PATCH_SIZE))
    return _sides(height, width) | measures | {"tokens": tokens}, np.concatenate(list(frames), axis=1)


def _content(raw: Raw, extensions: tuple[str, ...]) -> bytes:
    for extension in extensions:
        if extension in raw.files:
            return raw.files[extension]
    raise SampleError(
        "no such content", f"{raw.id}: needs one of {', '.join(extensions)}; holds {', '.join(raw.files)}"
    )


def _fitting(size: Size, box: Size, seen: list[Size]) -> View:
    """The whole picture, reduced to fit; notes how large it was."""
    seen.append(size)
    factor = min(1.0, box[0] / size[0], box[1] / size[1])
    resized = (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))
    return View(resized=resized, corner=(0, 0), size=resized)


def _sides(height: int, width: int) -> dict[str, Any]:
    return {"height": height, "width": width, "aspect": width / height}


def _first_view(raw: Raw, stored: StoredVoxels) -> Picture | None:
    """On white; None where the set keeps no views."""
    if VIEWS_EXTENSION not in raw.files or not len(stored.seen):
        return None
    rgba = decode_views(raw.files, stored, [0], raw.id).pictures[0].numpy().astype(np.float32)
    alpha = rgba[..., 3:] / 255
    return (rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def _false_colours(latents: LatentItem) -> Picture:
    """Three numbers of each token as its colour, seen along t and z; where several tokens meet, the first one's."""
    values = latents.mean if latents.mean is not None else latents.indices
    assert values is not None
    channels = values.float()[:, [0, 1 % values.shape[1], 2 % values.shape[1]]]
    low, high = channels.amin(dim=0), channels.amax(dim=0)
    colours = ((channels - low) / (high - low).clamp_min(1e-6) * 255).round().to(torch.uint8)
    places = latents.positions[:, 1:3].numpy()
    rows, columns = (places - places.min(axis=0)).T
    picture: Picture = np.full((rows.max() + 1, columns.max() + 1, 3), 255, dtype=np.uint8)
    # Backwards: the first token of a place is written last.
    picture[rows[::-1], columns[::-1]] = colours.numpy()[::-1]
    return picture
