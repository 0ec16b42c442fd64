"""STL: triangles and nothing else, binary or text."""

from __future__ import annotations

import re
import struct
from typing import Any, Final

import numpy as np

from tokenizer.assets.materials import PLAIN
from tokenizer.assets.mesh import Floats
from tokenizer.assets.shapes import Shape, Source
from tokenizer.assets.text import as_utf8, pieces

_HEADER: Final = 80  # bytes of anything, then the number of triangles
_TRIANGLE: Final[np.dtype[Any]] = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attributes", "<u2")])

_VERTEX: Final = re.compile(rb"^ *vertex +(\S+) +(\S+) +(\S+)", re.MULTILINE | re.IGNORECASE)
_FACET: Final = re.compile(rb"^ *facet ", re.MULTILINE | re.IGNORECASE)


def read_stl(data: bytes, source: Source) -> Shape:
    """The triangles of an STL file.

    Raises:
        InputError: too many faces.
        ValueError: cut off, or not STL.
    """
    corners = _binary_corners(data, source) if _is_binary(data) else _text_corners(as_utf8(data), source)
    count = len(corners) // 3
    return Shape(
        vertices=corners[: 3 * count].astype(np.float64),
        faces=np.arange(3 * count).reshape(count, 3),
        face_skins=np.zeros(count, np.int64),
        skins=(PLAIN,),
    )


def _is_binary(data: bytes) -> bool:
    # Binary files may begin with "solid" too; their length tells them apart, and bytes that no text has.
    if not data.lstrip().lower().startswith(b"solid"):
        return True
    exact = len(data) >= _HEADER + 4 and _HEADER + 4 + _count(data) * _TRIANGLE.itemsize == len(data)
    return exact or b"\0" in data[: 2 * _HEADER]


def _count(data: bytes) -> int:
    (count,) = struct.unpack_from("<I", data, _HEADER)
    return int(count)


def _binary_corners(data: bytes, source: Source) -> Floats:
    room = (len(data) - _HEADER - 4) // _TRIANGLE.itemsize
    if room < 0:
        raise ValueError("it ends before the first triangle")
    count = _count(data)
    source.check_faces(min(count, room))
    if count > room:
        raise ValueError(f"its header promises {count} triangles, the file has room for {room}")
    table = np.frombuffer(data, _TRIANGLE, count, offset=_HEADER + 4)
    corners: Floats = table["corners"].reshape(-1, 3)
    return corners


def _text_corners(text: bytes, source: Source) -> Floats:
    source.check_faces(sum(1 for _ in _FACET.finditer(text)))
    parts = [
        np.array([tuple(map(float, words)) for words in _VERTEX.findall(piece)], np.float64).reshape(-1, 3)
        for piece in pieces(text)
    ]
    return np.concatenate(parts)
