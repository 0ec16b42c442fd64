"""Wavefront MTL: the materials of OBJ files."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from functools import partial
from typing import Final

import numpy as np

from tokenizer.assets.files import AssetFiles
from tokenizer.assets.materials import Pictures, Skin
from tokenizer.assets.mesh import Floats, Material, Texture, Wrap

# How many values follow an option of a map_ line; those not listed take one.
_MAP_OPTIONS: Final = {"-mm": 2, "-o": 3, "-s": 3, "-t": 3}


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

    texture, matrix = _texture(entries, files, pictures)
    if texture is not None and "map_kd" in entries and max(red, green, blue) == 0:
        red = green = blue = 1.0
    clip = [min(max(value, 0.0), 1.0) for value in (red, green, blue, alpha)]
    material = Material((clip[0], clip[1], clip[2], clip[3]), texture, pictures.alpha_mode(clip[3], texture))
    return Skin(material, matrix)


def _texture(
    entries: dict[str, list[str]], files: AssetFiles, pictures: Pictures
) -> tuple[Texture | None, Floats | None]:
    """The colour map with the opacity map as its alpha, and the matrix of texture coordinates."""
    maps = {key: _map_line(entries[key][0]) for key in ("map_kd", "map_d") if key in entries}
    found = {key: pictures.get(name, name, partial(files.read, name)) for key, (name, _) in maps.items()}
    pixels, opacity = found.get("map_kd"), found.get("map_d")
    if opacity is not None:
        pixels = pictures.with_opacity(("opacity", *(name for name, _ in maps.values())), pixels, opacity)
    if pixels is None:
        return None, None
    options = next(iter(maps.values()))[1]
    wrap: Wrap = "clamp" if options.get("-clamp") == ["on"] else "repeat"
    return Texture(pixels, wrap, wrap), _map_matrix(options)


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
