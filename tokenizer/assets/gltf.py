"""glTF 2.0 and GLB: the scene, flattened into triangles.

The default scene is read in its rest pose: node transforms are applied, animations, skins and morph targets are not.
Triangle lists, strips and fans count; points and lines are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tokenizer.assets.gltf_document import Accessor, Document, JsonObject, field, numbers, of_type
from tokenizer.assets.gltf_materials import read_material
from tokenizer.assets.materials import WHITE, Skin, linear_to_display
from tokenizer.assets.mesh import Floats
from tokenizer.assets.shapes import Shape, Source, joined
from tokenizer.errors import InputError

_TRIANGLES, _STRIP, _FAN = 4, 5, 6
# More placed meshes and primitives than this are refused: each takes a moment, however few triangles it has.
_MAX_PARTS = 100_000
_PLACING = {"matrix", "translation", "rotation", "scale"}


def read_gltf(data: bytes, source: Source) -> Shape:
    """The triangles of a .gltf or .glb file in the axes of its scene.

    Raises:
        InputError: too many faces, or not glTF 2.0.
        ValueError: the file contradicts itself.
    """
    document = Document(data, source.files)
    reader = _Reader(document, source)
    shapes: list[Shape] = []
    faces = 0
    for mesh, matrix in _placed_meshes(document):
        shape = reader.mesh(mesh)
        faces += len(shape.faces)
        source.check_faces(faces)
        if len(shape.faces):
            shapes.append(_moved(shape, matrix))
    skins = reader.skins()
    if not shapes:
        return replace(_empty(), skins=skins)
    return replace(joined(shapes), skins=skins)


def _empty() -> Shape:
    return Shape(np.empty((0, 3)), np.empty((0, 3), np.int64), np.empty(0, np.int64), ())


# ---------------------------------------------------------------------- scene


def _placed_meshes(document: Document) -> Iterator[tuple[object, Floats]]:
    """Numbers of meshes with the transforms of the nodes that place them."""
    stack = [(node, np.eye(4)) for node in reversed(_roots(document))]
    visited: set[object] = set()
    while stack:
        number, parent = stack.pop()
        node = document.item("nodes", number)
        if number in visited:
            raise ValueError(f"nodes[{number}] is in the scene twice; nodes have to form a tree")
        visited.add(number)
        # Most nodes of large scenes only group others.
        matrix = parent @ _local_matrix(node) if _PLACING & node.keys() else parent
        if "mesh" in node:
            yield node["mesh"], matrix
        stack += [(child, matrix) for child in reversed(field(node, "children", list, []))]


def _roots(document: Document) -> list[object]:
    if document.items("scenes"):
        scene = document.item("scenes", document.root.get("scene", 0))
        return field(scene, "nodes", list, [])
    # Without a scene it is for the reader to choose: all nodes that have no parent.
    nodes = [of_type(node, dict, "a node") for node in document.items("nodes")]
    children = {child for node in nodes for child in field(node, "children", list, []) if isinstance(child, int)}
    return [number for number in range(len(nodes)) if number not in children]


def _local_matrix(node: JsonObject) -> Floats:
    if "matrix" in node:
        return np.array(numbers(node, "matrix", list(np.eye(4).reshape(-1)))).reshape(4, 4).T
    x, y, z, w = _unit(numbers(node, "rotation", [0.0, 0.0, 0.0, 1.0]))
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    ) * np.array(numbers(node, "scale", [1.0, 1.0, 1.0]))
    matrix[:3, 3] = numbers(node, "translation", [0.0, 0.0, 0.0])
    return matrix


def _unit(quaternion: list[float]) -> Floats:
    values = np.array(quaternion)
    length = float(np.linalg.norm(values))
    return values / length if length > 0 else np.array([0.0, 0.0, 0.0, 1.0])


def _moved(shape: Shape, matrix: Floats) -> Shape:
    vertices = shape.vertices @ matrix[:3, :3].T + matrix[:3, 3]
    if np.linalg.det(matrix[:3, :3]) >= 0:
        return replace(shape, vertices=vertices)
    # A mirrored mesh keeps its front in front: the sense of rotation of its triangles is mirrored back.
    return Shape(
        vertices,
        shape.faces[:, ::-1],
        shape.face_skins,
        shape.skins,
        None if shape.uv is None else shape.uv[:, ::-1],
        None if shape.colours is None else shape.colours[:, ::-1],
    )


# ---------------------------------------------------------------------- meshes


class _Reader:
    """Reads meshes and the materials they use, each once."""

    def __init__(self, document: Document, source: Source) -> None:
        self._document = document
        self._source = source
        self._meshes: dict[object, Shape] = {}
        self._skins: list[Skin] = []
        self._skin_numbers: dict[object, int] = {}
        self._faces = 0
        self._parts = 0

    def skins(self) -> tuple[Skin, ...]:
        return tuple(self._skins)

    def mesh(self, number: object) -> Shape:
        self._count_parts(1)
        item = self._document.item("meshes", number)
        if number not in self._meshes:
            self._count_parts(len(field(item, "primitives", list)))
            primitives = [self._primitive(of_type(p, dict, "a primitive")) for p in field(item, "primitives", list)]
            shapes = [shape for shape in primitives if shape is not None]
            self._meshes[number] = joined(shapes) if shapes else _empty()
        return self._meshes[number]

    def _count_parts(self, more: int) -> None:
        self._parts += more
        if self._parts > _MAX_PARTS:
            raise InputError(f"{self._source.files.name}: has more than {_MAX_PARTS} parts; join some of its meshes")

    def _skin(self, number: object) -> int:
        if number not in self._skin_numbers:
            self._skin_numbers[number] = len(self._skins)
            # Without a material things are white in glTF.
            self._skins.append(WHITE if number is None else self._material(number))
        return self._skin_numbers[number]

    def _material(self, number: object) -> Skin:
        item = self._document.item("materials", number)
        try:
            return read_material(self._document, item, self._source.pictures)
        except ValueError as error:
            self._source.remarks.add(f"materials[{number}] is damaged ({error}); white is used")
            return WHITE

    def _primitive(self, item: JsonObject) -> Shape | None:
        """The triangles of a primitive with the vertices that they use; None without any."""
        mode = field(item, "mode", int, _TRIANGLES)
        attributes = field(item, "attributes", dict)
        if mode not in (_TRIANGLES, _STRIP, _FAN) or "POSITION" not in attributes:
            return None
        positions = self._document.accessor(attributes["POSITION"], 3)
        corners = self._corners(item, mode, len(positions))
        if not len(corners):
            return None
        used, faces = np.unique(corners, return_inverse=True)
        if used[0] < 0 or used[-1] >= len(positions):
            raise ValueError(f"a triangle refers to vertex {used[-1]} of {len(positions)}")
        faces = faces.reshape(-1, 3).astype(np.int64)
        skin = self._skin(item.get("material"))
        uv = self._attribute(attributes, f"TEXCOORD_{self._skins[skin].uv_set}", used, 2)
        colours = self._attribute(attributes, "COLOR_0", used, 3, 4)
        return Shape(
            vertices=positions.rows(used),
            faces=faces,
            face_skins=np.full(len(faces), skin),
            skins=(),
            # v counts downwards in glTF.
            uv=None if uv is None else (uv * [1, -1] + [0, 1])[faces],
            colours=None if colours is None else _display_colours(colours)[faces],
        )

    def _corners(self, item: JsonObject, mode: int, vertices: int) -> NDArray[np.int64]:
        """[F, 3] rows of the attributes."""
        indices: Accessor | None = None
        if "indices" in item:
            indices = self._document.accessor(item["indices"], 1)
        count = vertices if indices is None else len(indices)
        triangles = max(count // 3 if mode == _TRIANGLES else count - 2, 0)
        # Before anything of that size is made.
        self._faces += triangles
        self._source.check_faces(self._faces)
        order = np.arange(triangles)
        if mode == _TRIANGLES:
            corners = np.arange(3 * triangles).reshape(-1, 3)
        elif mode == _STRIP:
            # Every other triangle of a strip turns the other way.
            odd = order % 2
            corners = np.stack([order, order + 1 + odd, order + 2 - odd], axis=1)
        else:
            corners = np.stack([order + 1, order + 2, np.zeros_like(order)], axis=1)
        if indices is None:
            return corners
        if indices.values.dtype.kind != "u":
            raise ValueError("indices are not unsigned integers")
        return indices.rows(corners.reshape(-1)).astype(np.int64).reshape(-1, 3)

    def _attribute(self, attributes: JsonObject, name: str, used: NDArray[np.int64], *widths: int) -> Floats | None:
        """Rows of an attribute for the used vertices; None if it is absent or too short."""
        if name not in attributes:
            return None
        accessor = self._document.accessor(attributes[name], *widths)
        if used[-1] >= len(accessor):
            self._source.remarks.add(f"the attribute {name} has fewer rows than there are vertices and is left out")
            return None
        return accessor.rows(used)


def _display_colours(colours: Floats) -> Floats:
    """[V, 4] display values from linear red, green, blue and perhaps alpha."""
    alpha = colours[:, 3:] if colours.shape[1] == 4 else np.ones((len(colours), 1))
    return np.concatenate([linear_to_display(colours[:, :3]), alpha], axis=1)
