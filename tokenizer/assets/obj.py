"""Wavefront OBJ with its materials.

trimesh reads OBJ too, but resolves relative indices against the end of the file, follows the first `mtllib` only, and
cuts concave polygons into fans; furniture has all of that. Faces, texture coordinates, vertex colours and materials are
read; normals, curves, points and lines are passed over.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenizer.assets.files import MissingFileError, shortened
from tokenizer.assets.materials import PLAIN, WHITE, Skin
from tokenizer.assets.mesh import Floats
from tokenizer.assets.mtl import read_mtl
from tokenizer.assets.polygons import Polygons, cut_polygons
from tokenizer.assets.shapes import Shape, Source
from tokenizer.assets.text import as_utf8, display_colours, pieces, rows
from tokenizer.errors import InputError

_COLUMNS: Final = 6  # of a vertex: position, and red, green, blue in the dialect that has them
_MAX_MTL_BYTES: Final = 2**26
_MAX_LINES: Final = 40_000_000  # the default number of faces with as many vertices, texture coordinates and normals


def read_obj(data: bytes, source: Source) -> Shape:
    """The triangles of an OBJ file, with the materials of its MTL files.

    Raises:
        InputError: too many faces.
        ValueError: text where numbers are due, or a face that refers to a vertex that does not exist.
    """
    text = as_utf8(data).replace(b"\\\n", b" ")
    # Counting is quick: a file with too many faces is refused before it is taken apart.
    source.check_faces(text.count(b"\nf "))
    if text.count(b"\n") > _MAX_LINES:
        raise InputError(f"{source.files.name}: has more than {_MAX_LINES} lines; simplify it")
    contents = _Contents()
    for piece in pieces(text):
        contents.read(piece)
        source.check_faces(contents.triangles)

    vertices = np.concatenate(contents.vertices)
    triangles = cut_polygons(contents.polygons, vertices[:, :3])
    colours = None
    if not np.isnan(vertices[:, 3:]).all():
        colours = display_colours(vertices[:, 3:])[triangles.faces]
    return Shape(
        vertices=vertices[:, :3],
        faces=triangles.faces,
        face_skins=np.concatenate(contents.face_skins)[triangles.polygons],
        skins=_skins(contents, source, PLAIN if colours is None else WHITE),
        uv=_texture_coordinates(triangles.corners, np.concatenate(contents.uv)),
        colours=colours,
    )


@dataclass
class _Contents:
    """What has been read of a file so far.

    vertices: [*, 6] position and colour, NaN where there is no colour. uv: [*, 2].
    polygons: their `corners` are rows of `uv`, -1 for none. face_skins: number of the material of every face line.
    """

    vertices: list[Floats] = field(default_factory=list)
    uv: list[Floats] = field(default_factory=list)
    polygons: list[Polygons] = field(default_factory=list)
    face_skins: list[NDArray[np.int64]] = field(default_factory=list)
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
        skins: list[int] = []
        # Lines with as many corners and as many slashes are turned into numbers together.
        faces: dict[tuple[int, int], list[_FaceLine]] = defaultdict(list)
        for line in filter(None, piece.split(b"\n")):
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
                faces[corners, rest.count(b"/")].append((rest, self._lines + len(skins), *seen))
                skins.append(self._skin)
                self.triangles += max(corners - 2, 0)
            elif key == b"usemtl":
                self._skin = self.materials.setdefault(_text(rest), len(self.materials))
            elif key == b"mtllib":
                self.libraries[_text(rest)] = None
        self.vertices.append(_vertex_rows(vertices))
        self.uv.append(rows(uv, 2)[:, :2])
        self.face_skins.append(np.array(skins, np.int64))
        self.polygons += [_polygons(lines, *key) for key, lines in faces.items() if key[0] > 2]
        self._lines += len(skins)
        self._vertices_read += len(vertices)
        self._uv_read += len(uv)


# The references, the number of the line among the face lines, and how many v and vt lines came before it.
_FaceLine = tuple[bytes, int, int, int]


def _text(words: bytes) -> str:
    return words.decode("utf-8", errors="replace").strip()


def _vertex_rows(lines: Sequence[bytes]) -> Floats:
    """[V, 6] positions and colours; NaN where there is no colour."""
    table = rows(lines, 3)
    width = table.shape[1]
    if width == 7:  # position, weight, colour
        table = np.delete(table, 3, axis=1)
    elif width < _COLUMNS:  # perhaps a weight; it belongs to curves
        table = np.pad(table[:, :3], ((0, 0), (0, _COLUMNS - 3)), constant_values=np.nan)
    return table[:, :_COLUMNS]


def _polygons(lines: Sequence[_FaceLine], corners: int, slashes: int) -> Polygons:
    words, numbers, vertices_seen, uv_seen = zip(*lines, strict=True)
    text = b" ".join(b" ".join(words).split())
    if slashes:
        each = b"/" * (slashes // corners)
        if text.translate(None, b"+-0123456789") != b" ".join([each] * (corners * len(lines))):
            text = b" ".join(b"/".join([*word.split(b"/"), b"", b""][:3]) for word in text.split())
        text = re.sub(rb"/(?=[/ ]|$)", b"/0", text).replace(b"/", b" ")
    indices = np.fromiter(map(int, text.split()), np.int64).reshape(len(lines), corners, -1)
    uv = _resolved(indices[..., 1], uv_seen) if indices.shape[2] > 1 else np.full_like(indices[..., 0], -1)
    return Polygons(_resolved(indices[..., 0], vertices_seen), np.array(numbers), uv)


def _resolved(indices: NDArray[np.int64], seen: Sequence[int]) -> NDArray[np.int64]:
    """Indices from 1, or from -1 backwards, as rows; index 0, which does not exist, as -1."""
    absolute = np.where(indices < 0, indices + np.array(seen)[:, None], indices - 1)
    return np.where(absolute < 0, -1, absolute)


def _texture_coordinates(numbers: NDArray[np.int64] | None, uv: Floats) -> Floats | None:
    """[F, 3, 2] for rows of `uv` [F, 3]; NaN for rows that do not exist."""
    if numbers is None or not len(uv):
        return None
    numbers = np.where(numbers < len(uv), numbers, -1)
    # Row -1 is the last one.
    coordinates: Floats = np.concatenate([uv, [[np.nan, np.nan]]])[numbers]
    return coordinates


def _skins(contents: _Contents, source: Source, default: Skin) -> tuple[Skin, ...]:
    """The materials that faces name, by number."""
    wanted = set(contents.materials) - {""}
    known: dict[str, Skin] = {}
    for line in contents.libraries if wanted else ():
        for library in _libraries(line, source):
            known.update(read_mtl(library.decode("utf-8", errors="replace"), source.files, source.pictures, wanted))
    for name in sorted(wanted - set(known)):
        source.remarks.add(f"material '{shortened(name)}' is not defined; a plain colour is used")
    return tuple(known.get(name, default) for name in contents.materials)


def _libraries(line: str, source: Source) -> list[bytes]:
    """The material files of one `mtllib` line: its words are one name with spaces, or several names."""
    found: list[bytes] = []
    missing: list[MissingFileError] = []
    words = line.split()
    for name in (line, *(words if len(words) > 1 else ())):
        try:
            found.append(source.files.read(name, _MAX_MTL_BYTES))
        except MissingFileError as error:
            missing.append(error)
        else:
            if name == line:
                return found
    # Where words are found, the line as a whole was no name; where none is, it most likely was.
    for reason in missing[1:] if found else missing[:1]:
        source.remarks.add(f"material file {reason}")
    return found
