"""Assets in files: every format gives the same triangles, materials come out as their files mean them.

glTF has its tests in test_assets_gltf, damaged and hostile files in test_assets_damage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.tokenizer.asset_files import (
    CORNER,
    SIDES,
    SPLIT,
    SQUARE,
    SQUARE_UV,
    WRITERS,
    corners,
    lines,
    load,
    only,
    plain_png,
    ply_file,
    png,
)
from tokenizer.assets.load import ASSET_ENDINGS, is_asset, load_mesh
from tokenizer.assets.materials import AssetWarning
from tokenizer.assets.mesh import Material
from tokenizer.errors import InputError

Array = NDArray[Any]

Y_UP = (".obj", ".glb", ".gltf")

# ---------------------------------------------------------------------- every format


@st.composite
def triangles(draw: st.DrawFn) -> tuple[Array, Array]:
    """Vertices in float32 and triangles with an area."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, scale = draw(st.integers(3, 12)), 10.0 ** draw(st.integers(-4, 4))
    vertices = (scale * rng.normal(size=(count, 3))).astype(np.float32).astype(np.float64)
    faces = np.array([rng.permutation(count)[:3] for _ in range(draw(st.integers(1, 9)))])
    return vertices, faces


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(triangles())
def test_every_format_gives_its_triangles(kind: str, shape: tuple[Array, Array]) -> None:
    vertices, faces = shape
    name, write = WRITERS[kind]
    mesh = load(write(vertices, faces), name)
    scale = np.abs(vertices).max()
    np.testing.assert_allclose(corners(mesh), vertices[faces], rtol=0, atol=1e-9 * scale)
    up = 1 if name.endswith(Y_UP) else 2
    np.testing.assert_allclose(mesh.vertices[mesh.faces][..., 2], vertices[faces][..., up], rtol=0, atol=1e-9 * scale)
    assert len(mesh.materials) == 1
    assert len(mesh.face_materials) == len(mesh.faces)


def test_files_and_archives_agree(tmp_path: Path) -> None:
    for name, write in WRITERS.values():
        path = tmp_path / "folder" / name.upper()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(write(CORNER, SIDES))
        assert is_asset(path)
        np.testing.assert_array_equal(corners(load_mesh(path)), corners(load(write(CORNER, SIDES), name)))
    assert {Path(name).suffix for name, _ in WRITERS.values()} == set(ASSET_ENDINGS)
    assert not is_asset("picture.png")


@pytest.mark.parametrize("name", ["a.obj", "a.stl"])
def test_up_is_the_axis_that_is_said(name: str) -> None:
    write = dict(WRITERS.values())[name]
    for up, matrix in (("y", [[1, 0, 0], [0, 0, -1], [0, 1, 0]]), ("z", np.eye(3))):
        mesh = load(write(CORNER, SIDES), name, up=up)
        np.testing.assert_array_equal(mesh.vertices[mesh.faces], CORNER[SIDES] @ np.array(matrix).T)
        normalised = mesh.normalised()
        np.testing.assert_allclose(corners(normalised), CORNER[SIDES], atol=1e-12)
    with pytest.raises(InputError, match="up is 'auto', 'y' or 'z', not 'x'"):
        load(write(CORNER, SIDES), name, up="x")


@pytest.mark.parametrize("kind", WRITERS)
def test_what_cannot_be_drawn_is_dropped(kind: str) -> None:
    name, write = WRITERS[kind]
    bad = np.array([[np.nan, 0, 0], [np.inf, 1, 0], [5.0, 5, 5], [6, 6, 6], [7, 7, 7]])
    vertices = np.concatenate([bad, CORNER])
    sound = SIDES + len(bad)
    faces = np.concatenate([[[0, 5, 6], [5, 1, 6], [2, 3, 4], [5, 5, 6]], sound])  # not finite twice, no area twice
    with pytest.warns(AssetWarning, match=rf"2 of {len(faces)} triangles have a vertex that is not finite") as told:
        mesh = load(write(vertices, faces), name, silent=False)
    assert len(told) == 1
    np.testing.assert_array_equal(corners(mesh), CORNER[SIDES])
    assert np.isfinite(mesh.vertices).all()
    with pytest.raises(InputError, match=r"none of its 4 faces can be drawn \(no area, or vertices not finite\)$"):
        load(write(vertices, faces[:4]), name)


# ---------------------------------------------------------------------- OBJ and MTL


