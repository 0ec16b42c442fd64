"""Wavefront OBJ: text of any size, read in pieces, so that memory stays near that of the result.

trimesh reads OBJ too, but resolves relative indices against the end of the file, follows the first `mtllib` only, and
cuts concave polygons into fans; furniture has all of that. Faces, texture coordinates, vertex colours and materials are
read; normals, curves, points and lines are passed over.
"""

from __future__ import annotations

import codecs
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenizer.assets.files import MissingFileError, shortened
from tokenizer.assets.materials import Skin
from tokenizer.assets.mesh import Floats, Material
from tokenizer.assets.mtl import read_mtl
from tokenizer.assets.polygons import triangulated
from tokenizer.assets.shapes import Shape, Source
from tokenizer.errors import InputError

_PIECE: Final = 2**22  # bytes of text per piece
_COLUMNS: Final = 6  # of a vertex: position, and red, green, blue in the dialect that has them


def read_obj(data: bytes, source: Source) -> Shape:
    """The triangles of an OBJ file, with the materials of its MTL files.

    Raises:
        InputError: too many faces, or a face that refers to a vertex that does not exist.
        ValueError: text where numbers are due.
    """
    text = _as_utf8(data)
    # Counting is quick: a file with too many faces is refused before it is taken apart.
    source.check_faces(text.count(b"\nf "))
    contents = _Contents()
    for piece in _pieces(text):
        contents.read(piece)
        source.check_faces(contents.triangles)

    vertices = np.concatenate(contents.vertices)
    polygons = _by_corners(contents.polygons)
    for group in polygons:
        _check_range(group, len(vertices), source)
    corners, uv, skins = _triangles(polygons, vertices[:, :3], np.concatenate(contents.uv))
    colours = vertices[:, 3:]
    return Shape(
        vertices=vertices[:, :3],
        faces=corners,
        face_skins=skins,
        skins=_skins(contents, source),
        uv=uv,
        colours=None if np.isnan(colours).all() else _corner_colours(colours, corners),
    )


def _as_utf8(data: bytes) -> bytes:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16", errors="replace").encode()
    data = data.removeprefix(codecs.BOM_UTF8)
    for other, usual in ((b"\r\n", b"\n"), (b"\r", b"\n"), (b"\\\n", b" "), (b"\t", b" ")):
        if other in data:
            data = data.replace(other, usual)
    return data


def _pieces(text: bytes) -> Iterator[bytes]:
    """The text in pieces of whole lines."""
    start = 0
    while start < len(text):
        end = text.find(b"\n", start + _PIECE)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


@dataclass(frozen=True, slots=True)
class _Polygons:
    """P polygons of n corners each.

    vertices: [P, n] rows of the vertices. uv: [P, n] rows of the texture coordinates, -1 for none.
    lines: [P] which face lines of the file they were. skins: [P] numbers of materials.
    """

    vertices: NDArray[np.int64]
    uv: NDArray[np.int64]
    lines: NDArray[np.int64]
    skins: NDArray[np.int64]


@dataclass
class _Contents:
    """What has been read of a file so far."""

    vertices: list[Floats] = field(default_factory=lambda: [np.empty((0, _COLUMNS))])
    uv: list[Floats] = field(default_factory=lambda: [np.empty((0, 2))])
    polygons: list[_Polygons] = field(default_factory=list)
    libraries: dict[str, None] = field(default_factory=dict)
    materials: dict[str, int] = field(default_factory=lambda: {"": 0})  # name -> number; faces may come before any name
    triangles: int = 0
    _skin: int = 0
    _lines: int = 0
    _vertices_read: int = 0
    _uv_read: int = 0

    def read(self, piece: bytes) -> None:
        """Take in some more lines."""
        vertices: list[bytes] = []
        uv: list[bytes] = []
        # Lines with as many corners and as many slashes are turned into numbers together.
        faces: dict[tuple[int, int], list[tuple[bytes, int, int, int, int]]] = defaultdict(list)
        for line in piece.split(b"\n"):
            key, _, rest = line.strip().partition(b" ")
            if key == b"v":
                vertices.append(rest)
            elif key == b"vt":
                uv.append(rest)
            elif key == b"f":
                rest = rest.partition(b"#")[0]
                corners = len(rest.split())
                # Relative indices count back from here.
                seen = self._vertices_read + len(vertices), self._uv_read + len(uv)
                faces[corners, rest.count(b"/")].append((rest, self._lines, self._skin, *seen))
                self._lines += 1
                self.triangles += max(corners - 2, 0)
            elif key == b"usemtl":
                self._skin = self.materials.setdefault(_text(rest), len(self.materials))
            elif key == b"mtllib":
                self.libraries[_text(rest)] = None
        self.vertices.append(_vertex_rows(vertices))
        self.uv.append(_rows(uv, at_least=1)[:, :2] if uv else np.empty((0, 2)))
        self._vertices_read += len(vertices)
        self._uv_read += len(uv)
        self.polygons += [
            _polygons(lines, corners, slashes) for (corners, slashes), lines in faces.items() if corners > 2
        ]


def _text(words: bytes) -> str:
    return words.decode("utf-8", errors="replace").strip()


