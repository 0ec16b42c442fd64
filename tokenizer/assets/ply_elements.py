"""The elements of a .ply file, lists among them: text, or binary of either byte order (G. Turk, 1994).

Lists make rows of different lengths. Where all rows turn out alike, as in most files, nothing is looked at row by row.
(`tokenizer.gaussians.plytable` streams tables without lists, which may be far larger.)
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenizer.assets.files import shortened
from tokenizer.assets.mesh import Floats
from tokenizer.assets.text import all_numbers, as_utf8

_MAX_HEADER: Final = 2**18
_TYPES: Final = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float": "f4", "double": "f8", "float32": "f4", "float64": "f8"},
}
_ORDERS: Final = {"ascii": "<", "binary_little_endian": "<", "binary_big_endian": ">"}


@dataclass(frozen=True, slots=True)
class Property:
    """dtype: of a value. count_dtype: of the count before the values of a list, None for a single value."""

    name: str
    dtype: np.dtype[Any]
    count_dtype: np.dtype[Any] | None


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says of an element. count: rows. properties: in the order of the file."""

    name: str
    count: int
    properties: list[Property] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Element:
    """An element whose values have been located, not copied.

    starts: position of the first value of each property, [rows]. counts: how many values each list has, [rows].
    """

    properties: dict[str, Property]
    starts: dict[str, NDArray[np.int64]]
    counts: dict[str, NDArray[np.int64]]
    body: Body

    def has(self, *names: str) -> bool:
        """Whether all of these are properties with a single value."""
        return all(name in self.starts and name not in self.counts for name in names)

    def column(self, name: str) -> NDArray[Any]:
        """[rows] of a property with a single value."""
        if not self.has(name):
            raise ValueError(f"a property {name} is missing")
        return self.body.gather(self.starts[name], self.properties[name].dtype, 1)[:, 0]

    def lists(self, name: str) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """Rows [P] and their values [P, n] for each length n that the lists have; nothing without such lists."""
        counts = self.counts.get(name, np.empty(0, np.int64))
        for count in np.unique(counts):
            rows = np.flatnonzero(counts == count)
            yield rows, self.values(name, rows, int(count))

    def values(self, name: str, rows: NDArray[np.int64], count: int) -> NDArray[Any]:
        """[len(rows), count] the values of lists that have as many."""
        return self.body.gather(self.starts[name][rows], self.properties[name].dtype, count)


class Body(Protocol):
    """The values after the header; positions count bytes in binary files and words in text."""

    length: int

    def size(self, dtype: np.dtype[Any]) -> int:
        """Positions that a value takes."""

    def number(self, position: int, dtype: np.dtype[Any]) -> int:
        """One count."""

    def gather(self, positions: NDArray[np.int64], dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        """[len(positions), count]: as many values from each position on."""


def read_elements(data: bytes) -> tuple[list[Header], list[str], Body]:
    """The headers of the elements, the names of texture files in comments, and the values.

    Raises:
        ValueError: not PLY, or the header promises more than the file can hold.
    """
    end = re.compile(rb"^end_header *(\r\n|\n|\r)", re.MULTILINE).search(data, 0, _MAX_HEADER)
    if not data.startswith(b"ply") or end is None:
        raise ValueError("it has no PLY header")
    kind, headers, textures = _parsed_header(data[: end.start()].decode("utf-8", errors="replace"))
    body: Body
    if kind == "ascii":
        # A value is a digit and a space at least.
        _check_room(headers, (len(data) - end.end() + 1) // 2, _Words.size)
        body = _Words(all_numbers(as_utf8(data[end.end() :])))
    else:
        body = _Bytes(data, end.end())
        _check_room(headers, body.length, body.size)
    return headers, textures, body


def locate(headers: Sequence[Header], body: Body) -> dict[str, Element]:
    """The elements by name; `ValueError` where the file ends too early."""
    elements: dict[str, Element] = {}
    start = 0
    for header in headers:
        positions, counts, start = _located(header, body, start)
        names = [item.name for item in header.properties]
        elements[header.name] = Element(
            properties=dict(zip(names, header.properties, strict=True)),
            starts=dict(zip(names, positions, strict=True)),
            counts={
                item.name: rows
                for item, rows in zip(header.properties, counts, strict=True)
                if item.count_dtype is not None
            },
            body=body,
        )
    return elements


# ---------------------------------------------------------------------- header


def _parsed_header(text: str) -> tuple[str, list[Header], list[str]]:
    kind, headers, textures = "", list[Header](), list[str]()
    for line in text.splitlines()[1:]:
        match line.split():
            case ["format", word, *_]:
                kind = word
            case ["comment", keyword, *_] if keyword.lower() == "texturefile":
                # The name may hold spaces.
                textures.append(line.split(maxsplit=2)[2] if len(line.split()) > 2 else "")
            case ["element", name, count]:
                headers.append(Header(name, int(count)))
            case ["property", "list", count_type, value_type, name] if headers:
                headers[-1].properties.append(Property(name, _dtype(value_type, kind), _dtype(count_type, kind)))
            case ["property", value_type, name] if headers:
                headers[-1].properties.append(Property(name, _dtype(value_type, kind), None))
    if kind not in _ORDERS:
        raise ValueError(f"its format is '{shortened(kind, 40)}', not one of {', '.join(_ORDERS)}")
    return kind, headers, textures


def _dtype(name: str, kind: str) -> np.dtype[Any]:
    if name not in _TYPES:
        raise ValueError(f"unknown type '{shortened(name, 40)}' of a property")
    return np.dtype(_ORDERS.get(kind, "<") + _TYPES[name])


def _check_room(headers: Sequence[Header], room: int, size: Callable[[np.dtype[Any]], int]) -> None:
    for header in headers:
        # Lists may be empty, but their counts are there.
        row = sum(size(item.count_dtype or item.dtype) for item in header.properties)
        if header.count < 0 or header.count * row > room:
            raise ValueError(
                f"its header promises {header.count} of '{shortened(header.name, 40)}', the file is too short"
            )
        room -= header.count * row


# ---------------------------------------------------------------------- rows


def _located(header: Header, body: Body, start: int) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], int]:
    """Positions and counts of the values of every property, [rows] each, and where the element ends."""
    if not header.count or not header.properties:
        nothing = [np.empty(0, np.int64) for _ in header.properties]
        return nothing, nothing, start
    offsets, lengths, stride = _first_row(header, body, start)
    end = start + stride * header.count
    if end <= body.length:
        rows = start + stride * np.arange(header.count)
        counts = [np.full(header.count, length) for length in lengths]
        alike = all(
            (body.gather(rows + offset - body.size(item.count_dtype), item.count_dtype, 1) == length).all()
            for item, offset, length in zip(header.properties, offsets, lengths, strict=True)
            if item.count_dtype is not None
        )
        if alike:
            return [rows + offset for offset in offsets], counts, end
    return _row_by_row(header, body, start)


