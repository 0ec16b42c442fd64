"""The vertices of a .ply file as a table of numbers, read in pieces (G. Turk, "The PLY Polygon File Format", 1994).

A header is a promise that nobody has checked: sizes and counts are compared with the size of the file before anything
is read or allocated, and no piece is larger than `PIECE` rows. Only what a table needs is read: other elements are
passed over, and lists (the faces of a mesh) are refused where they are in the way.
"""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from tokenizer.errors import InputError

PIECE: Final = 65536
"""Rows that are in memory at once."""

MAX_HEADER: Final = 1 << 18
"""Bytes; the header of a splat file with all its spherical harmonics takes 1.5 KB."""

_TYPES: Final = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"},
}
_BYTE_ORDERS: Final = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}
_COUNT: Final = re.compile(r"[0-9]{1,18}")


@dataclass(slots=True)
class _Element:
    """columns: name -> numpy type without byte order, or None for a list."""

    name: str
    count: int
    columns: dict[str, str | None]

    @property
    def row_bytes(self) -> int | None:
        """Bytes of a row in a binary file; None where lists make rows differ."""
        sizes = [np.dtype(kind).itemsize for kind in self.columns.values() if kind is not None]
        return sum(sizes) if len(sizes) == len(self.columns) else None


class PlyTable:
    """The element "vertex" of a .ply file; making one reads and checks the header.

    Args:
        path: of a binary (either byte order) or ASCII .ply file.

    Attributes:
        name: the path, for messages.
        count: rows.
        columns: names of the numeric columns, in the file's order.

    Raises:
        InputError: not a .ply file, a header that is broken or does not fit the size of the file, no vertices, or
            lists in or before the rows.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self._path = Path(path)
        if not self._path.exists():
            raise InputError(f"{self.name}: no such file")
        if not self._path.is_file():
            raise InputError(f"{self.name}: is not a file")
        size = self._path.stat().st_size
        with self._path.open("rb") as file:
            lines, self._start = _header_lines(file, self.name)
        self._order, elements = _parse_header(lines, self.name)
        names = [element.name for element in elements]
        if names.count("vertex") != 1:
            raise InputError(f"{self.name}: the header must name one element 'vertex', it names {names or 'nothing'}")
        place = names.index("vertex")
        self._vertex = elements[place]
        self.count = self._vertex.count
        self.columns = tuple(self._vertex.columns)
        lists = [name for name, kind in self._vertex.columns.items() if kind is None]
        if lists:
            raise InputError(f"{self.name}: the vertices hold a list ('{lists[0]}'); a table of numbers is needed")
        if self._order:
            self._start = self._check_binary_size(elements, place, size)
        else:
            self._skipped = sum(element.count for element in elements[:place])
            self._last = place == len(elements) - 1
            # A row of k numbers takes k digits and k spaces or line ends at least, but for the end of the file.
            least = self._skipped + self.count * 2 * len(self.columns) - 1
            if self._start + least > size:
                raise self._lying(f"at least {least}", size - self._start)

    def rows(self, names: Sequence[str]) -> Iterator[NDArray[np.float64]]:
        """The columns `names`, in this order, as pieces [at most PIECE, len(names)].

        Raises:
            InputError: a row of an ASCII file is not made of as many numbers as there are columns, or there are fewer
                or more rows than announced.
        """
        with self._path.open("rb") as file:
            file.seek(self._start)
            pieces = self._binary_pieces(file, names) if self._order else self._ascii_pieces(file, names)
            yield from pieces

    def _binary_pieces(self, file: BinaryIO, names: Sequence[str]) -> Iterator[NDArray[np.float64]]:
        row = np.dtype([(name, f"{self._order}{kind}") for name, kind in self._vertex.columns.items()])
        for first in range(0, self.count, PIECE):
            wanted = min(PIECE, self.count - first)
            data = file.read(wanted * row.itemsize)
            if len(data) != wanted * row.itemsize:
                raise InputError(f"{self.name}: ended while it was read")
            piece = np.frombuffer(data, dtype=row)
            with np.errstate(invalid="ignore"):  # NaNs are the caller's business
                yield np.stack([piece[name].astype(np.float64) for name in names], axis=1)

    def _ascii_pieces(self, file: BinaryIO, names: Sequence[str]) -> Iterator[NDArray[np.float64]]:
        chosen = [self.columns.index(name) for name in names]
        # None: any line end, as writers on different systems leave them.
        text = io.TextIOWrapper(file, encoding="latin-1", newline=None)
        lines = (line for line in text if not line.isspace())
        for _ in itertools.islice(lines, self._skipped):
            pass
        for first in range(0, self.count, PIECE):
            wanted = min(PIECE, self.count - first)
            piece = self._parse(list(itertools.islice(lines, wanted)), first)
            if len(piece) < wanted:
                raise InputError(f"{self.name}: announces {self.count} rows, but ends after {first + len(piece)}")
            yield piece[:, chosen]
        if self._last and next(lines, None) is not None:
            raise InputError(f"{self.name}: announces {self.count} rows, but holds more")

    def _parse(self, lines: list[str], first: int) -> NDArray[np.float64]:
        width = len(self.columns)
        if not lines:
            return np.empty((0, width))
        try:
            piece: NDArray[np.float64] = np.loadtxt(lines, dtype=np.float64, comments=None, ndmin=2)
        except ValueError:
            piece = np.empty((0, 0))
        if piece.shape == (len(lines), width):
            return piece
        odd = next((number for number, line in enumerate(lines) if not _is_row(line, width)), 0)
        shown = " ".join(lines[odd].split())[:60]
        raise InputError(f"{self.name}: row {first + odd} must be {width} numbers, it is '{shown}'")

    def _check_binary_size(self, elements: list[_Element], place: int, size: int) -> int:
        """Where the vertices start in a binary file."""
        before = 0
        for element in elements[:place]:
            if element.row_bytes is None:
                raise InputError(
                    f"{self.name}: element '{element.name}' holds lists and stands before the vertices; "
                    "write the vertices first"
                )
            before += element.count * element.row_bytes
        sizes = [None if e.row_bytes is None else e.count * e.row_bytes for e in elements[place:]]
        known = before + sum(bytes_ for bytes_ in sizes if bytes_ is not None)
        held = size - self._start
        if known > held or (known < held and None not in sizes):
            raise self._lying(f"{'at least ' if None in sizes else ''}{known}", held)
        return self._start + before

    def _lying(self, announced: str, held: int) -> InputError:
        return InputError(
            f"{self.name}: the header announces {announced} bytes ({self.count} vertices), the file holds {held}; "
            "it is truncated or damaged"
        )


def _is_row(line: str, width: int) -> bool:
    try:
        return len([float(word) for word in line.split()]) == width
    except ValueError:
        return False


def _header_lines(file: BinaryIO, name: str) -> tuple[list[str], int]:
    """The lines between "ply" and "end_header", and where the data starts."""
    start = file.read(MAX_HEADER)
    if not start:
        raise InputError(f"{name}: is empty (0 bytes)")
    # Binary data may begin with any byte, so what ends the lines is learned from the first one.
    ending = re.match(rb"ply[ \t]*(\r\n|\n|\r)", start)
    if ending is None:
        raise InputError(f"{name}: is not a .ply file (it does not begin with 'ply')")
    last = re.search(rb"[\r\n]end_header[ \t]*" + re.escape(ending[1]), start)
    if last is None:
        raise InputError(f"{name}: the header does not end ('end_header' is missing in the first {len(start)} bytes)")
    lines = start[ending.end() : last.start()].decode("utf-8", errors="replace")
    return re.split(r"\r\n|\n|\r", lines), last.end()


def _parse_header(lines: list[str], name: str) -> tuple[str, list[_Element]]:
    """The byte order ("" for ASCII) and the elements."""
    order: str | None = None
    elements: list[_Element] = []
    for line in lines:
        match line.split():
            case [] | ["comment" | "obj_info", *_]:
                pass
            case ["format", kind, "1.0"] if kind in _BYTE_ORDERS and order is None:
                order = _BYTE_ORDERS[kind]
            case ["element", element, count] if _COUNT.fullmatch(count):
                elements.append(_Element(element, int(count), {}))
            case ["property", kind, column] if kind in _TYPES and elements:
                _add_column(elements[-1], column, _TYPES[kind], name)
            case ["property", "list", length, kind, column] if length in _TYPES and kind in _TYPES and elements:
                _add_column(elements[-1], column, None, name)
            case _:
                raise InputError(f"{name}: cannot read the header line '{' '.join(line.split())[:60]}'")
    if order is None:
        raise InputError(f"{name}: the header does not say its format")
    return order, elements


def _add_column(element: _Element, column: str, kind: str | None, name: str) -> None:
    if column in element.columns:
        raise InputError(f"{name}: element '{element.name}' names the property '{column}' twice")
    element.columns[column] = kind
