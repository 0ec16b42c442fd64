"""The outer parts of glTF 2.0 (Khronos, ISO/IEC 12113): container, JSON, buffers and accessors.

Everything in a file may lie: lengths, counts, types. Here every look-up is checked, and no count takes memory: an
accessor is a view of the buffer it lies in, and only the rows that triangles use are ever copied out of it. (trimesh
reads glTF as well, but allocates what a header claims, and passes over samplers, texture transforms, sparse and
normalised accessors.)
"""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from numpy.typing import NDArray

from tokenizer.assets.files import AssetFiles, shortened
from tokenizer.assets.mesh import Floats
from tokenizer.errors import InputError

JsonObject = dict[str, Any]
_T = TypeVar("_T")

# Python objects take far more memory than the text they come from.
_MAX_JSON_VALUES: Final = 2_000_000

_MAX_ZEROS: Final = 1_000_000

_JSON_CHUNK: Final = b"JSON"
_BINARY_CHUNK: Final = b"BIN\0"

_COMPONENTS: Final = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS: Final = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}

# Extensions that change nothing of what is read here, or that are read. A file that requires another one is refused.
_KNOWN_EXTENSIONS: Final = (
    "EXT_texture_webp",
    "KHR_lights_",
    "KHR_materials_",
    "KHR_mesh_quantization",
    "KHR_texture_",
)


@dataclass(frozen=True, slots=True)
class Accessor:
    """A table in a buffer, not copied.

    values: [count, width] as stored. scale: values are divided by it. overrides: rows and values of a sparse accessor.
    """

    values: NDArray[Any]
    scale: float = 1.0
    overrides: tuple[NDArray[np.int64], NDArray[Any]] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def rows(self, numbers: NDArray[np.int64]) -> Floats:
        """[len(numbers), width] float64."""
        rows = self.values[numbers].astype(np.float64)
        if self.overrides is not None:
            replaced, values = self.overrides
            places = np.searchsorted(replaced, numbers).clip(max=len(replaced) - 1)
            hit = replaced[places] == numbers
            rows[hit] = values[places[hit]]
        # Signed values reach one step further below zero than above it.
        return rows if self.scale == 1 else np.maximum(rows / self.scale, -1)


class Document:
    """A glTF file whose parts are looked up by kind and number.

    Look-ups raise `ValueError` where the file contradicts itself.
    """

    def __init__(self, data: bytes, files: AssetFiles) -> None:
        text, self._binary = _chunks(data)
        if text.count(b",") + text.count(b"[") + text.count(b"{") > _MAX_JSON_VALUES:
            raise InputError(f"{files.name}: its JSON part has more than {_MAX_JSON_VALUES} values; simplify the asset")
        self.root = of_type(json.loads(text), dict, "the JSON part")
        self.files = files
        self._buffers: dict[int, bytes] = {}
        self._check_version()

    def _check_version(self) -> None:
        version = str(field(self.root, "asset", dict, {}).get("version", "2.0"))
        if not version.startswith("2."):
            raise InputError(f"{self.files.name}: is glTF {shortened(version, 10)}, only 2.0 can be read; convert it")
        for name in field(self.root, "extensionsRequired", list, []):
            if not str(name).startswith(_KNOWN_EXTENSIONS):
                raise InputError(
                    f"{self.files.name}: needs the glTF extension {shortened(str(name), 60)}, which is not supported; "
                    "save it without"
                )

    def items(self, kind: str) -> list[Any]:
        """All parts of a kind: "nodes", "meshes", ..."""
        return field(self.root, kind, list, [])

    def item(self, kind: str, number: object) -> JsonObject:
        """One part of a kind."""
        items = self.items(kind)
        if not isinstance(number, int) or not 0 <= number < len(items):
            raise ValueError(f"there is no {kind}[{shortened(str(number), 20)}]")
        return of_type(items[number], dict, f"{kind}[{number}]")

    def view(self, number: object) -> tuple[memoryview, int]:
        """The bytes of a buffer view and its stride, 0 for none."""
        view = self.item("bufferViews", number)
        buffer = self._buffer(view.get("buffer"))
        offset, length = size(view, "byteOffset", 0), size(view, "byteLength")
        if offset + length > len(buffer):
            raise ValueError(f"bufferViews[{number}] reaches beyond the end of its buffer")
        return memoryview(buffer)[offset : offset + length], size(view, "byteStride", 0)

    def _buffer(self, number: object) -> bytes:
        buffer = self.item("buffers", number)
        assert isinstance(number, int)  # or `item` had raised
        if number not in self._buffers:
            uri = field(buffer, "uri", str, "")
            if uri:
                self._buffers[number] = self.resource(uri)
            elif number == 0 and self._binary is not None:
                self._buffers[number] = self._binary
            else:
                raise ValueError(f"buffers[{number}] has no content")
        return self._buffers[number]

    def resource(self, uri: str) -> bytes:
        """The content of a data: URI or of a file in the folder of the asset; `MissingFileError` without one."""
        if uri.startswith("data:"):
            kind, comma, content = uri.partition(",")
            if not comma:
                raise ValueError("a data: URI without content")
            return base64.b64decode(content, validate=False) if ";base64" in kind else unquote_to_bytes(content)
        return self.files.read(unquote(uri))

    def accessor(self, number: object, *widths: int) -> Accessor:
        """A table with one of the widths."""
        item = self.item("accessors", number)
        count, width = size(item, "count"), _WIDTHS.get(field(item, "type", str), 0)
        if width not in widths:
            raise ValueError(f"accessors[{number}] has type {shortened(str(item.get('type')), 20)}")
        dtype = _dtype(item)
        if "bufferView" in item:
            values = self._table(item, dtype, count, width)
        else:
            # Zeros, which a sparse accessor may overwrite; a file can ask for any number of them.
            if count > _MAX_ZEROS:
                raise ValueError(f"accessors[{number}] has {count} rows without data")
            values = np.broadcast_to(np.zeros(1, dtype), (count, width))
        scale = float(np.iinfo(dtype).max) if item.get("normalized") is True and dtype.kind in "iu" else 1.0
        return Accessor(values, scale, self._overrides(item, dtype, count, width))

    def _table(self, item: JsonObject, dtype: np.dtype[Any], count: int, width: int) -> NDArray[Any]:
        """[count, width] in place."""
        data, stride = self.view(item.get("bufferView"))
        stride = stride or width * dtype.itemsize
        offset = size(item, "byteOffset", 0)
        if stride < width * dtype.itemsize or (
            count and offset + (count - 1) * stride + width * dtype.itemsize > len(data)
        ):
            raise ValueError(f"an accessor of {count} rows reaches beyond the end of its buffer view")
        if not count:
            return np.empty((0, width), dtype)
        return np.ndarray((count, width), dtype, buffer=data, offset=offset, strides=(stride, dtype.itemsize))

    def _overrides(
        self, item: JsonObject, dtype: np.dtype[Any], count: int, width: int
    ) -> tuple[NDArray[np.int64], NDArray[Any]] | None:
        sparse = field(item, "sparse", dict, {})
        if not sparse:
            return None
        indices, values = field(sparse, "indices", dict), field(sparse, "values", dict)
        changed = size(sparse, "count")
        rows = self._table(indices, _dtype(indices), changed, 1)[:, 0].astype(np.int64)
        if not changed or rows[0] < 0 or rows[-1] >= count or (np.diff(rows) <= 0).any():
            raise ValueError("the rows of a sparse accessor are out of order or out of range")
        return rows, self._table(values, dtype, changed, width)


