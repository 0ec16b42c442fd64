"""`Shape`: what the readers of the file formats return; here it becomes a `Mesh`, without what cannot be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenizer.assets.files import AssetFiles
from tokenizer.assets.materials import Pictures, Remarks, Skin
from tokenizer.assets.mesh import Floats, Material, Mesh
from tokenizer.errors import InputError

# A triangle this many times lower than long has no area that a view could show; in float32 files it is rounding noise.
_FLAT: Final = 1e-10
# Rays are cast in float32: what it cannot hold is as good as infinite.
_LARGEST: Final = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Source:
    """What a reader works with besides the bytes of the asset."""

    files: AssetFiles
    pictures: Pictures
    remarks: Remarks
    max_faces: int

    def check_faces(self, count: int) -> None:
        """Raise `InputError` if the asset would get more than `max_faces` triangles."""
        if count > self.max_faces:
            raise InputError(
                f"{self.files.name}: has at least {count} faces, more than the {self.max_faces} allowed; "
                "simplify it or raise max_faces"
            )


@dataclass(frozen=True, slots=True)
class Shape:
    """F triangles in the axes of the file, as they were read: numbers may be NaN, triangles may be flat.

    vertices: [V, 3] float64.
    faces: [F, 3] int64 rows of `vertices`, all in range.
    face_skins: [F] int64 rows of `skins`.
    uv: [F, 3, 2] as stored, v up; NaN where a corner has none; None where no corner has.
    colours: [F, 3, 4] in 0..1, display values, or None.
    """

    vertices: Floats
    faces: NDArray[np.int64]
    face_skins: NDArray[np.int64]
    skins: tuple[Skin, ...]
    uv: Floats | None = None
    colours: Floats | None = None


def joined(shapes: Sequence[Shape]) -> Shape:
    """Shapes that share their `skins`, as one."""
    if len(shapes) == 1:
        return shapes[0]
    starts = np.cumsum([0, *(len(shape.vertices) for shape in shapes[:-1])])
    counts = [len(shape.faces) for shape in shapes]
    return Shape(
        vertices=np.concatenate([shape.vertices for shape in shapes]),
        faces=np.concatenate([shape.faces + start for shape, start in zip(shapes, starts, strict=True)]),
        face_skins=np.concatenate([shape.face_skins for shape in shapes]),
        skins=shapes[0].skins,
        uv=_stacked([shape.uv for shape in shapes], counts, (3, 2), np.nan),
        colours=_stacked([shape.colours for shape in shapes], counts, (3, 4), 1.0),
    )


def _stacked(
    parts: Sequence[Floats | None], counts: Sequence[int], tail: tuple[int, ...], fill: float
) -> Floats | None:
    if all(part is None for part in parts):
        return None
    full = [np.full((count, *tail), fill) if part is None else part for part, count in zip(parts, counts, strict=True)]
    return np.concatenate(full)


def to_mesh(shape: Shape, name: str, remarks: Remarks) -> Mesh:
    """The drawable part of a shape, in the axes of the file.

    Triangles that touch a vertex that is not finite are dropped with a remark, those without area, of which many files
    have some, without; and so are the vertices and materials that nothing uses then.

    Raises:
        InputError: nothing is left.
    """
    if not len(shape.faces):
        raise InputError(f"{name}: has no faces; only surfaces can be used, not points or lines")
    sound = _finite(shape)
    kept = sound & _with_area(shape)
    if not kept.any():
        raise InputError(f"{name}: none of its {len(shape.faces)} faces can be drawn (no area, or vertices not finite)")
    if lost := int((~sound).sum()):
        remarks.add(f"{lost} of {len(shape.faces)} triangles have a vertex that is not finite and are left out")
    used, faces = np.unique(shape.faces[kept], return_inverse=True)
    uv = None if shape.uv is None else shape.uv[kept]
    face_skins, skins, uv = _texture_coordinates(shape.face_skins[kept], shape.skins, uv)
    materials, face_materials = _used_materials(face_skins, skins)
    colours = None if shape.colours is None else shape.colours[kept]
    return Mesh(
        vertices=np.ascontiguousarray(shape.vertices[used], dtype=np.float64),
        faces=faces.reshape(-1, 3).astype(np.int64),
        face_materials=face_materials,
        materials=materials,
        uv=None if uv is None else uv.astype(np.float32),
        colours=None if colours is None else np.clip(np.nan_to_num(colours, nan=1.0), 0, 1).astype(np.float32),
    )


def _finite(shape: Shape) -> NDArray[np.bool_]:
    """[F] whether a triangle has corners that are numbers of a reasonable size."""
    corners: NDArray[np.bool_] = np.all(_usable(shape.vertices)[shape.faces], axis=1)
    return corners


def _usable(vertices: Floats) -> NDArray[np.bool_]:
    usable: NDArray[np.bool_] = np.all(np.abs(vertices) <= _LARGEST, axis=1)
    return usable


def _with_area(shape: Shape) -> NDArray[np.bool_]:
    """[F] whether a triangle of finite corners has an area."""
    vertices = np.where(_usable(shape.vertices)[:, None], shape.vertices, 0)
    # Scaled to 1, so that neither huge nor tiny assets leave the range of the products below.
    vertices = vertices / max(float(np.abs(vertices).max(initial=0)), np.finfo(np.float64).tiny)
    a, b, c = (vertices[shape.faces[:, corner]] for corner in range(3))
    longest = np.maximum(np.maximum(_squared(b - a), _squared(c - b)), _squared(a - c))
    wide: NDArray[np.bool_] = np.sqrt(_squared(np.cross(b - a, c - a))) > _FLAT * longest
    return wide


def _squared(vectors: Floats) -> Floats:
    squared: Floats = np.einsum("ij,ij->i", vectors, vectors)
    return squared


def _texture_coordinates(
    face_skins: NDArray[np.int64], skins: tuple[Skin, ...], uv: Floats | None
) -> tuple[NDArray[np.int64], tuple[Skin, ...], Floats | None]:
    """Texture coordinates as textures want them; triangles without any get the plain variant of their material."""
    textured = np.array([skin.material.texture is not None for skin in skins])
    if not textured[face_skins].any():
        return face_skins, skins, None
    missing: NDArray[np.bool_] = np.full(len(face_skins), True)
    if uv is not None:
        missing = np.any(~np.isfinite(uv), axis=(1, 2))
    plain = tuple(Skin(_plain(skin.material)) for skin in skins)
    face_skins = face_skins + len(skins) * (missing & textured[face_skins])
    if uv is None:
        return face_skins, skins + plain, None
    uv = np.where(missing[:, None, None], 0, uv)
    for number, skin in enumerate(skins):
        if skin.uv_matrix is not None:
            rows = face_skins == number
            uv[rows] = uv[rows] @ skin.uv_matrix[:, :2].T + skin.uv_matrix[:, 2]
    return face_skins, skins + plain, uv


def _used_materials(
    face_skins: NDArray[np.int64], skins: tuple[Skin, ...]
) -> tuple[tuple[Material, ...], NDArray[np.int64]]:
    """The materials that triangles have, each once, and their rows for the triangles."""
    used, rows = np.unique(face_skins, return_inverse=True)
    # Names that a file does not define all stand for the same material.
    numbers: dict[int, int] = {}
    merged = np.array([numbers.setdefault(id(skins[number].material), len(numbers)) for number in used])
    by_id = {id(skin.material): skin.material for skin in skins}
    return tuple(by_id[number] for number in numbers), merged[rows.reshape(-1)].astype(np.int64)


def _plain(material: Material) -> Material:
    return replace(material, texture=None, alpha="blend" if material.colour[3] < 1 else "opaque")
