"""Damaged and hostile assets: each loads or ends in one clear line; none hangs, eats memory or reads elsewhere."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
import warnings
from collections.abc import Callable
from functools import partial
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
    Gltf,
    corners,
    lines,
    load,
    only,
    plain_png,
    ply_file,
)
from tokenizer.assets.files import FolderFiles, MappedFiles, MissingFileError, relative
from tokenizer.assets.load import is_asset, load_mesh, load_mesh_from
from tokenizer.assets.materials import AssetWarning, Pictures, Remarks
from tokenizer.assets.mesh import Mesh
from tokenizer.errors import InputError

MODELS = Path("/usr/share/assimp/models")
"""The package assimp-testmodels of Debian."""


def check_line(message: str, name: str) -> None:
    """One line that begins with the name of the file."""
    assert message.startswith(f"{name}: ")
    assert len(message) < 300
    assert message.isprintable()


def ends_well(data: bytes, name: str) -> Mesh | None:
    """Load; None after an `InputError`, which has to be one line with the name of the file. Nothing else may come."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", AssetWarning)
        try:
            mesh = load_mesh_from({name: data}, name)
        except InputError as error:
            check_line(str(error), name)
            return None
    assert np.isfinite(mesh.vertices[mesh.faces]).all()
    return mesh


# ---------------------------------------------------------------------- references


@pytest.mark.parametrize(
    "reference",
    [
        "/etc/passwd", "../secret.png", "a/../../secret.png", "..\\secret.png", "C:\\secret.png", "c:secret.png",
        "https://example.org/a.png", "file:///etc/passwd", "\\\\host\\share\\a.png", "//host/a.png",
    ],
)  # fmt: skip
def test_references_that_lead_outside(reference: str) -> None:
    with pytest.raises(MissingFileError, match=r"lies outside the folder of the asset; not opened$"):
        relative(reference)


@pytest.mark.parametrize("reference", ["", ".", "a/..", "a\0b", "x" * 2000])
def test_references_that_name_nothing(reference: str) -> None:
    with pytest.raises(MissingFileError, match=r"is not the name of a file$"):
        relative(reference)


def test_references_inside() -> None:
    for reference in ("a b.png", ".\\a b.png", "x/../a b.png", '"a b.png"'):
        assert relative(reference).parts == ("a b.png",)


def test_nothing_outside_the_folder_is_opened(tmp_path: Path) -> None:
    # A pipe that nobody writes to: whoever opens one of these waits for ever.
    os.mkfifo(tmp_path / "outside.png")
    folder = tmp_path / "asset"
    folder.mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "inside.png").write_bytes(plain_png(1, 2, 3))
    (folder / "alias.png").symlink_to("inside.png")
    references = ("../outside.png", str(tmp_path / "outside.png"), "pipe.png", "link.png", "alias.png")
    names = [f"m{number}" for number in range(len(references))]
    (folder / "a.mtl").write_text("".join(f"newmtl {n}\nmap_Kd {r}\n" for n, r in zip(names, references, strict=True)))
    face = "f 1/1 2/2 3/3\n"
    uses = "".join(f"usemtl {name}\n{face}" for name in names)
    (folder / "a.obj").write_text(f"mtllib a.mtl\n{lines('v', SQUARE)}{lines('vt', SQUARE_UV)}{uses}")
    with pytest.warns(AssetWarning) as caught:
        mesh = load_mesh(folder / "a.obj")
    said = [str(warning.message) for warning in caught if issubclass(warning.category, AssetWarning)]
    assert len(said) == 4
    for reference, line, reason in zip(
        references,
        said,
        ["lies outside the folder of the asset; not opened"] * 2 + ["is not found", "is a link that leads outside"],
        strict=False,
    ):
        assert line.startswith(f"{folder / 'a.obj'}: texture '{reference}' {reason}")
    assert [mesh.materials[number].texture is not None for number in mesh.face_materials] == [False] * 4 + [True]

    file = Gltf()
    file.place(file.mesh(CORNER, SIDES.astype(np.uint8).ravel()))
    for reference in ("../outside.png", "link.png"):
        (folder / "a.gltf").write_bytes(file.gltf(reference))
        with pytest.raises(
            InputError, match=rf"a\.gltf: '{reference}' .* outside the folder of the asset; not opened$"
        ):
            load_mesh(folder / "a.gltf")
    (folder / "b.obj").symlink_to(folder / "pipe.png")
    with pytest.raises(InputError, match=r"is not a regular file$"):
        load_mesh(folder / "b.obj")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "Large.PNG").write_bytes(bytes(100))
    for files in (FolderFiles(tmp_path / "a.obj"), MappedFiles({"x/a.obj": b"", "x/Large.PNG": bytes(100)}, "x/a.obj")):
        assert files.read("large.png", 100) == bytes(100)
        for reference, reason in (
            ("large.png", "has 100 bytes, more than the 99 allowed"),
            ("circle.png", "cannot be read|is not found"),
            ("n" * 300, "cannot be read|is not found"),
        ):
            with pytest.raises(MissingFileError, match=rf"^'{reference[:100]}.*' ({reason})"):
                files.read(reference, 99)