def of_type(value: object, kind: type[_T], what: str) -> _T:
    """The value, or `ValueError` if it is of another type."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{what} is not of type {kind.__name__}")
    return value


def field(item: JsonObject, key: str, kind: type[_T], default: _T | None = None) -> _T:
    """item[key], or the default if it is absent; `ValueError` if it is of another type, or absent without a default."""
    if key not in item and default is not None:
        return default
    return of_type(item.get(key), kind, f"'{key}'")


def size(item: JsonObject, key: str, default: int | None = None) -> int:
    """A count, an offset or a length: an int that is not negative."""
    value = field(item, key, int, default)
    if value < 0:
        raise ValueError(f"'{key}' is negative")
    return value


def number(item: JsonObject, key: str, default: float) -> float:
    """A finite number."""
    return numbers(item, key, [default], scalar=True)[0]


def numbers(item: JsonObject, key: str, default: list[float], *, scalar: bool = False) -> list[float]:
    """As many finite numbers as the default has."""
    values = [item.get(key, default[0])] if scalar else field(item, key, list, default)
    valid = len(values) == len(default) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30 for value in values
    )
    if not valid:
        raise ValueError(f"'{key}' is not {len(default)} finite numbers")
    return [float(value) for value in values]


def _dtype(item: JsonObject) -> np.dtype[Any]:
    code = item.get("componentType")
    if code not in _COMPONENTS:
        raise ValueError(f"unknown componentType {shortened(str(code), 20)}")
    return np.dtype(_COMPONENTS[code])


def _chunks(data: bytes) -> tuple[bytes, bytes | None]:
    """The JSON text and the binary buffer of a file, which is a container (GLB) or the text itself."""
    if not data.startswith(b"glTF"):
        return data, None
    if len(data) < 12:
        raise ValueError("the header is cut off")
    version, length = struct.unpack_from("<II", data, 4)
    if version != 2:
        raise ValueError(f"it is a container of version {version}; only glTF 2.0 can be read")
    if length > len(data):
        raise ValueError(f"the file ends after {len(data)} of {length} bytes")
    chunks: dict[bytes, bytes] = {}
    start = 12
    while start + 8 <= length:
        count, kind = struct.unpack_from("<I4s", data, start)
        if start + 8 + count > length:
            raise ValueError("a chunk reaches beyond the end of the file")
        chunks.setdefault(kind, data[start + 8 : start + 8 + count])
        start += 8 + count
    if _JSON_CHUNK not in chunks:
        raise ValueError("it has no JSON chunk")
    return chunks[_JSON_CHUNK], chunks.get(_BINARY_CHUNK)