def test_obj_in_all_its_dialects() -> None:
    text = (
        "# comment\r\nmtllib first.mtl\r\nmtllib sub/second one.mtl\r\n"
        "v 0 0 0\r\nv 1 0 0\r\nv 0 2 0\r\nvt 0.5 0.25\r\n"
        "usemtl red\r\nf -3 -2 -1\r\n"  # relative to here, not to the end
        "  v   0 0 3 1.0\r\nvt 1 1\r\nvt 0 1\r\n"
        "usemtl in two words\r\nf\t1/-3/ 2 \\\r\n  4/3\r\n"
        "usemtl red\r\nf 2//7 3//7 4//7 # comment\r\nf 1/1 3 4/9\r\nl 1 2\r\nf 1 2\r\n"
    )
    materials = {"first.mtl": b"newmtl red\nKd 1 0 0\n", "sub/second one.mtl": b"newmtl in two words\nKd 0 1 0\nd .5"}
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        mesh = load(text.encode(encoding), "a.obj", materials)
        np.testing.assert_array_equal(corners(mesh), CORNER[[[0, 1, 2], [0, 1, 3], [1, 2, 3], [0, 2, 3]]])
        colours = [mesh.materials[number].colour for number in mesh.face_materials]
        assert colours == [(1, 0, 0, 1), (0, 1, 0, 0.5), (1, 0, 0, 1), (1, 0, 0, 1)]
        assert {material.alpha for material in mesh.materials} == {"opaque", "blend"}


def test_an_obj_may_name_several_material_files_in_a_line() -> None:
    text = f"mtllib a.mtl b c.mtl b.mtl\n{lines('v', CORNER)}usemtl red\nf 1 2 3\nusemtl blue\nf 1 3 2\n"
    materials = {"a.mtl": b"newmtl red\nKd 1 0 0\n", "b.mtl": b"newmtl blue\nKd 0 0 1\n"}
    with pytest.warns(AssetWarning) as remarks:
        mesh = load(text, "a.obj", materials, silent=False)
    assert [material.colour[:3] for material in mesh.materials] == [(1, 0, 0), (0, 0, 1)]
    said = [str(remark.message).partition("material file ")[2].partition(" is not")[0] for remark in remarks]
    assert said == ["'b'", "'c.mtl'"]
    # One file with spaces in its name goes before files of its words.
    whole = {"a.mtl b c.mtl b.mtl": b"newmtl red\nKd 0 1 0\nnewmtl blue\nKd 0 1 1\n"}
    mesh = load(text, "a.obj", materials | whole)
    assert [material.colour[:3] for material in mesh.materials] == [(0, 1, 0), (0, 1, 1)]
    with pytest.warns(AssetWarning) as remarks:
        load(text, "a.obj", silent=False)
    assert "material file 'a.mtl b c.mtl b.mtl' is not found" in str(remarks[0].message)


def test_obj_with_colours_of_vertices() -> None:
    for scale in (1, 255):
        table = np.concatenate([CORNER, scale * np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.4, 0.6]])], axis=1)
        mesh = load(lines("v", table) + lines("f", SIDES + 1), "a.obj")
        assert mesh.colours is not None
        expected = np.pad(table[:, 3:] / scale, ((0, 0), (0, 1)), constant_values=1)[SIDES]
        np.testing.assert_allclose(mesh.colours, expected, atol=1e-6)
        assert only(mesh).colour == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("uchar", 255),
        ("ushort", 65535),
        ("int", 255),
        ("uint", 255),
        ("uint", 2**32 - 1),
        ("float", 1),
        ("double", 255),
    ],
)
def test_ply_with_colours_of_any_type(kind: str, most: int) -> None:
    """255 of 32 bits is no black: that many bits hold 0..255 where somebody chose a type that always fits."""
    shares = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 0.6], [0.2, 0.4, 0.6]])
    colours = shares * most if kind in ("float", "double") else (shares * most).round().astype(np.int64)
    channels = "".join(f"property {kind} {name}\n" for name in ("red", "green", "blue"))
    axes = "".join(f"property float {axis}\n" for axis in "xyz")
    header = f"ply\nformat ascii 1.0\nelement vertex 4\n{axes}{channels}property uchar alpha\n"
    faces = f"element face {len(SIDES)}\nproperty list uchar int vertex_indices\nend_header\n"
    rows = [[*place, *colour, 128] for place, colour in zip(CORNER.tolist(), colours.tolist(), strict=True)]
    mesh = load(header + faces + lines("", np.array(rows)) + lines("3", SIDES), "a.ply")
    assert mesh.colours is not None
    expected = np.pad(shares, ((0, 0), (0, 1)), constant_values=128 / 255)[SIDES]
    np.testing.assert_allclose(mesh.colours, expected, atol=1 / 500)


