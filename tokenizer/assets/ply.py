"""PLY as a mesh: polygons of any and of mixed sizes, colours of vertices or faces, textures.

trimesh reads PLY too, but of binary files only those whose faces all have as many corners as the first one, which is
not what Blender writes. Clouds of points or of Gaussians come as .ply as well; they have no faces and are refused
(`tokenizer.gaussians.ply` reads the latter).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tokenizer.assets.materials import PLAIN, WHITE, Skin
from tokenizer.assets.mesh import Floats, Texture
from tokenizer.assets.ply_elements import Element, Header, locate, read_elements
from tokenizer.assets.polygons import Polygons, Triangles, cut_polygons
from tokenizer.assets.shapes import Shape, Source
from tokenizer.assets.text import scale_of_colours
from tokenizer.errors import InputError

_CORNERS: Final = ("vertex_indices", "vertex_index")
_UV: Final = (("s", "t"), ("u", "v"), ("texture_u", "texture_v"), ("texture_s", "texture_t"))
_COLOURS: Final = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"))
_UV_OF_CORNERS: Final = "texcoord"


def read_ply(data: bytes, source: Source) -> Shape:
    """The triangles of a PLY file.

    Raises:
        InputError: too many faces, or none because it holds points or Gaussians.
        ValueError: cut off, not PLY, or a face that refers to a vertex that does not exist.
    """
    headers, texture_names, body = read_elements(data)
    by_name = {header.name: header for header in headers}
    if "vertex" not in by_name:
        raise ValueError("it has no vertices")
    if "face" not in by_name or not by_name["face"].count:
        raise InputError(f"{source.files.name}: {_what_it_is(by_name['vertex'])}")
    source.check_faces(by_name["face"].count)

    elements = locate(headers, body)
    vertex, face = elements["vertex"], elements["face"]
    vertices = np.stack([vertex.column(axis).astype(np.float64) for axis in "xyz"], axis=1)
    triangles = cut_polygons(_polygons(face, source), vertices)
    colours = _colours(vertex, face, triangles)
    skins = _skins(texture_names, colours, source)
    face_skins = np.zeros(len(triangles.faces), np.int64)
    if len(skins) > 1 and face.has("texnumber"):
        face_skins = face.column("texnumber").astype(np.int64)[triangles.polygons].clip(0, len(skins) - 1)
    return Shape(
        vertices=vertices,
        faces=triangles.faces,
        face_skins=face_skins,
        skins=skins,
        uv=_texture_coordinates(vertex, triangles),
        colours=colours,
    )


def _what_it_is(vertex: Header) -> str:
    names = {item.name for item in vertex.properties}
    if {"f_dc_0", "opacity"} <= names:
        return "holds Gaussians, not a mesh; `atoken view` shows them"
    return "has no faces; only surfaces can be used, not points or lines"


def _polygons(face: Element, source: Source) -> list[Polygons]:
    name = next((name for name in _CORNERS if name in face.counts), "")
    if not name:
        raise ValueError(f"its faces have no list {' or '.join(_CORNERS)}")
    source.check_faces(int(np.maximum(face.counts[name] - 2, 0).sum()))
    return [
        Polygons(values.astype(np.int64), rows, _corner_uv(face, rows, values.shape[1]))
        for rows, values in face.lists(name)
    ]


def _corner_uv(face: Element, rows: NDArray[np.int64], corners: int) -> Floats | None:
    """[len(rows), corners, 2] texture coordinates that belong to the corners of faces, as MeshLab writes them."""
    if _UV_OF_CORNERS not in face.counts:
        return None
    uv = np.full((len(rows), corners, 2), np.nan)
    fit = face.counts[_UV_OF_CORNERS][rows] == 2 * corners
    uv[fit] = face.values(_UV_OF_CORNERS, rows[fit], 2 * corners).reshape(-1, corners, 2)
    return uv


def _texture_coordinates(vertex: Element, triangles: Triangles) -> Floats | None:
    """[F, 3, 2] of corners, or of vertices."""
    if triangles.corners is not None:
        return triangles.corners
    names = next((pair for pair in _UV if vertex.has(*pair)), None)
    if names is None:
        return None
    return np.stack([vertex.column(name).astype(np.float64) for name in names], axis=1)[triangles.faces]


def _colours(vertex: Element, face: Element, triangles: Triangles) -> Floats | None:
    """[F, 3, 4] of vertices, or of faces; those of vertices are the finer ones."""
    of_vertices = _rgba(vertex)
    if of_vertices is not None:
        return of_vertices[triangles.faces]
    of_faces = _rgba(face)
    return None if of_faces is None else np.repeat(of_faces[triangles.polygons, None], 3, axis=1)


def _rgba(element: Element) -> Floats | None:
    """[rows, 4] in 0..1."""
    names = next((names for names in _COLOURS if element.has(*names)), None)
    if names is None:
        return None
    colours = _shares([element.column(name) for name in names])
    alpha = _shares([element.column("alpha")]) if element.has("alpha") else np.ones((len(colours), 1))
    return np.concatenate([colours, alpha], axis=1)


def _shares(columns: Sequence[NDArray[Any]]) -> Floats:
    """[rows, columns] in 0..1. Integers fill their range; those of 32 bits, and floats, often hold 0..255 as well."""
    values = np.stack(columns, axis=1)
    if values.dtype.kind == "f":
        return values.astype(np.float64) / scale_of_colours(values)
    greatest = np.iinfo(values.dtype).max
    return values / (255 if values.dtype.itemsize >= 4 and (values <= 255).all() else greatest)


def _skins(texture_names: Sequence[str], colours: Floats | None, source: Source) -> tuple[Skin, ...]:
    """One skin for each texture, or one without any."""
    base = PLAIN if colours is None else WHITE
    alpha = 1.0 if colours is None else float(np.nanmin(colours[..., 3], initial=1.0))
    skins = []
    for name in texture_names or ("",):
        pixels = source.pictures.get(name, name, partial(source.files.read, name)) if name else None
        texture = None if pixels is None else Texture(pixels)
        material = replace((base if texture is None else WHITE).material, texture=texture)
        skins.append(Skin(replace(material, alpha=source.pictures.alpha_mode(alpha, texture))))
    return tuple(skins)
