"""Textures as mip maps: bilinear samples at the level where a texel is about as large as a pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenizer.assets.mesh import Texture, Wrap

Floats = NDArray[np.float32]


class MipMaps:
    """A texture and its halved copies, float32 in 0..1.

    Colours are halved weighted by alpha, so that what lies hidden under transparent texels does not bleed.
    """

    def __init__(self, texture: Texture) -> None:
        self._wraps = (texture.wrap_u, texture.wrap_v)
        self._levels: list[Floats] = [texture.pixels.astype(np.float32) / np.float32(255)]
        while min(self._levels[-1].shape[:2]) > 1:
            self._levels.append(_halved(self._levels[-1]))

    def sample(self, uv: NDArray[np.floating[Any]], texels: Floats) -> Floats:
        """Colours [P, 4].

        Args:
            uv: [P, 2], v up, of any size.
            texels: [P] texels of the full texture that one pixel spans.
        """
        level = np.log2(np.maximum(texels, 1e-6)).round().astype(np.int64).clip(0, len(self._levels) - 1)
        colours = np.empty((len(uv), 4), dtype=np.float32)
        for number in np.unique(level):
            rows = np.nonzero(level == number)[0]
            colours[rows] = self._bilinear(self._levels[number], uv[rows])
        return colours

    def _bilinear(self, pixels: Floats, uv: NDArray[np.floating[Any]]) -> Floats:
        height, width = pixels.shape[:2]
        uv = np.nan_to_num(uv.astype(np.float64), posinf=0.0, neginf=0.0)
        x, y = uv[:, 0] * width - 0.5, (1 - uv[:, 1]) * height - 0.5
        left, top = np.floor(x), np.floor(y)
        right_share, low_share = (x - left)[:, None].astype(np.float32), (y - top)[:, None].astype(np.float32)
        (x0, x1), (y0, y1) = (
            (_wrapped(first, side, wrap), _wrapped(first + 1, side, wrap))
            for first, side, wrap in ((left, width, self._wraps[0]), (top, height, self._wraps[1]))
        )
        upper = pixels[y0, x0] * (1 - right_share) + pixels[y0, x1] * right_share
        lower = pixels[y1, x0] * (1 - right_share) + pixels[y1, x1] * right_share
        mixed: Floats = upper * (1 - low_share) + lower * low_share
        return mixed


def _wrapped(index: NDArray[np.floating[Any]], side: int, wrap: Wrap) -> NDArray[np.int64]:
    """Texel numbers brought into 0..side - 1."""
    if wrap == "clamp":
        return index.clip(0, side - 1).astype(np.int64)
    if wrap == "mirror":
        folded = np.mod(index, 2 * side)
        index = np.where(folded < side, folded, 2 * side - 1 - folded)
    else:
        index = np.mod(index, side)
    return index.astype(np.int64)


def _halved(pixels: Floats) -> Floats:
    """Half as many rows and columns (rounded down, at least one), each the mean of those it covers."""
    for axis in (0, 1):
        side = pixels.shape[axis]
        if side == 1:
            continue
        even = np.take(pixels, np.arange(0, side - side % 2, 2), axis)
        odd = np.take(pixels, np.arange(1, side, 2), axis)
        alpha = even[..., 3:] + odd[..., 3:]
        mixed = (even[..., :3] * even[..., 3:] + odd[..., :3] * odd[..., 3:]) / np.maximum(alpha, 1e-6)
        plain = (even[..., :3] + odd[..., :3]) / 2
        pixels = np.concatenate([np.where(alpha > 1e-6, mixed, plain), alpha / 2], axis=-1)
    return pixels
