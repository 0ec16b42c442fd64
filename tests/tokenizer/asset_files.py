"""Writers of tiny asset files that share nothing with the readers: every format, and the parts of glTF one by one."""

from __future__ import annotations

import base64
import io
import json
import struct
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenizer.assets.load import load_mesh_from
from tokenizer.assets.mesh import Material, Mesh

Array = NDArray[Any]

_COMPONENTS = {"int8": 5120, "uint8": 5121, "int16": 5122, "uint16": 5123, "uint32": 5125, "float32": 5126}
_WIDTHS = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}


CORNER = np.array([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]])  # a tetrahedron; every axis is told apart
SIDES = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]])
SQUARE = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
SQUARE_UV = np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
SPLIT = np.array([0, 1, 2, 0, 2, 3])


def load(
    data: bytes | str, name: str, others: Mapping[str, bytes] | None = None, *, silent: bool = True, **options: Any
) -> Mesh:
    """Load from memory; unless `silent` is switched off, no warning may come."""
    data = data.encode() if isinstance(data, str) else data
    with warnings.catch_warnings():
        if silent:
            warnings.simplefilter("error")
        return load_mesh_from({name: data, **(others or {})}, name, **options)


def corners(mesh: Mesh) -> Array:
    """[F, 3, 3] positions in the axes of the file."""
    world = mesh.vertices[mesh.faces]
    return world @ mesh.to_original[:3, :3].T + mesh.to_original[:3, 3]


def only(mesh: Mesh) -> Material:
    """Its material."""
    assert len(mesh.materials) == 1
    return mesh.materials[0]


# ---------------------------------------------------------------------- pictures


