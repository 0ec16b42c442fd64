"""glTF: scenes, accessors, materials and samplers, each against the words of the specification."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.tokenizer.asset_files import (
    CORNER,
    SIDES,
    SPLIT,
    SQUARE,
    SQUARE_UV,
    Gltf,
    corners,
    load,
    only,
    plain_png,
)
from tokenizer.assets.mesh import Mesh
from tokenizer.errors import InputError

Array = NDArray[Any]

INDICES = SIDES.astype(np.uint8).ravel()


def tetrahedron() -> tuple[Gltf, int]:
    file = Gltf()
    return file, file.mesh(CORNER, INDICES)


def textured_square() -> Gltf:
    """A square with a texture at (0, 0, 0)..(1, 1, 0); the upper left corner of the picture lies at (0, 1, 0)."""
    file = Gltf()
    texture = file.texture(plain_png(10, 20, 30), wrapS=33071, wrapT=33648)
    down = np.array([[u, 1 - v] for u, v in SQUARE_UV], np.float32)
    uv = {"TEXCOORD_0": file.accessor(down)}
    material = file.material(baseColorTexture={"index": texture})
    file.place(file.mesh(SQUARE, SPLIT.astype(np.uint8), attributes=uv, material=material))
    return file


def moved(matrix: Any, mesh: Mesh) -> None:
    """The only mesh is the tetrahedron after the matrix [3 or 4, 4]."""
    matrix = np.asarray(matrix)
    np.testing.assert_allclose(corners(mesh), CORNER[SIDES] @ matrix[:3, :3].T + matrix[:3, 3], atol=1e-9)


# ---------------------------------------------------------------------- scene


def test_nodes_are_multiplied_from_the_root() -> None:
    quarter = math.sqrt(0.5)  # a quarter turn about z: x -> y
    outer = np.array([[0, -2, 0, 1], [2, 0, 0, 2], [0, 0, 2, 3], [0, 0, 0, 1.0]])
    inner = np.array([[1, 0.5, 0, 4], [0, 1, 0, 5], [0, 0, 3, 6], [0, 0, 0, 1.0]])
    file, mesh = tetrahedron()
    child = file.add("nodes", {"mesh": mesh, "matrix": inner.T.ravel().tolist()})
    empty = file.add("nodes", {"children": [child]})
    root: dict[str, Any] = {
        "children": [empty],
        "translation": [1, 2, 3],
        "rotation": [0, 0, quarter, quarter],
        "scale": [2, 2, 2],
    }
    file.tree["scenes"][0]["nodes"].append(file.add("nodes", root))
    moved(outer @ inner, load(file.glb(), "a.glb"))
    del file.tree["scene"], file.tree["scenes"]
    moved(outer @ inner, load(file.gltf(), "a.gltf"))


def test_only_the_default_scene_counts_and_meshes_may_be_placed_often() -> None:
    file, mesh = tetrahedron()
    file.add("nodes", {"mesh": mesh, "scale": [9, 9, 9]})
    for shift in (10, 20):
        file.place(mesh, translation=[shift, 0, 0])
    file.tree["scenes"].insert(0, {"nodes": [0]})
    file.tree["scene"] = 1
    x = corners(load(file.glb(), "a.glb"))[..., 0]
    np.testing.assert_array_equal(x, np.concatenate([CORNER[SIDES][..., 0] + 10, CORNER[SIDES][..., 0] + 20]))


def test_mirrored_meshes_keep_their_outside_outside() -> None:
    def volume(mesh: Mesh) -> float:
        return float(np.linalg.det(mesh.vertices[mesh.faces]).sum() / 6)

    file, mesh = tetrahedron()
    file.place(mesh, scale=[-1, 1, 1])
    assert volume(load(file.glb(), "a.glb")) == pytest.approx(1)


@pytest.mark.parametrize(("mode", "order"), [(5, [0, 1, 3, 2]), (6, [0, 1, 2, 3])])
@pytest.mark.parametrize("indexed", [True, False])
def test_strips_and_fans(mode: int, order: list[int], indexed: bool) -> None:
    file = Gltf()
    numbers = np.array(order, np.uint16)
    mesh = file.mesh(SQUARE, numbers, mode=mode) if indexed else file.mesh(SQUARE[order], mode=mode)
    file.tree["meshes"][mesh]["primitives"] += [{"attributes": {}}, {"attributes": {"POSITION": 0}, "mode": 1}]
    file.place(mesh)
    cut = corners(load(file.glb(), "a.glb"))
    normals = np.cross(cut[:, 1] - cut[:, 0], cut[:, 2] - cut[:, 0])
    np.testing.assert_array_equal(normals, [[0, 0, 1], [0, 0, 1]])  # both half a square, both facing the same way


# ---------------------------------------------------------------------- accessors


def test_accessors_may_be_strided_sparse_and_normalised() -> None:
    # Positions between other data.
    file = Gltf()
    rows = np.zeros((4, 20), np.uint8)
    rows[:, 4:16] = CORNER.astype(np.float32).view(np.uint8)
    view = file.view(rows.tobytes(), byteStride=20)
    part = {"bufferView": view, "byteOffset": 4, "componentType": 5126, "count": 4, "type": "VEC3"}
    strided = file.add("accessors", part)
    # Zeros, of which a sparse accessor replaces the last three; and a table of which it replaces one.
    sparse = {"count": 3, "indices": {"bufferView": file.view(bytes([1, 2, 3])), "componentType": 5121},
              "values": {"bufferView": file.view(CORNER[1:].astype(np.float32).tobytes())}}  # fmt: skip
    zeros = file.add("accessors", {"componentType": 5126, "count": 4, "type": "VEC3", "sparse": sparse})
    wrong = CORNER.copy()
    wrong[2] = 77
    one = {"count": 1, "indices": {"bufferView": file.view(bytes([2])), "componentType": 5121},
           "values": {"bufferView": file.view(CORNER[2].astype(np.float32).tobytes())}}  # fmt: skip
    mended = file.accessor(wrong.astype(np.float32), sparse=one)
    # -127..127 and 0..65535 stand for -1..1 and 0..1 (KHR_mesh_quantization).
    signed = file.accessor((CORNER / 3 * 127).round().astype(np.int8), normalized=True)
    unsigned = file.accessor((CORNER / 3 * 65535).round().astype(np.uint16), normalized=True)
    indices = file.accessor(INDICES)
    for accessor, scale in ((strided, 1), (zeros, 1), (mended, 1), (signed, 3), (unsigned, 3)):
        file.tree["meshes"] = [{"primitives": [{"attributes": {"POSITION": accessor}, "indices": indices}]}]
        file.tree["nodes"] = [{"mesh": 0, "scale": [scale] * 3}]
        file.tree["scenes"] = [{"nodes": [0]}]
        # Eight bits are rounded to 1/127 of 3.
        tolerance = 0.012 if accessor == signed else 1e-4
        np.testing.assert_allclose(corners(load(file.glb(), "a.glb")), CORNER[SIDES], atol=tolerance)


def test_texture_coordinates_count_down_and_may_be_normalised() -> None:
    for dtype, scale in ((np.float32, 1), (np.uint8, 255), (np.uint16, 65535)):
        file = textured_square()
        down = np.array([[u, 1 - v] for u, v in SQUARE_UV])
        table = file.accessor((scale * down).astype(dtype), normalized=scale > 1)
        file.tree["meshes"][0]["primitives"][0]["attributes"]["TEXCOORD_0"] = table
        mesh = load(file.glb(), "a.glb")
        np.testing.assert_array_equal(mesh.uv, SQUARE_UV[SPLIT.reshape(-1, 3)])


def test_missing_rows_of_attributes_are_left_out() -> None:
    file = textured_square()
    short = file.accessor(np.zeros((3, 2), np.float32))
    file.tree["meshes"][0]["primitives"][0]["attributes"]["TEXCOORD_0"] = short
    with pytest.warns(UserWarning, match="a.glb: the attribute TEXCOORD_0 has fewer rows than there are vertices"):
        mesh = load(file.glb(), "a.glb", silent=False)
    assert only(mesh).texture is None


# ---------------------------------------------------------------------- materials


def srgb(linear: float) -> float:
    """IEC 61966-2-1."""
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055


def test_colours_become_display_values() -> None:
    file = Gltf()
    linear = np.array([[1, 0.5, 0.002, 0.25], [0, 0.2, 0.7, 1], [1, 1, 1, 0], [0.5, 0.5, 0.5, 0.5]], np.float32)
    material = file.material(baseColorFactor=[0.5, 0.001, 1, 0.75])
    file.tree["materials"][material] |= {"alphaMode": "MASK", "alphaCutoff": 0.3}
    for table, width in ((linear, 4), (linear[:, :3], 3), ((linear * 255).round().astype(np.uint8), 4)):
        colours = file.accessor(table, normalized=table.dtype == np.uint8)
        file.tree["scenes"] = [{"nodes": []}]
        file.place(file.mesh(CORNER, INDICES, attributes={"COLOR_0": colours}, material=material))
        mesh = load(file.glb(), "a.glb")
        assert mesh.colours is not None
        values = table / 255 if table.dtype == np.uint8 else table
        expected = np.array([[*map(srgb, row[:3].tolist()), row[3] if width == 4 else 1] for row in values])
        np.testing.assert_allclose(mesh.colours, expected[SIDES], atol=1e-6)
        assert only(mesh).colour == pytest.approx((srgb(0.5), srgb(0.001), 1, 0.75))
        assert (only(mesh).alpha, only(mesh).cutoff) == ("mask", 0.3)


def test_samplers_and_textures() -> None:
    texture = only(load(textured_square().glb(), "a.glb")).texture
    assert texture is not None
    assert (texture.wrap_u, texture.wrap_v) == ("clamp", "mirror")
    assert texture.pixels.shape == (2, 2, 4)
    assert texture.pixels[0, 0].tolist() == [10, 20, 30, 255]


def test_the_older_workflow_of_materials() -> None:
    file = textured_square()
    old = {"diffuseFactor": [0.25, 0.5, 1, 0.5], "diffuseTexture": {"index": 0}}
    file.tree["materials"] = [{"extensions": {"KHR_materials_pbrSpecularGlossiness": old}, "alphaMode": "BLEND"}]
    material = only(load(file.glb(), "a.glb"))
    assert material.texture is not None
    assert material.colour == pytest.approx((srgb(0.25), srgb(0.5), 1, 0.5))
    assert material.alpha == "blend"


@pytest.mark.parametrize(
    ("transform", "down"),
    [
        # Examples of the extension: the lower left quadrant, turned; and the other direction of v.
        ({"offset": [0, 1], "rotation": math.pi / 2, "scale": [0.5, 0.5]},
         lambda u, v: (v / 2, 1 - u / 2)),
        ({"offset": [0, 1], "scale": [1, -1]}, lambda u, v: (u, 1 - v)),
        ({"offset": [0.5, 0.25]}, lambda u, v: (u + 0.5, v + 0.25)),
    ],
)  # fmt: skip
def test_texture_transforms(transform: dict[str, Any], down: Any) -> None:
    file = textured_square()
    info = file.tree["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]
    info["extensions"] = {"KHR_texture_transform": transform}
    file.tree["extensionsRequired"] = ["KHR_texture_transform"]
    mesh = load(file.glb(), "a.glb")
    assert mesh.uv is not None
    expected = np.array([down(u, 1 - v) for u, v in SQUARE_UV])
    expected[:, 1] = 1 - expected[:, 1]
    np.testing.assert_allclose(mesh.uv, expected[SPLIT.reshape(-1, 3)], atol=1e-6)


@pytest.mark.parametrize("where", ["texCoord", "KHR_texture_transform"])
def test_the_second_set_of_texture_coordinates(where: str) -> None:
    file = textured_square()
    second = np.arange(8, dtype=np.float32).reshape(4, 2)
    file.tree["meshes"][0]["primitives"][0]["attributes"]["TEXCOORD_1"] = file.accessor(second)
    info = file.tree["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]
    if where == "texCoord":
        info["texCoord"] = 1
    else:
        info["extensions"] = {where: {"texCoord": 1}}
    expected = second * [1, -1] + [0, 1]
    np.testing.assert_array_equal(load(file.glb(), "a.glb").uv, expected[SPLIT.reshape(-1, 3)])


# ---------------------------------------------------------------------- other files


def test_buffers_and_pictures_in_other_files() -> None:
    file = textured_square()
    del file.tree["images"][0]["bufferView"]
    file.tree["images"][0]["uri"] = "pictures/oak%20wood.png"
    others = {"in/parts/a.bin": file.binary, "in/pictures/oak wood.png": plain_png(1, 2, 3)}
    texture = only(load(file.gltf("parts/a.bin"), "in/a.gltf", others)).texture
    assert texture is not None
    assert texture.pixels[0, 0].tolist() == [1, 2, 3, 255]
    file.tree["images"][0]["uri"] = "data:image/png;base64,AAAA"
    with pytest.warns(UserWarning, match=r"in/a.gltf: texture 'images\[0\]' cannot be used"):
        mesh = load(file.gltf("parts/a.bin"), "in/a.gltf", others, silent=False)
    assert only(mesh).texture is None
    with pytest.raises(InputError, match=r"^in/a.gltf: 'b.bin' is not found among the files of the asset$"):
        load(file.gltf("b.bin"), "in/a.gltf", others)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"asset": {"version": "1.0"}}, "is glTF 1.0, only 2.0 can be read; convert it"),
        ({"extensionsRequired": ["KHR_draco_mesh_compression"]}, "needs the glTF extension KHR_draco_mesh_compression"),
        ({"nodes": [{"children": [0]}]}, r"nodes\[0\] is in the scene twice"),
        ({"nodes": [{"mesh": 7}]}, r"there is no meshes\[7\]"),
        ({"nodes": [{"mesh": 0, "scale": [1, "2", 3]}]}, "'scale' is not 3 finite numbers"),
        ({"meshes": [{"primitives": {}}]}, "'primitives' is not of type list"),
        ({"meshes": [{"primitives": []}]}, "has no faces; only surfaces can be used"),
        ({"scenes": [{"nodes": [0]}], "scene": True}, "there is no scenes"),
    ],
)
def test_files_that_contradict_themselves(change: dict[str, Any], message: str) -> None:
    file, mesh = tetrahedron()
    file.place(mesh)
    file.tree |= change
    with pytest.raises(InputError, match=message):
        load(file.gltf(), "a.gltf")
