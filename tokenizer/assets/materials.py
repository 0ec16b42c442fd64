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

Pixels = NDArray[np.uint8] | None
AlphaMode = Literal["opaque", "mask", "blend"]

_MAX_WARNINGS: Final = 10

# Pillow knows more, and starts other programs for some (Ghostscript for EPS); nobody paints an asset with those.
_FORMATS: Final = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TGA", "GIF", "TIFF", "PPM", "DDS", "PCX", "JPEG2000")


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
    """Pictures of one asset, each decoded once, all together of `max_pixels` at most.

    Materials by the thousand may share a picture, so whatever takes time or memory for a picture happens here, once.
    """

    def __init__(self, remarks: Remarks, max_pixels: int = MAX_PIXELS) -> None:
        self._remarks = remarks
        self._left = max_pixels
        self._known: dict[object, Pixels] = {}
        self._alphas: dict[int, AlphaMode] = {}

    def get(self, key: object, label: str, read: Callable[[], bytes]) -> Pixels:
        """uint8 [H, W, 4] of the picture that `read` returns in its encoded form, or None after a remark."""
        return self._once(key, label, lambda: self._decode(read()))

    def with_opacity(self, key: object, colour: NDArray[np.uint8] | None, opacity: NDArray[np.uint8]) -> Pixels:
        """Pixels of `colour`, or white, with those of `opacity` as their alpha; None after a remark.

        A picture of opacity is grey, or it has an alpha of its own that counts. It is resized to the colour.
        """

        def combine() -> NDArray[np.uint8]:
            size = opacity if colour is None else colour
            self._take(size.shape[0] * size.shape[1])
            alpha = opacity[..., 3]
            if opacity is not colour and alpha.min() == 255:
                alpha = np.asarray(Image.fromarray(opacity).convert("L"))
            if alpha.shape != size.shape[:2]:
                alpha = np.asarray(Image.fromarray(alpha).resize((size.shape[1], size.shape[0])))
            return np.dstack([np.full_like(size[..., :3], 255) if colour is None else colour[..., :3], alpha])

        return self._once(key, "with an opacity map", combine)

    def alpha_mode(self, alpha: float, texture: Texture | None) -> AlphaMode:
        """What a file without a say in it (MTL, PLY) means: cut-outs are cut, half-transparent things blend."""
        if alpha < 1:
            return "blend"
        if texture is None:
            return "opaque"
        number = id(texture.pixels)
        if number not in self._alphas:
            self._alphas[number] = _alpha_of(texture.pixels[..., 3])
        return self._alphas[number]

    def _once(self, key: object, label: str, make: Callable[[], NDArray[np.uint8]]) -> Pixels:
        if key not in self._known:
            self._known[key] = None
            try:
                self._known[key] = make()
            except MissingFileError as error:
                self._remarks.add(f"texture {error}; the plain colour of its material is used")
            except (InputError, *DECODING_ERRORS) as error:
                reason = shortened(str(error))
                self._remarks.add(f"texture '{shortened(label)}' cannot be used ({reason}); the plain colour is used")
        return self._known[key]

    def _decode(self, encoded: bytes) -> NDArray[np.uint8]:
        image = open_image(encoded)
        if image.format not in _FORMATS:
            raise InputError(f"{image.format} is not a format of textures")
        self._take(image.width * image.height)
        return _rgba(image)

    def _take(self, pixels: int) -> None:
        if pixels > self._left:
            raise InputError("the textures of this asset have too many pixels together")
        self._left -= pixels


def _alpha_of(alpha: NDArray[np.uint8]) -> AlphaMode:
    if alpha.min() == 255:
        return "opaque"
    return "mask" if ((alpha == 0) | (alpha == 255)).all() else "blend"


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
