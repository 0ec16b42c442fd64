"""Materials and pictures of asset files as `Material` and `Texture`, and remarks about those that cannot be read.

A missing or damaged picture never stops an asset: its material keeps the plain colour, and the reader gets a warning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenizer.assets.files import AssetFiles, MissingFileError, shortened
from tokenizer.assets.mesh import Floats, Material, Texture, Wrap
from tokenizer.errors import InputError
from tokenizer.media.images import DECODING_ERRORS, MAX_PIXELS, open_image

_MAX_WARNINGS: Final = 10

# How many values follow an option of a map_ line; those not listed take one.
_MAP_OPTIONS: Final = {"-mm": 2, "-o": 3, "-s": 3, "-t": 3}


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


# ---------------------------------------------------------------------- MTL


def read_mtl(text: str, files: AssetFiles, pictures: Pictures, wanted: Container[str]) -> dict[str, Skin]:
    """The wanted materials of a Wavefront MTL file by name.

    `Kd` is taken as display value and multiplies the texture; a black `Kd` beside a texture does not (exporters write
    it where they mean that the texture alone counts). `d` goes before `Tr`, which some exporters write upside down.
    """
    return {name: _mtl_skin(entries, files, pictures) for name, entries in _mtl_entries(text) if name in wanted}


def _mtl_entries(text: str) -> Iterator[tuple[str, dict[str, list[str]]]]:
    name, entries = "", dict[str, list[str]]()
    for line in text.splitlines():
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if words[0].lower() == "newmtl":
            if entries:
                yield name, entries
            name, entries = line.strip()[len("newmtl") :].strip(), {"newmtl": []}
        else:
            key = words[0].lower()
            # File names may hold spaces, even several in a row: the rest of the line stays as it is.
            entries[key] = [line.strip()[len(key) :].strip()] if key.startswith("map_") else words[1:]
    if entries:
        yield name, entries


def _mtl_skin(entries: dict[str, list[str]], files: AssetFiles, pictures: Pictures) -> Skin:
    colour = _numbers(entries.get("kd", []))
    red, green, blue = (colour * 3)[:3] if len(colour) in (1, 3) else Material().colour[:3]
    alpha = 1.0
    if opacity := _numbers(entries.get("d", [])[-1:]):
        alpha = opacity[0]
    elif transparency := _numbers(entries.get("tr", [])[-1:]):
        alpha = 1 - transparency[0]

    texture, matrix = _mtl_texture(entries, files, pictures)
    if texture is not None and "map_kd" in entries and max(red, green, blue) == 0:
        red = green = blue = 1.0
    clip = [min(max(value, 0.0), 1.0) for value in (red, green, blue, alpha)]
    material = Material((clip[0], clip[1], clip[2], clip[3]), texture, alpha_mode(clip[3], texture))
    return Skin(material, matrix)


def _mtl_texture(
    entries: dict[str, list[str]], files: AssetFiles, pictures: Pictures
) -> tuple[Texture | None, Floats | None]:
    """The colour map with the opacity map as its alpha, and the matrix of texture coordinates."""

    def picture(key: str) -> tuple[NDArray[np.uint8] | None, dict[str, list[str]]]:
        if key not in entries:
            return None, {}
        name, options = _map_line(entries[key][0])
        return pictures.get(name, name, lambda: files.read(name)), options

    colour, options = picture("map_kd")
    opacity, other_options = picture("map_d")
    if opacity is not None:
        colour, options = _with_opacity(colour, opacity), options or other_options
    if colour is None:
        return None, None
    wrap: Wrap = "clamp" if options.get("-clamp") == ["on"] else "repeat"
    return Texture(colour, wrap, wrap), _map_matrix(options)


def _with_opacity(colour: NDArray[np.uint8] | None, opacity: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # An opacity map is a grey picture, or a picture whose own alpha counts; often it is the colour map once more.
    alpha = opacity[..., 3]
    if (alpha == 255).all() and opacity is not colour:
        alpha = np.asarray(Image.fromarray(opacity).convert("L"))
    if colour is None:
        colour = np.full_like(opacity, 255)
    if alpha.shape != colour.shape[:2]:
        alpha = np.asarray(Image.fromarray(alpha).resize((colour.shape[1], colour.shape[0])))
    return np.dstack([colour[..., :3], alpha])


def _map_line(line: str) -> tuple[str, dict[str, list[str]]]:
    """'-s 2 2 1 -clamp on wood oak.png' -> the file name and the options."""
    options: dict[str, list[str]] = {}
    rest = line
    while rest.startswith("-"):
        option, *words = rest.split()
        count = _MAP_OPTIONS.get(option.lower(), 1)
        # -o, -s and -t may give fewer than three numbers.
        while count > 1 and not _numbers(words[:count]):
            count -= 1
        options[option.lower()] = words[:count]
        pieces = rest.split(maxsplit=count + 1)
        rest = pieces[count + 1] if len(pieces) > count + 1 else ""
    return rest, options


def _map_matrix(options: dict[str, list[str]]) -> Floats | None:
    scale = [*_numbers(options.get("-s", [])), 1.0, 1.0][:2]
    offset = [*_numbers(options.get("-o", [])), 0.0, 0.0][:2]
    if scale == [1.0, 1.0] and offset == [0.0, 0.0]:
        return None
    return np.array([[scale[0], 0, offset[0]], [0, scale[1], offset[1]]])


def _numbers(words: Sequence[str]) -> list[float]:
    """The words as finite numbers, or nothing if one of them is not."""
    try:
        values = [float(word) for word in words]
    except ValueError:
        return []
    return values if all(math.isfinite(value) for value in values) else []