@pytest.mark.parametrize("name", ["a.obj", "a.ply"])
def test_colours_that_rounding_leads_beyond_one_are_not_black(name: str) -> None:
    table = np.concatenate([CORNER, np.full((4, 3), 1.0001)], axis=1)
    properties = "".join(f"property float {column}\n" for column in ("x", "y", "z", "red", "green", "blue"))
    faces = f"element face {len(SIDES)}\nproperty list uchar int vertex_indices\nend_header\n"
    ply = f"ply\nformat ascii 1.0\nelement vertex 4\n{properties}{faces}{lines('', table)}{lines('3', SIDES)}"
    mesh = load(ply if name == "a.ply" else lines("v", table) + lines("f", SIDES + 1), name)
    assert mesh.colours is not None
    assert mesh.colours.min() == 1


def textured_obj() -> str:
    corner_numbers = np.array([[1, 2, 3], [1, 3, 4]])
    faces = "".join(f"f {' '.join(f'{c}/{c}' for c in face)}\n" for face in corner_numbers.tolist())
    return f"mtllib a.mtl\n{lines('v', SQUARE)}{lines('vt', SQUARE_UV)}usemtl m\n{faces}"


PICTURE = plain_png(10, 20, 30)
CUTOUT = png(np.array([[[9, 9, 9, 255], [9, 9, 9, 0]]]))


@pytest.mark.parametrize(
    ("mtl", "colour", "alpha", "pixel", "wrap", "highest_uv"),
    [
        ("Kd 0.5 0.25 1\nmap_Kd wood oak.png", (0.5, 0.25, 1, 1), "opaque", (10, 20, 30, 255), "repeat", (1, 1)),
        ("kd 0 0 0\nmap_kd -clamp on -s 2 3 1 -o .5 wood oak.png", (1, 1, 1, 1), "opaque", (10, 20, 30, 255), "clamp",
         (2.5, 3)),
        ("Kd 1 1 1\nmap_Kd -bm 1 .\\WOOD oak.PNG\nTr 0.75", (1, 1, 1, 0.25), "blend", (10, 20, 30, 255), "repeat",
         (1, 1)),
        ("Kd 1 1 1\nd 0.5\nTr 0.1\nmap_Kd cut.png", (1, 1, 1, 0.5), "blend", (9, 9, 9, 255), "repeat", (1, 1)),
        ("Kd 1 1 1\nmap_Kd cut.png\nmap_d cut.png", (1, 1, 1, 1), "mask", (9, 9, 9, 255), "repeat", (1, 1)),
        ("Kd 1 1 1\nmap_Kd wood oak.png\nmap_d grey.png", (1, 1, 1, 1), "blend", (10, 20, 30, 64), "repeat", (1, 1)),
        ("Kd .1 .2 .3\nmap_d grey.png", (0.1, 0.2, 0.3, 1), "blend", (255, 255, 255, 64), "repeat", (1, 1)),
    ],
)  # fmt: skip
def test_mtl(
    mtl: str,
    colour: tuple[float, ...],
    alpha: str,
    pixel: tuple[int, ...],
    wrap: str,
    highest_uv: tuple[float, float],
) -> None:
    files = {
        "a.mtl": f"newmtl other\nmap_Kd missing.png\nnewmtl m\n{mtl}\n".encode(),
        "wood oak.png": PICTURE,
        "cut.png": CUTOUT,
        "grey.png": plain_png(64, 64, 64, size=5),
    }
    mesh = load(textured_obj(), "a.obj", files)
    material = only(mesh)
    assert material.texture is not None
    assert mesh.uv is not None
    assert material.colour == pytest.approx(colour)
    assert material.alpha == alpha
    assert tuple(material.texture.pixels[0, 0]) == pixel
    assert {material.texture.wrap_u, material.texture.wrap_v} == {wrap}
    np.testing.assert_allclose(mesh.uv.reshape(-1, 2).max(axis=0), highest_uv)


def test_faces_without_texture_coordinates_take_the_plain_colour() -> None:
    text = textured_obj() + "f 1 2 4\n"
    files = {"a.mtl": b"newmtl m\nKd 0.5 0.5 1\nmap_Kd p.png\n", "p.png": PICTURE}
    mesh = load(text, "a.obj", files)
    textures = [mesh.materials[number].texture is not None for number in mesh.face_materials]
    assert textures == [True, True, False]
    assert {material.colour for material in mesh.materials} == {(0.5, 0.5, 1, 1)}


# ---------------------------------------------------------------------- PLY and OFF

