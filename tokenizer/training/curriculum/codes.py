"""Patches for fitting the linear codes of small models (`tokenizer.training.initialise`), taken from training batches.

Codes of stills and codes of clips are fitted apart. A stage that trains on pictures alone has no clips yet: there a
picture seen by a moving camera stands in, which is what most short clips look like.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.patches import PatchSize, patchify, tokens_to_pixels
from tokenizer.training.curriculum.tasks import IMAGE_RECONSTRUCTION, VIDEO_RECONSTRUCTION
from tokenizer.training.feeding import StepBatch

NEIGHBOURS = 4
"""Patches along each side of a place; 16 in all."""

PLACES_OF_ITEM = 2
"""Places that are looked at in one picture or clip, at most: codes fitted to a few places of many crops fit new
pictures better than to many places of a few."""

_PATIENCE = 100
"""Batches that are looked at for one place of each sort."""

FASTEST = 2
"""Pixels that a moving camera moves between two frames, at most, along each axis."""


def sample_patches(batches: Iterable[StepBatch], count: int, patch_size: PatchSize, seed: int) -> tuple[Tensor, Tensor]:
    """Patches of neighbouring places, in [-1, 1].

    Args:
        batches: of any tasks; those of image and video reconstruction are used, as many as needed.
        count: patches of each sort.

    Returns:
        Stills [count / 16, 16, P / Pt] and clips [count / 16, 16, P].

    Raises:
        InputError: the batches end, or go on for long, before there are enough places.
    """
    rng = np.random.default_rng((seed, 1))
    places = count // NEIGHBOURS**2
    stills: list[Tensor] = []
    clips: list[Tensor] = []
    moved: list[Tensor] = []
    for number, batch in enumerate(batches):
        if batch.task in (IMAGE_RECONSTRUCTION, VIDEO_RECONSTRUCTION):
            for frames in tokens_to_pixels(batch.tokens(patch_size=patch_size), None, patch_size):
                _look(rng, frames, batch.task == VIDEO_RECONSTRUCTION, patch_size, (stills, clips, moved))
        enough = len(clips) >= places or (not clips and len(moved) >= places)
        # Where pictures or clips are all too small there would be no end of looking.
        fewest = min(len(stills), len(clips) + len(moved))
        if (len(stills) >= places and enough) or number > _PATIENCE * min(places, 1 + fewest):
            break
    found = clips if len(clips) >= places else clips + moved
    if len(stills) < places or len(found) < places:
        raise InputError(
            f"linear codes need {places} places of {NEIGHBOURS} x {NEIGHBOURS} patches in pictures and in clips; the "
            f"data gave {len(stills)} and {len(found)}: lower start.patches, allow larger crops or leave out refit"
        )
    return torch.stack(stills[:places]), torch.stack(found[:places])


def _look(
    rng: np.random.Generator,
    frames: Tensor,
    is_clip: bool,
    patch_size: PatchSize,
    into: tuple[list[Tensor], list[Tensor], list[Tensor]],
) -> None:
    """Add random places of one picture or clip [T, H, W, 3] to stills, clips and moved pictures."""
    stills, clips, moved = into
    steps, *patch = patch_size
    sides = [NEIGHBOURS * side for side in patch]
    height, width = frames.shape[1:3]
    room = FASTEST * (steps - 1)
    for _ in range(PLACES_OF_ITEM):
        if height < sides[0] or width < sides[1]:
            return
        row, column = (int(rng.integers(have - side + 1)) for have, side in zip((height, width), sides, strict=True))
        window = frames[:, row : row + sides[0], column : column + sides[1]]
        if is_clip:
            start = int(rng.integers(len(frames) // steps)) * steps
            clips.append(patchify(window[start : start + steps], patch_size))
            continue
        stills.append(patchify(window[:1], (1, *patch_size[1:])))
        if height >= sides[0] + room and width >= sides[1] + room:
            moved.append(patchify(_moving(rng, frames[0], sides, steps, room), patch_size))


def _moving(rng: np.random.Generator, picture: Tensor, sides: list[int], steps: int, room: int) -> Tensor:
    """A window [steps, h, w, 3] that moves over a picture [H, W, 3] at a constant speed."""
    speed = rng.integers(-FASTEST, FASTEST + 1, 2)
    start = [
        int(rng.integers(have - side - room + 1)) + (room if v < 0 else 0)
        for have, side, v in zip(picture.shape[:2], sides, speed.tolist(), strict=True)
    ]
    corners = [[first + int(v) * step for first, v in zip(start, speed, strict=True)] for step in range(steps)]
    return torch.stack([picture[r : r + sides[0], c : c + sides[1]] for r, c in corners])