def _first_row(header: Header, body: Body, start: int) -> tuple[list[int], list[int], int]:
    """Offsets and counts of the values, and the size of the row."""
    offsets, lengths, position = list[int](), list[int](), start
    for item in header.properties:
        length = 1
        if item.count_dtype is not None:
            length = _count(body, position, item.count_dtype)
            position += body.size(item.count_dtype)
        offsets.append(position - start)
        lengths.append(length)
        position += length * body.size(item.dtype)
    return offsets, lengths, position - start


def _row_by_row(header: Header, body: Body, start: int) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], int]:
    starts = [array("q") for _ in header.properties]
    counts = [array("q") for _ in header.properties]
    columns = [
        (item.count_dtype, 0 if item.count_dtype is None else body.size(item.count_dtype), body.size(item.dtype))
        for item in header.properties
    ]
    position = start
    for _ in range(header.count):
        for column, (count_dtype, count_size, size) in enumerate(columns):
            length = 1
            if count_dtype is not None:
                length = _count(body, position, count_dtype)
                position += count_size
            starts[column].append(position)
            counts[column].append(length)
            position += length * size
        if position > body.length:
            raise ValueError(f"the file ends in the rows of '{shortened(header.name, 40)}'")
    return [np.array(rows) for rows in starts], [np.array(rows) for rows in counts], position


def _count(body: Body, position: int, dtype: np.dtype[Any]) -> int:
    length = body.number(position, dtype)
    if length < 0:
        raise ValueError(f"a list of {length} values")
    return length


class _Bytes:
    def __init__(self, data: bytes, start: int) -> None:
        self._data = np.frombuffer(data, np.uint8, offset=start)
        self._buffer = memoryview(data)[start:]
        self.length = len(self._data)

    def size(self, dtype: np.dtype[Any]) -> int:
        return dtype.itemsize

    def number(self, position: int, dtype: np.dtype[Any]) -> int:
        if position + dtype.itemsize > self.length:
            raise ValueError("the file ends too early")
        if dtype.kind == "f":
            return int(np.frombuffer(self._buffer, dtype, 1, position)[0])
        value = self._buffer[position : position + dtype.itemsize]
        return int.from_bytes(value, "big" if dtype.byteorder == ">" else "little", signed=dtype.kind == "i")

    def gather(self, positions: NDArray[np.int64], dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        if not len(positions) or not count:
            return np.empty((len(positions), count), dtype)
        steps = np.diff(positions)
        if not len(steps) or (steps == steps[0]).all():
            strides = (int(steps[0]) if len(steps) else 0, dtype.itemsize)
            return np.ndarray((len(positions), count), dtype, self._buffer, int(positions[0]), strides)
        rows: NDArray[Any] = self._data[positions[:, None] + np.arange(count * dtype.itemsize)].view(dtype)
        return rows


class _Words:
    def __init__(self, values: Floats) -> None:
        self._values = values
        self.length = len(values)

    @staticmethod
    def size(dtype: np.dtype[Any]) -> int:  # noqa: ARG004
        return 1

    def number(self, position: int, dtype: np.dtype[Any]) -> int:  # noqa: ARG002
        if position >= self.length:
            raise ValueError("the file ends too early")
        return int(self._values[position])

    def gather(self, positions: NDArray[np.int64], dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        values: NDArray[Any] = self._values[positions[:, None] + np.arange(count)].astype(dtype)
        return values