def test_paths_that_are_no_assets(tmp_path: Path) -> None:
    (tmp_path / "folder.obj").mkdir()
    (tmp_path / "empty.obj").touch()
    for name, message in (
        ("missing.obj", "no such file"),
        ("folder.obj", "is a folder"),
        ("empty.obj", "is empty"),
        ("picture.png", r"ending '.png'; assets are .glb, .gltf, .obj, .ply, .stl, .off$"),
        ("plain", "no ending; assets are"),
    ):
        with pytest.raises(InputError, match=rf"{name}: {message}"):
            load_mesh(tmp_path / name)
    with pytest.raises(InputError, match=r"^b.obj: is not among the 1 files given$"):
        load_mesh_from({"a.obj": b"v"}, "b.obj")


# ---------------------------------------------------------------------- pictures


def textured(texture: bytes, count: int = 1) -> Gltf:
    file = Gltf()
    uv = {"TEXCOORD_0": file.accessor(SQUARE_UV.astype(np.float32))}
    for _ in range(count):
        material = file.material(baseColorTexture={"index": file.texture(texture)}, baseColorFactor=[1, 0, 0, 1])
        file.place(file.mesh(SQUARE, SPLIT.astype(np.uint8), attributes=uv, material=material))
    return file


def test_pictures_that_cannot_be_used_leave_the_plain_colour() -> None:
    sound = plain_png(1, 2, 3, size=64)
    bomb = bytearray(sound)
    bomb[16:24] = struct.pack(">II", 100_000, 100_000)  # width and height in the header
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\n"
    for data in (b"", b"no picture", sound[: len(sound) // 2], bytes(bomb), program):
        with pytest.warns(AssetWarning, match=r"^a.glb: texture 'images\[0\]' cannot be used \(.*\); the plain colour"):
            mesh = load(textured(data).glb(), "a.glb", silent=False)
        assert only(mesh).texture is None
        assert only(mesh).colour == pytest.approx((1, 0, 0, 1))
    assert only(load(textured(sound).glb(), "a.glb")).texture is not None


def test_pictures_of_one_asset_share_a_limit() -> None:
    remarks = Remarks("a.glb")
    pictures = Pictures(remarks, max_pixels=20)
    sizes = [4, 2, 1]
    found = [pictures.get(size, f"{size}.png", partial(plain_png, 9, 9, 9, size=size)) for size in sizes]
    assert [None if pixels is None else pixels.shape for pixels in found] == [(4, 4, 4), (2, 2, 4), None]
    with pytest.warns(AssetWarning, match=r"'1.png' cannot be used \(the textures of this asset have too many pixels"):
        remarks.give()


def test_many_remarks_are_summed_up() -> None:
    with pytest.warns(AssetWarning) as caught:
        load(textured(b"", count=30).glb(), "a.glb", silent=False)
    assert len(caught) == 11
    assert str(caught[-1].message) == "a.glb: and 20 more remarks like these"


# ---------------------------------------------------------------------- damage

WHOLE = {kind: (name, write(CORNER, SIDES)) for kind, (name, write) in WRITERS.items()} | {
    "glb-textured": ("a.glb", textured(plain_png(1, 2, 3)).glb()),
    "ply-mixed": (
        "a.ply",
        ply_file(
            "binary_little_endian",
            dict(zip("xyzst", np.hstack([SQUARE, SQUARE_UV]).T, strict=True)),
            [[0, 1, 2, 3], [0, 1, 2]],
        ),
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_every_truncation_ends_well(kind: str) -> None:
    name, data = WHOLE[kind]
    assert ends_well(data, name) is not None
    for length in range(1, len(data), max(1, len(data) // 100)):
        ends_well(data[:length], name)


WORDS = st.sampled_from([b"9999999999", b"-1", b"nan", b"[[", b""])


@pytest.mark.parametrize("kind", WHOLE)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_every_mutation_ends_well(kind: str, data: st.DataObject) -> None:
    name, whole = WHOLE[kind]
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=4) | WORDS)
        damaged[place : place + data.draw(st.integers(0, 8))] = piece
    ends_well(bytes(damaged), name)


def header(text: str, body: bytes = bytes(1000)) -> bytes:
    return text.encode() + body


def ply_header(vertices: int, faces: int, kind: str = "binary_little_endian", count: str = "uchar") -> str:
    position = "".join(f"property float {axis}\n" for axis in "xyz")
    return (
        f"ply\nformat {kind} 1.0\nelement vertex {vertices}\n{position}"
        f"element face {faces}\nproperty list {count} int vertex_indices\nend_header\n"
    )


def glb_chunk(length: int) -> bytes:
    return struct.pack("<4sIIII", b"glTF", 2, 1020, length, 0x4E4F534A) + bytes(1000)


def gltf_with(**changes: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        file = Gltf()
        file.place(file.mesh(CORNER, SIDES.astype(np.uint8).ravel()))
        accessor = changes.pop("accessor", None)
        file.tree["accessors"][0] |= accessor or {}
        file.tree |= changes
        return file.gltf()

    return make


LIES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "stl": ("a.stl", lambda: bytes(80) + struct.pack("<I", 2**32 - 1) + bytes(500), "promises 4294967295 triangles"),
    "ply vertices": ("a.ply", lambda: header(ply_header(10**12, 1)), "promises 1000000000000 of 'vertex'"),
    "ply faces": ("a.ply", lambda: header(ply_header(3, 4_000_000)), "promises 4000000 of 'face'"),
    "ply text": ("a.ply", lambda: header(ply_header(10**9, 1, "ascii"), b"0 " * 500), "promises 1000000000 of"),
    "ply list": ("a.ply", lambda: header(ply_header(3, 1, count="uint"), b"\xff" * 1000), "the file ends in the rows"),
    "ply negative": ("a.ply", lambda: header(ply_header(3, 1, count="char"), b"\xff" * 1000), "a list of -1 values"),
    "off": ("a.off", lambda: b"OFF\n353535235358 6 0\n0 0 0\n", "promises 353535235358 vertices"),
    "off corners": ("a.off", lambda: b"OFF\n1 1 0\n0 0 0\n999999999 0 0 0\n", "promises 999999999 corners"),
    "obj": ("a.obj", lambda: b"v 0 0 0\nf 1 2 99999999999999999999\n", "is damaged"),
    "glb length": ("a.glb", lambda: struct.pack("<4sII", b"glTF", 2, 2**31), "the file ends after 12 of 2147483648"),
    "glb chunk": ("a.glb", lambda: glb_chunk(2**31), "a chunk reaches beyond the end of the file"),
    "gltf count": ("a.gltf", gltf_with(accessor={"count": 10**15}), "an accessor of 1000000000000000 rows"),
    "gltf offset": ("a.gltf", gltf_with(accessor={"byteOffset": 10**15}), "reaches beyond the end of its buffer view"),
    "gltf type": ("a.gltf", gltf_with(accessor={"type": "MAT4"}), r"accessors\[0\] has type MAT4"),
    "gltf zeros": (
        "a.gltf",
        gltf_with(accessors=[{"count": 10**9, "type": t, "componentType": 5125} for t in ("VEC3", "SCALAR")]),
        r"accessors\[0\] has 1000000000 rows without data",
    ),
    "gltf view": (
        "a.gltf",
        gltf_with(bufferViews=[{"buffer": 0, "byteLength": 10**12}] * 2),
        r"bufferViews\[0\] reaches beyond the end of its buffer",
    ),
    "gltf depth": ("a.gltf", lambda: b"[" * 500_000, "recursion"),
    "gltf values": ("a.gltf", lambda: b"[" + b"1," * 2_000_001 + b"1]", "its JSON part has more than 2000000 values"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_found_before_memory_is_taken(lie: str) -> None:
    name, make, message = LIES[lie]
    data = make()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=rf"^{name}: .*{message}"):
            load(data, name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(data) + 2_000_000


def test_ten_million_faces_are_counted_and_not_read() -> None:
    data = lines("v", CORNER).encode() + b"f 1 2 3\n" * 10_000_000
    start = time.process_time()
    with pytest.raises(
        InputError, match=r"a.obj: has at least 10000000 faces, more than the 5000000 allowed; simplify"
    ):
        load(data, "a.obj")
    assert time.process_time() - start < 5


@pytest.mark.parametrize("kind", WRITERS)
def test_the_number_of_faces_is_for_the_caller_to_limit(kind: str) -> None:
    name, write = WRITERS[kind]
    assert len(load(write(CORNER, SIDES), name, max_faces=4).faces) == 4
    with pytest.raises(InputError, match="has at least 4 faces, more than the 3 allowed"):
        load(write(CORNER, SIDES), name, max_faces=3)


def test_instances_count_as_faces() -> None:
    file = Gltf()
    mesh = file.mesh(CORNER, SIDES.astype(np.uint8).ravel())
    for _ in range(5):
        file.place(mesh)
    with pytest.raises(InputError, match="has at least 20 faces, more than the 16 allowed"):
        load(file.glb(), "a.glb", max_faces=16)


def test_parts_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenizer.assets.gltf._MAX_PARTS", 10)
    nodes = gltf_with(nodes=[{"mesh": 0}] * 11, scenes=[{"nodes": list(range(11))}])
    primitives = gltf_with(meshes=[{"primitives": [{"attributes": {"POSITION": 0}}] * 11}])
    for make in (nodes, primitives):
        with pytest.raises(InputError, match=r"^a.gltf: has more than 10 parts; join some of its meshes$"):
            load(make(), "a.gltf")


# ---------------------------------------------------------------------- the collection of another project


@pytest.fixture(scope="module")
def models() -> list[Path]:
    """Files with one of our endings; without the package the test is skipped, but fails under CI, which installs it."""
    if not MODELS.is_dir():
        reason = "the Debian package assimp-testmodels is not installed"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return sorted(path for path in MODELS.rglob("*") if path.is_file() and is_asset(path))


def test_models_of_assimp(models: list[Path]) -> None:
    assert len(models) > 80
    loaded = compared = 0
    for path in models:
        mesh, seconds, peak = measured(path)
        assert seconds < 5, path
        assert peak < 200_000_000, path
        loaded += mesh is not None
        # Small ones are enough for the twin, which is slow.
        if mesh is not None and path.stat().st_size < 200_000:
            compared += same_as_trimesh(path, mesh)
    assert loaded >= 55
    assert compared >= 40


def measured(path: Path) -> tuple[Mesh | None, float, int]:
    """A mesh, or None after a clear line; seconds and bytes that it took."""
    start = time.process_time()
    tracemalloc.start()
    mesh = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AssetWarning)
            mesh = load_mesh(path)
    except InputError as error:
        check_line(str(error), str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return mesh, time.process_time() - start, peak


def same_as_trimesh(path: Path, mesh: Mesh) -> bool:
    """Compare with the twin, whose readers share nothing with ours; False where it cannot read the file."""
    import trimesh

    try:
        parts = trimesh.load_scene(path, process=False).dump()
        theirs = np.concatenate([part.triangles for part in parts if isinstance(part, trimesh.Trimesh)])
    except Exception:
        return False
    ours = corners(mesh)
    if not len(theirs):
        return False
    for pick in (np.min, np.max):
        np.testing.assert_allclose(pick(ours, axis=(0, 1)), pick(theirs, axis=(0, 1)), atol=1e-4, err_msg=str(path))
    # trimesh cuts every polygon into a fan, which covers more than a concave one.
    if "concave" not in path.name and "space_in_material" not in path.name:
        assert surface(ours) == pytest.approx(surface(theirs), rel=1e-4), path
    return True


def surface(triangles: NDArray[Any]) -> float:
    sides = triangles[:, 1:] - triangles[:, :1]
    return float(np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1).sum() / 2)
