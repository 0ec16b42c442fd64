"""Assets as a model that understands them sees them in training: turned, stretched, in other colours.

A few hundred assets are learned by heart unless they are never seen twice the same. Everything is drawn from the run's
seed, the epoch and the sample's name, so that a resumed run sees the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data.resolution import draws

_GAIN, _SHIFT = 0.4, 0.15
"""Of a colour channel about its middle: by up to e^0.4 and back, and by 15 % of the range."""


def turn(coordinates: Tensor, seed: int, epoch: int, name: str) -> Tensor:
    """Coordinates [N, 3] of an asset whose vertical axis is the last, in one of eight ways inside its own box."""
    x, y, z = coordinates.unbind(1)
    ways = [int(2 * u) for u in draws("turn", seed, epoch, name, 3)]
    x, y = (x.min() + x.max() - x if ways[0] else x), (y.min() + y.max() - y if ways[1] else y)
    return torch.stack([y, x, z] if ways[2] else [x, y, z], dim=1)


def stretch(coordinates: Tensor, most: float, seed: int, epoch: int, name: str) -> tuple[Tensor, Tensor]:
    """Other proportions: each axis grows or shrinks, and the longest side of the box stays as long as it was.

    Args:
        coordinates: integer [N, 3], each once.
        most: every axis by a factor between 1 / (1 + most) and 1 + most, before the box is fitted.

    Returns:
        Which rows stay, int64 [M] in rising order: of those that fall on one place, one by lot; and their new
        coordinates [M, 3], each once, of the same dtype and inside the cube about the old box.
    """
    *factors, lot = draws("stretch", seed, epoch, name, 4)
    scale = torch.tensor([(1 + most) ** (2 * u - 1) for u in factors], dtype=torch.float64)
    low, high = coordinates.amin(0).double(), coordinates.amax(0).double()
    sides = (high - low) * scale
    scale *= float((high - low).max()) / max(float(sides.max()), 1.0)
    middle = (low + high) / 2
    moved = (middle + (coordinates.double() - middle) * scale).round().to(torch.int64)
    # A side that became the longest may stick out of the cube that the old box lay in.
    moved = moved - moved.amin(0).clamp(max=0)
    moved = (moved - (moved.amax(0) - int(high.max())).clamp(min=0)).clamp(min=0)
    order = torch.randperm(len(moved), generator=torch.Generator().manual_seed(int(lot * 2**53)))
    # One number for a place: rows are compared much slower.
    side = int(moved.max()) + 1
    numbers = (moved[:, 0] * side + moved[:, 1]) * side + moved[:, 2]
    _, places = numbers[order].unique(return_inverse=True)
    first = torch.full((int(places.max()) + 1,), len(moved), dtype=torch.int64)
    first.scatter_reduce_(0, places, torch.arange(len(moved)), "amin")
    kept = order[first].sort().values
    return kept, moved[kept].to(coordinates.dtype)


def recolour(features: Tensor, share: float, seed: int, epoch: int, name: str) -> Tensor:
    """Other colours in a share of the epochs: channels change places, lightness and contrast of each change.

    Args:
        features: uint8 [N, P], pixels of three colours. Black pixels stay so: black is what lies around an asset.
        share: of the epochs.
    """
    chosen, lot = draws("recolour", seed, epoch, name, 2)
    if chosen >= share:
        return features
    generator = torch.Generator().manual_seed(int(lot * 2**53))
    channels = torch.randperm(3, generator=generator)
    drawn = 2 * torch.rand(2, 3, generator=generator) - 1
    # 256 values of three channels, instead of every pixel's arithmetic.
    levels = torch.arange(256, dtype=torch.float32)[:, None] / 255
    table = (levels - 0.5) * torch.exp(_GAIN * drawn[0]) + 0.5 + _SHIFT * drawn[1]
    table = (255 * table).round().clamp(0, 255).to(torch.uint8)
    pixels = features.unflatten(1, (-1, 3))
    changed = torch.stack([table[:, k][pixels[..., int(channels[k])].int()] for k in range(3)], dim=-1)
    return torch.where((pixels > 0).any(dim=-1, keepdim=True), changed, pixels).flatten(1)


def check(stretched: float, recoloured: float) -> str:
    """What is wrong with the settings, or ""."""
    if not (math.isfinite(stretched) and 0 <= stretched <= 1):
        return f"stretched must lie in 0..1, got {stretched:g}"
    if not 0 <= recoloured <= 1:
        return f"recoloured must lie in 0..1, got {recoloured:g}"
    return ""