def png(pixels: Array) -> bytes:
    """A picture file of uint8 [H, W, 3 or 4]."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def plain_png(*colour: int, size: int = 2) -> bytes:
    return png(np.full((size, size, len(colour)), colour, np.uint8))


def lines(keyword: str, table: Array) -> str:
    """Rows of numbers, each after a keyword."""
    return "".join(f"{keyword} {' '.join(map(repr, row))}\n" for row in np.asarray(table).tolist())


# ---------------------------------------------------------------------- triangles in every format


def obj(vertices: Array, faces: Array) -> bytes:
    return (lines("v", vertices) + lines("f", faces + 1)).encode()


def off(vertices: Array, faces: Array) -> bytes:
    return f"OFF\n{len(vertices)} {len(faces)} 0\n{lines('', vertices)}{lines('3', faces)}".encode()


def stl_binary(vertices: Array, faces: Array) -> bytes:
    triangles = b"".join(
        struct.pack("<12fH", 0, 0, 0, *vertices[face].astype(np.float32).ravel().tolist(), 0) for face in faces
    )
    return b"any header".ljust(80) + struct.pack("<I", len(faces)) + triangles


def stl_text(vertices: Array, faces: Array) -> bytes:
    facets = (f"facet normal 0 0 1\n outer loop\n{lines('  vertex', vertices[f])} endloop\nendfacet\n" for f in faces)
    return f"solid thing\n{''.join(facets)}endsolid thing\n".encode()


def ply(kind: str) -> Callable[[Array, Array], bytes]:
    """A writer of "ascii", "binary_little_endian" or "binary_big_endian"."""

    def write(vertices: Array, faces: Array) -> bytes:
        return ply_file(kind, {"x": vertices[:, 0], "y": vertices[:, 1], "z": vertices[:, 2]}, list(faces))

    return write


def ply_file(
    kind: str,
    vertex: dict[str, Array],
    faces: list[Any],
    face: dict[str, list[Any]] | None = None,
    comments: str = "",
) -> bytes:
    """vertex: columns of the vertices. faces: corners of each. face: further properties of each, lists or numbers.

    Integers are stored as uchar, all other numbers as float.
    """
    order = ">" if "big" in kind else "<"
    count = len(next(iter(vertex.values())))
    header = f"{comments}element vertex {count}\n" + "".join(
        f"property {_ply_type(column)} {name}\n" for name, column in vertex.items()
    )
    header += f"element face {len(faces)}\nproperty list uchar int vertex_indices\n"
    for name, values in (face or {}).items():
        kind_of_list = "list uchar " if np.ndim(values[0]) else ""
        header += f"property {kind_of_list}{_ply_type(np.asarray(values[0]))} {name}\n"
    text = kind == "ascii"
    rows = [
        b"".join(_ply_value(column[row], column.dtype, order, text) for column in vertex.values())
        for row in range(count)
    ]
    for number, corners in enumerate(faces):
        row = _ply_list(corners, np.dtype("i4"), order, text)
        for values in (face or {}).values():
            value = np.asarray(values[number])
            dtype = np.dtype("u1") if value.dtype.kind in "iu" else np.dtype("f4")
            row += _ply_list(value, dtype, order, text) if value.ndim else _ply_value(value, dtype, order, text)
        rows.append(row)
    ending = b"\n" if text else b""
    return f"ply\nformat {kind} 1.0\n{header}end_header\n".encode() + b"".join(row + ending for row in rows)


def _ply_type(column: Array) -> str:
    return "uchar" if column.dtype.kind in "iu" else "float"


def _ply_value(value: Any, dtype: Any, order: str, text: bool) -> bytes:
    stored = np.dtype("u1") if np.dtype(dtype) == np.uint8 else np.dtype(dtype)
    if stored.kind == "f":
        stored = np.dtype("f4")
    return f"{value.item()!r} ".encode() if text else np.asarray(value, order + stored.str[1:]).tobytes()


def _ply_list(values: Any, dtype: np.dtype[Any], order: str, text: bool) -> bytes:
    values = np.asarray(values)
    count = f"{len(values)} ".encode() if text else bytes([len(values)])
    return count + b"".join(_ply_value(value, dtype, order, text) for value in values)


# ---------------------------------------------------------------------- glTF


class Gltf:
    """Builds a glTF file part by part; `tree` is its JSON and may be damaged before it is written."""

    def __init__(self) -> None:
        self.binary = b""
        self.tree: dict[str, Any] = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": []}]}

    def add(self, kind: str, part: dict[str, Any]) -> int:
        """Append a part of a kind ("nodes", "materials", ...) and return its number."""
        parts = self.tree.setdefault(kind, [])
        parts.append(part)
        return len(parts) - 1

    def view(self, data: bytes, **more: Any) -> int:
        self.binary += b"\0" * (-len(self.binary) % 4)
        start = len(self.binary)
        self.binary += data
        return self.add("bufferViews", {"buffer": 0, "byteOffset": start, "byteLength": len(data), **more})

    def accessor(self, table: Array, **more: Any) -> int:
        """A table [N] or [N, width] as it is."""
        table = np.asarray(table)
        kind = _WIDTHS[1 if table.ndim == 1 else table.shape[1]]
        part = {"componentType": _COMPONENTS[table.dtype.name], "count": len(table), "type": kind, **more}
        return self.add("accessors", {"bufferView": self.view(table.tobytes()), **part})

    def mesh(self, positions: Array, indices: Array | None = None, **primitive: Any) -> int:
        """A mesh of one primitive; `primitive` takes mode, material, and attributes besides POSITION."""
        attributes = {"POSITION": self.accessor(np.asarray(positions, np.float32)), **primitive.pop("attributes", {})}
        part = {"attributes": attributes, **primitive}
        if indices is not None:
            part["indices"] = self.accessor(np.asarray(indices))
        return self.add("meshes", {"primitives": [part]})

    def place(self, mesh: int, **node: Any) -> int:
        """A node with a mesh, at the root of the scene."""
        number = self.add("nodes", {"mesh": mesh, **node})
        self.tree["scenes"][0]["nodes"].append(number)
        return number

    def material(self, **surface: Any) -> int:
        """A material with these entries of pbrMetallicRoughness."""
        return self.add("materials", {"pbrMetallicRoughness": surface})

    def texture(self, encoded: bytes, **sampler: Any) -> int:
        """A texture of an embedded picture."""
        image = self.add("images", {"bufferView": self.view(encoded), "mimeType": "image/png"})
        return self.add("textures", {"source": image, "sampler": self.add("samplers", sampler)})

    def glb(self) -> bytes:
        tree = {**self.tree, "buffers": [{"byteLength": len(self.binary)}]}
        text = json.dumps(tree).encode()
        text += b" " * (-len(text) % 4)
        binary = self.binary + b"\0" * (-len(self.binary) % 4)
        chunks = [struct.pack("<I4s", len(text), b"JSON"), text, struct.pack("<I4s", len(binary), b"BIN\0"), binary]
        return struct.pack("<4sII", b"glTF", 2, 12 + sum(map(len, chunks))) + b"".join(chunks)

    def gltf(self, uri: str | None = None) -> bytes:
        """The text alone; the buffer is embedded, or lies in another file."""
        embedded = "data:application/octet-stream;base64," + base64.b64encode(self.binary).decode()
        return json.dumps({**self.tree, "buffers": [{"uri": uri or embedded, "byteLength": len(self.binary)}]}).encode()


def glb(vertices: Array, faces: Array) -> bytes:
    file = Gltf()
    file.place(file.mesh(vertices, faces.astype(np.uint32).ravel()))
    return file.glb()


def gltf(vertices: Array, faces: Array) -> bytes:
    file = Gltf()
    file.place(file.mesh(vertices, faces.astype(np.uint16).ravel()))
    return file.gltf()


WRITERS: dict[str, tuple[str, Callable[[Array, Array], bytes]]] = {
    "obj": ("a.obj", obj),
    "off": ("a.off", off),
    "stl-binary": ("a.stl", stl_binary),
    "stl-text": ("a.stl", stl_text),
    "ply-text": ("a.ply", ply("ascii")),
    "ply-little": ("a.ply", ply("binary_little_endian")),
    "ply-big": ("a.ply", ply("binary_big_endian")),
    "glb": ("a.glb", glb),
    "gltf": ("a.gltf", gltf),
}
"""Format -> a name of the file, and a writer of vertices [V, 3] and triangles [F, 3]."""