def _vertex_rows(lines: Sequence[bytes]) -> Floats:
    """[V, 6] positions and colours; NaN where there is no colour."""
    rows = _rows(lines, at_least=3)
    width = rows.shape[1]
    if width == 7:  # position, weight, colour
        rows = np.delete(rows, 3, axis=1)
    elif width < _COLUMNS:  # perhaps a weight; it belongs to curves
        rows = np.pad(rows[:, :3], ((0, 0), (0, _COLUMNS - 3)), constant_values=np.nan)
    return rows[:, :_COLUMNS]


def _rows(lines: Sequence[bytes], at_least: int) -> Floats:
    """[lines, numbers]; short lines are filled up with NaN."""
    rows = [line.partition(b"#")[0].split() for line in lines]
    widths = {len(row) for row in rows} or {at_least}
    width = max(*widths, at_least, 2)
    if len(widths) > 1 or width not in widths:
        rows = [row + [b"nan"] * (width - len(row)) for row in rows]
    return np.fromiter(map(float, chain.from_iterable(rows)), np.float64).reshape(-1, width)


def _polygons(lines: Sequence[tuple[bytes, int, int, int, int]], corners: int, slashes: int) -> _Polygons:
    words, numbers, skins, vertices_seen, uv_seen = zip(*lines, strict=True)
    if slashes % corners:
        words = tuple(map(_evenly, words))
        slashes = 2 * corners
    text = b" ".join(words)
    if slashes:
        text = re.sub(rb"/(?=[/ ]|$)", b"/0", text).replace(b"/", b" ")
    indices = np.fromiter(map(int, text.split()), np.int64).reshape(len(lines), corners, -1)
    return _Polygons(
        vertices=_resolved(indices[..., 0], vertices_seen),
        uv=_resolved(indices[..., 1], uv_seen) if indices.shape[2] > 1 else np.full_like(indices[..., 0], -1),
        lines=np.array(numbers),
        skins=np.array(skins),
    )


def _evenly(words: bytes) -> bytes:
    """'1/1 2 3//3' -> '1/1/ 2// 3//3'."""
    return b" ".join(b"/".join([*word.split(b"/"), b"", b""][:3]) for word in words.split())


def _resolved(indices: NDArray[np.int64], seen: Sequence[int]) -> NDArray[np.int64]:
    """Indices from 1, or from -1 backwards, as rows; index 0, which does not exist, as -1."""
    absolute = np.where(indices < 0, indices + np.array(seen)[:, None], indices - 1)
    return np.where(absolute < 0, -1, absolute)


def _by_corners(polygons: Iterable[_Polygons]) -> list[_Polygons]:
    """The polygons of all pieces, those with as many corners together."""
    groups: dict[int, list[_Polygons]] = defaultdict(list)
    for group in polygons:
        groups[group.vertices.shape[1]].append(group)
    return [
        _Polygons(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("vertices", "uv", "lines", "skins"))
        )
        for parts in groups.values()
    ]


def _check_range(group: _Polygons, vertices: int, source: Source) -> None:
    wrong = ((group.vertices < 0) | (group.vertices >= vertices)).any(axis=1)
    if wrong.any():
        number = int(group.lines[wrong].min()) + 1
        raise InputError(f"{source.files.name}: face {number} refers to a vertex that does not exist")


def _triangles(
    polygons: Sequence[_Polygons], positions: Floats, uv: Floats
) -> tuple[NDArray[np.int64], Floats | None, NDArray[np.int64]]:
    """Faces [F, 3], texture coordinates [F, 3, 2] or None, numbers of materials [F], in the order of the file."""
    if not polygons:
        return np.empty((0, 3), np.int64), None, np.empty(0, np.int64)
    faces, uv_rows, lines, skins = [], [], [], []
    for group in polygons:
        cut = triangulated(positions[group.vertices])
        which = np.arange(len(cut))[:, None, None]
        faces.append(group.vertices[which, cut].reshape(-1, 3))
        uv_rows.append(group.uv[which, cut].reshape(-1, 3))
        lines.append(np.repeat(group.lines, cut.shape[1]))
        skins.append(np.repeat(group.skins, cut.shape[1]))
    order = np.argsort(np.concatenate(lines), kind="stable")
    rows = np.concatenate(uv_rows)[order]
    rows[rows >= len(uv)] = -1
    # Row -1 is the last one: no texture coordinates.
    coordinates = np.concatenate([uv, [[np.nan, np.nan]]])[rows] if (rows >= 0).any() else None
    return np.concatenate(faces)[order], coordinates, np.concatenate(skins)[order]


def _skins(contents: _Contents, source: Source) -> tuple[Skin, ...]:
    """The materials that faces name, by number."""
    wanted = set(contents.materials) - {""}
    known: dict[str, Skin] = {}
    for library in contents.libraries if wanted else ():
        try:
            text = source.files.read(library).decode("utf-8", errors="replace")
        except MissingFileError as error:
            source.remarks.add(f"material file {error}")
            continue
        known.update(read_mtl(text, source.files, source.pictures, wanted))
    for name in sorted(wanted - set(known)):
        source.remarks.add(f"material '{shortened(name)}' is not defined; a plain grey is used")
    return tuple(known.get(name, Skin(Material())) for name in contents.materials)


def _corner_colours(colours: Floats, faces: NDArray[np.int64]) -> Floats:
    """[F, 3, 4] from the red, green, blue of vertices, which some write in 0..255."""
    scale = 255.0 if np.nanmax(colours) > 1 else 1.0
    rgba = np.pad(np.nan_to_num(colours / scale, nan=1.0), ((0, 0), (0, 1)), constant_values=1.0)
    corners: Floats = rgba[faces]
    return corners