POLYGONS = [[0, 1, 2, 3], [0, 1, 4], [1, 2, 4], [4, 3, 2], [0, 4, 3]]  # a square and a roof: mixed sizes
ROOF = np.concatenate([SQUARE, [[0.5, 0.5, 1]]])
CUT_ROOF = [[0, 1, 2], [0, 2, 3], *POLYGONS[1:]]


@pytest.mark.parametrize("kind", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_ply_with_mixed_polygons_and_colours(kind: str) -> None:
    position = dict(zip("xyz", ROOF.T, strict=True))
    bright = np.arange(5)[:, None] * np.array([10, 20, 30]) + 5
    of_vertices = {name: bright[:, i].astype(np.uint8) for i, name in enumerate(("red", "green", "blue"))}
    of_faces: dict[str, list[Any]] = {name: list(0.1 * bright[:, i] / 15) for i, name in enumerate(("r", "g", "b"))}
    for vertex, face, expected in (
        (position, None, None),
        ({**position, **of_vertices}, of_faces, bright[np.array(CUT_ROOF)] / 255),
        (position, of_faces, np.repeat(0.1 * bright[[0, 0, 1, 2, 3, 4], None] / 15, 3, axis=1)),
    ):
        mesh = load(ply_file(kind, vertex, POLYGONS, face), "a.ply")
        np.testing.assert_array_equal(mesh.vertices[mesh.faces], ROOF[np.array(CUT_ROOF)])
        if expected is None:
            assert mesh.colours is None
        else:
            assert mesh.colours is not None
            np.testing.assert_allclose(mesh.colours[..., :3], expected, atol=1e-6)
            assert only(mesh) == Material((1, 1, 1, 1))


@pytest.mark.parametrize("of", ["vertices", "corners"])
def test_ply_with_textures(of: str) -> None:
    vertex = dict(zip("xyz", SQUARE.T, strict=True))
    face: dict[str, list[Any]] = {"texnumber": [1]}
    if of == "vertices":
        vertex |= dict(zip("st", SQUARE_UV.T, strict=True))
    else:
        face["texcoord"] = [SQUARE_UV.ravel()]
    comments = "comment TextureFile a b.png\ncomment TextureFile other.png\n"
    data = ply_file("binary_little_endian", vertex, [[0, 1, 2, 3]], face, comments)
    mesh = load(data, "a.ply", {"a b.png": PICTURE, "other.png": CUTOUT})
    texture = only(mesh).texture
    assert texture is not None
    assert texture.pixels.shape == (1, 2, 4)
    assert mesh.uv is not None
    np.testing.assert_array_equal(mesh.uv, SQUARE_UV[SPLIT.reshape(-1, 3)])


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        (("x", "y", "z"), "has no faces; only surfaces can be used, not points or lines"),
        (("x", "y", "z", "f_dc_0", "opacity", "scale_0", "rot_0"), "holds Gaussians, not a mesh; `atoken view`"),
    ],
)
def test_ply_without_faces(properties: tuple[str, ...], message: str) -> None:
    header = "".join(f"property float {name}\n" for name in properties)
    data = f"ply\nformat binary_little_endian 1.0\nelement vertex 1\n{header}end_header\n".encode()
    with pytest.raises(InputError, match=f"^a.ply: {message}"):
        load(data + bytes(4 * len(properties)), "a.ply")


def test_off_with_colours() -> None:
    colours = np.array([[255, 0, 0, 255], [0, 255, 0, 255], [0, 0, 255, 255], [51, 102, 153, 204]])
    vertices = np.concatenate([CORNER, colours], axis=1)
    mesh = load(f"COFF # colours\n\n4 4 6\n{lines('', vertices)}{lines('3', SIDES)}", "a.off")
    assert mesh.colours is not None
    np.testing.assert_allclose(mesh.colours, colours[SIDES] / 255, atol=1e-6)
    faces = "4 0 1 2 3 1.0 0.5 0.25\n3 0 1 4\n3 1 2 4 0 0 1 0.5\n3 4 3 2 7\n3 0 4 3\n"
    mesh = load(f"OFF 5 5 0\n{lines('', ROOF)}{faces}", "a.off")
    np.testing.assert_array_equal(mesh.vertices[mesh.faces], ROOF[np.array(CUT_ROOF)])
    expected = [[1, 0.5, 0.25, 1]] * 2 + [[1, 1, 1, 1]] + [[0, 0, 1, 0.5]] + [[1, 1, 1, 1]] * 2
    np.testing.assert_array_equal(mesh.colours, np.repeat(np.array(expected, np.float32)[:, None], 3, axis=1))
