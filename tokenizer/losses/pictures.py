"""Pictures as the perceptual losses look at them: 224x224, by interpolation (PAPER 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.errors import InputError

SIDE = 224
"""Pixels of the paper's square."""


def squares(pictures: Sequence[Tensor], side: int = SIDE) -> Tensor:
    """Pictures of any sizes in one batch of squares, differentiable.

    Bilinear and antialiased, without keeping the aspect ratio: every pixel has a say, and a gradient.

    Args:
        pictures: each [H, W, 3] floating, in [-1, 1], as `tokenizer.patches.tokens_to_pixels` gives a still's frame.
        side: pixels of the squares.

    Returns:
        [n, 3, side, side] float32 (float64 for float64), not clamped.

    Raises:
        InputError: no picture, or another shape.
    """
    if not pictures:
        raise InputError("there is no picture to compare; give at least one [H, W, 3]")
    resized = []
    for picture in pictures:
        if picture.ndim != 3 or picture.shape[2] != 3 or not picture.is_floating_point():
            raise InputError(f"a picture must be floating [H, W, 3], got {picture.dtype} {list(picture.shape)}")
        # Antialiasing is not implemented for half types on a CPU.
        wide = picture if picture.dtype == torch.float64 else picture.float()
        channels_first = wide.permute(2, 0, 1)[None]
        if channels_first.shape[2:] != (side, side):
            channels_first = F.interpolate(channels_first, (side, side), mode="bilinear", antialias=True)
        resized.append(channels_first)
    return torch.cat(resized)
