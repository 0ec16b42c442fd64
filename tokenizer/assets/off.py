"""OFF (Geomview): vertices and polygons as text, with colours of either."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenizer.assets.materials import PLAIN, WHITE
from tokenizer.assets.mesh import Floats
from tokenizer.assets.polygons import Polygons, cut_polygons
from tokenizer.assets.shapes import Shape, Source
from tokenizer.assets.text import as_utf8, display_colours, pieces, rows
from tokenizer.errors import InputError

# The letters announce texture coordinates, colours, normals and a fourth coordinate. The columns of a vertex are
# x y z [w] [normal 3] [colour] [texture 2].
_KEYWORD: Final = re.compile(rb"(ST)?(C)?(N)?(4)?OFF\b *(BINARY)?")
_LINES_AT_ONCE: Final = 100_000


def read_off(data: bytes, source: Source) -> Shape:
    """The triangles of an OFF file.

    Raises:
        InputError: too many faces, or the binary variant.
        ValueError: cut off, not OFF, or a face that refers to a vertex that does not exist.
    """
    text = as_utf8(data).lstrip()
    match = _KEYWORD.match(text)
    if match is None:
        raise ValueError("it does not begin with OFF")
    if match[5]:
        raise InputError(f"{source.files.name}: is binary OFF, only text can be read; convert it")
    lines = _lines(text[match.end() :])
    vertex_count, face_count = (int(word) for word in next(lines, b"").split()[:2])
    # Every line needs a few bytes: what the header promises has to fit into the file.
    if min(vertex_count, face_count) < 0 or 2 * (vertex_count + face_count) > len(text):
        raise ValueError(
            f"its header promises {vertex_count} vertices and {face_count} faces, which the file cannot hold"
        )
    source.check_faces(face_count)

    vertices = _vertices(lines, vertex_count)
    before = 3 + bool(match[4]) + 3 * bool(match[3])
    after = 2 * bool(match[1])
    vertex_colours = vertices[:, before : vertices.shape[1] - after] if match[2] else np.empty((0, 0))
    polygons, face_colours = _faces(lines, face_count, source)
    triangles = cut_polygons(polygons, vertices[:, :3])
    colours = None
    if vertex_colours.shape[1] in (3, 4):
        colours = display_colours(vertex_colours)[triangles.faces]
    elif not np.isnan(face_colours).all():
        colours = np.repeat(display_colours(face_colours)[triangles.polygons, None], 3, axis=1)
    return Shape(
        vertices=vertices[:, :3],
        faces=triangles.faces,
        face_skins=np.zeros(len(triangles.faces), np.int64),
        skins=(PLAIN if colours is None else WHITE,),
        colours=colours,
    )


def _lines(text: bytes) -> Iterator[bytes]:
    """Lines with something in them, without comments."""
    for piece in pieces(text):
        for line in piece.split(b"\n"):
            if content := line.partition(b"#")[0].strip():
                yield content


def _vertices(lines: Iterator[bytes], count: int) -> Floats:
    parts: list[Floats] = []
    while count > 0:
        some = list(islice(lines, min(count, _LINES_AT_ONCE)))
        if not some:
            raise ValueError(f"the file ends {count} vertices too early")
        parts.append(rows(some, 3))
        count -= len(some)
    # Lines of different lengths leave columns that cannot be told apart: positions are what they share.
    width = min((part.shape[1] for part in parts), default=3)
    return np.concatenate([np.empty((0, width)), *(part[:, :width] for part in parts)])


def _faces(lines: Iterator[bytes], count: int, source: Source) -> tuple[list[Polygons], Floats]:
    """The polygons, and [count, 4] colours of theirs, NaN where there is none."""
    polygons: list[Polygons] = []
    colours = np.full((count, 4), np.nan)
    triangles = done = 0
    while done < count:
        groups: dict[tuple[int, int], list[tuple[int, bytes]]] = defaultdict(list)
        some = list(islice(lines, min(count - done, _LINES_AT_ONCE)))
        if not some:
            raise ValueError(f"the file ends {count - done} faces too early")
        for number, line in enumerate(some, start=done):
            corners, words = int(line.split(maxsplit=1)[0]), len(line.split())
            if not 0 <= corners < words:
                raise ValueError(f"face {number + 1} promises {corners} corners and has {words - 1} numbers")
            groups[corners, words].append((number, line))
            triangles += max(corners - 2, 0)
        source.check_faces(triangles)
        for (corners, words), group in groups.items():
            table = rows([line for _, line in group], words)
            numbers: NDArray[np.int64] = np.array([number for number, _ in group])
            polygons.append(Polygons(table[:, 1 : corners + 1].astype(np.int64), numbers))
            # One number is the row of a colour table that the file does not have.
            if words - corners - 1 in (3, 4):
                colours[numbers, : words - corners - 1] = table[:, corners + 1 :]
        done += len(some)
    return polygons, colours
