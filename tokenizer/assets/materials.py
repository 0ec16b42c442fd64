"""Materials and pictures of asset files as `Material` and `Texture`, and remarks about those that cannot be read.

A missing or damaged picture never stops an asset: its material keeps the plain colour, and the reader gets a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenizer.assets.files import MissingFileError, shortened
from tokenizer.assets.mesh import Floats, Material, Texture
from tokenizer.errors import InputError
from tokenizer.media.images import DECODING_ERRORS, MAX_PIXELS, open_image

_MAX_WARNINGS: Final = 10


class AssetWarning(UserWarning):
    """Something of an asset was left out: a picture that is missing, a material that is not defined."""


@dataclass
class Remarks:
    """Collects what an asset lacks, each thing once; `give` turns it into warnings."""

    name: str
    _lines: dict[str, None] = field(default_factory=dict)

    def add(self, line: str) -> None:
        self._lines[line] = None

    def give(self) -> None:
        for line in list(self._lines)[:_MAX_WARNINGS]:
            warnings.warn(f"{self.name}: {line}", AssetWarning, stacklevel=4)
        if len(self._lines) > _MAX_WARNINGS:
            more = len(self._lines) - _MAX_WARNINGS
            warnings.warn(f"{self.name}: and {more} more remarks like these", AssetWarning, stacklevel=4)


@dataclass(frozen=True, slots=True)
class Skin:
    """A material as its file describes it.

    uv_matrix: [2, 3]; turns the texture coordinates (u, v, 1) of the file, v up, into those of the texture.
    uv_set: which texture coordinates of the file.
    """

    material: Material
    uv_matrix: Floats | None = None
    uv_set: int = 0


PLAIN: Final = Skin(Material())
"""The grey of what has no material."""

WHITE: Final = Skin(Material((1.0, 1.0, 1.0, 1.0)))
"""Leaves the colours of corners as they are."""


class Pictures:
    """Pictures of one asset, each decoded once, all together below `max_pixels`."""

    def __init__(self, remarks: Remarks, max_pixels: int = MAX_PIXELS) -> None:
        self._remarks = remarks
        self._left = max_pixels
        self._known: dict[object, NDArray[np.uint8] | None] = {}

    def get(self, key: object, label: str, read: Callable[[], bytes]) -> NDArray[np.uint8] | None:
        """uint8 [H, W, 4] of the picture that `read` returns in its encoded form, or None after a remark."""
        if key not in self._known:
            try:
                self._known[key] = self._decode(read())
            except MissingFileError as error:
                self._remarks.add(f"texture {error}; the plain colour of its material is used")
                self._known[key] = None
            except (InputError, *DECODING_ERRORS) as error:
                reason = shortened(str(error))
                self._remarks.add(f"texture '{label}' cannot be used ({reason}); the plain colour is used")
                self._known[key] = None
        return self._known[key]

    def _decode(self, encoded: bytes) -> NDArray[np.uint8]:
        image = open_image(encoded)
        count = image.width * image.height
        if count > self._left:
            raise InputError("the textures of this asset have too many pixels together")
        pixels = _rgba(image)
        self._left -= count
        return pixels


def _rgba(image: Image.Image) -> NDArray[np.uint8]:
    image.load()
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError("32-bit pixels of unknown range")
    return np.array(image.convert("RGBA"))


def linear_to_display(values: Floats) -> Floats:
    """Linear light -> display values, both nominally 0..1, by the sRGB curve (IEC 61966-2-1)."""
    clipped = np.clip(np.nan_to_num(values), 0, 1)
    curve = 1.055 * np.power(clipped, 1 / 2.4) - 0.055
    return np.where(clipped <= 0.0031308, 12.92 * clipped, curve)


def alpha_mode(alpha: float, texture: Texture | None) -> Literal["opaque", "mask", "blend"]:
    """What a file without a say in it (MTL, PLY) means: cut-outs are cut, half-transparent things blend."""
    if alpha < 1:
        return "blend"
    if texture is None:
        return "opaque"
    levels = np.unique(texture.pixels[..., 3])
    if levels[0] == 255:
        return "opaque"
    return "mask" if np.isin(levels, (0, 255)).all() else "blend"
