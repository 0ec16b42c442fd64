"""Cameras, ray casting and folders of views, against what geometry says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.assets.mesh import Material, Mesh, Texture
from tokenizer.assets.raycast import render_views
from tokenizer.assets.texture import MipMaps
from tokenizer.assets.views import TRANSFORMS_FILE, Views
from tokenizer.cameras import (
    Cameras,
    cameras_from_transforms,
    orbit_cameras,
    sphere_cameras,
    transforms_from_cameras,
    turntable_cameras,
)
from tokenizer.errors import InputError

ABOVE = torch.tensor([[0.0, 0.0, 1.0]])
"""A camera straight above."""


def square(height: float, side: float, material: Material, uv: bool = False) -> Mesh:
    """A horizontal square around the z axis."""
    half = side / 2
    vertices = np.array([[-half, -half, height], [half, -half, height], [half, half, height], [-half, half, height]])
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    return Mesh(vertices, faces, np.zeros(2, dtype=np.int64), (material,), corners[faces] if uv else None)


def stacked(*meshes: Mesh) -> Mesh:
    """Several meshes as one."""
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts, strict=False)]),
        np.concatenate([np.full(len(mesh.faces), number) for number, mesh in enumerate(meshes)]),
        tuple(mesh.materials[0] for mesh in meshes),
    )


# ---------------------------------------------------------------------- cameras


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.floats(0.1, 3.0), st.floats(0.0, 6.0))
def test_cameras_look_at_the_origin_and_see_the_whole_sphere(count: int, radius: float, phase: float) -> None:
    cameras = sphere_cameras(count, radius, phase=phase)
    rotation = cameras.world_to_camera[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(count), atol=1e-5, rtol=0)
    middle, depth = cameras.project(torch.zeros(1, 3))
    torch.testing.assert_close(middle, torch.full_like(middle, 0.5), atol=1e-5, rtol=0)
    assert bool((depth > radius).all())
    directions = torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    seen, _ = cameras.project(directions * radius)
    assert bool(((seen > -1e-4) & (seen < 1 + 1e-4)).all())


def test_up_is_up_and_the_turntable_starts_in_front() -> None:
    camera = turntable_cameras(4, 1.0, elevation=0.0)
    assert camera.centres[0, 1] < 0
    (above,), _ = camera.project(torch.tensor([[0.0, 0.0, 0.5]]))[0][:1], None
    assert above[0, 1] < 0.5  # image rows count downwards
    right, _ = camera.project(torch.tensor([[0.5, 0.0, 0.0]]))
    assert right[0, 0, 0] > 0.5


def test_transforms_there_and_back() -> None:
    cameras = sphere_cameras(5, 0.8, phase=0.3, field_of_view=0.9)
    again = cameras_from_transforms(json.loads(json.dumps({"frames": transforms_from_cameras(cameras)})))
    torch.testing.assert_close(again.world_to_camera, cameras.world_to_camera, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.intrinsics, cameras.intrinsics, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ({"frames": []}, "need 'frames'"),
        ({"frames": [{"transform_matrix": [[1.0]]}]}, "camera_angle_x"),
        ({"frames": [{"transform_matrix": [["a"] * 4] * 4, "camera_angle_x": 1}]}, "numbers"),
        ({"frames": [{"transform_matrix": [[0.0] * 4] * 4, "camera_angle_x": 1}]}, "inverted"),
        ({"frames": [{"transform_matrix": np.eye(4).tolist(), "camera_angle_x": 4}]}, "0..pi"),
    ],
)
def test_odd_transforms_are_refused(transforms: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cameras_from_transforms(transforms)


# ---------------------------------------------------------------------- ray casting


def test_a_square_seen_from_above() -> None:
    camera = orbit_cameras(ABOVE, 1.0)
    distance = float(camera.centres[0, 2])
    side, height = 0.7, 0.2
    views = render_views(square(height, side, Material((0.2, 0.4, 0.6, 1.0))), camera, 64, light="none", samples=8)
    depth = views.depth[0]
    # Depth is along the axis, not along the ray: the same everywhere.
    torch.testing.assert_close(depth[depth >= 0], torch.full_like(depth[depth >= 0], distance - height))
    share = (side * 0.5 / math.tan(math.radians(20)) / (distance - height)) ** 2
    assert views.colours[0, ..., 3].mean() / 255 == pytest.approx(share, rel=0.012)  # 8 rays a side
    assert views.colours[0, 32, 32].tolist() == [51, 102, 153, 255]
    assert views.colours[0, 0, 0].tolist() == [0, 0, 0, 0]


def test_glass_is_composited_and_depth_looks_through_it() -> None:
    camera = orbit_cameras(ABOVE, 1.0)
    distance = float(camera.centres[0, 2])
    glass = square(0.3, 2.0, Material((1.0, 0.0, 0.0, 0.25), alpha="blend"))
    floor = square(0.0, 2.0, Material((0.0, 0.0, 1.0, 1.0)))
    both = render_views(stacked(glass, floor), camera, 8, light="none")
    assert both.colours[0, 4, 4].tolist() == [64, 0, 191, 255]
    assert float(both.depth[0, 4, 4]) == pytest.approx(distance, abs=1e-4)
    alone = render_views(glass, camera, 8, light="none")
    assert alone.colours[0, 4, 4].tolist() == [255, 0, 0, 64]
    assert float(alone.depth[0, 4, 4]) == pytest.approx(distance - 0.3, abs=1e-4)


def test_masks_cut() -> None:
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[:, 0] = (10, 200, 30, 255)  # the left half is there, the right half is not
    masked = Material((1.0, 1.0, 1.0, 1.0), Texture(pixels, "clamp", "clamp"), alpha="mask", cutoff=0.5)
    views = render_views(square(0.0, 1.0, masked, uv=True), orbit_cameras(ABOVE, 1.0), 64, light="none")
    alpha = views.colours[0, 32, :, 3]
    assert alpha.max() == 255
    covered = np.nonzero(alpha)[0]
    # Seen from above with y up in the picture's plane turned: the cut runs through the middle.
    assert {abs(int(covered.max()) - 31), abs(int(covered.min()) - 32)} & {0, 1}
    assert (views.depth[0, 32].numpy()[alpha == 0] < 0).all()


def test_lamps_light_each_side_the_same_in_every_view() -> None:
    grey = square(0.0, 1.0, Material((0.5, 0.5, 0.5, 1.0)))
    directions = torch.nn.functional.normalize(
        torch.tensor([[0.0, 0.3, 1.0], [0.4, 0.0, 1.0], [0.0, 0.0, -1.0]]), dim=1
    )
    lit = render_views(grey, orbit_cameras(directions, 1.0), 16).colours[:, 8, 8, 0]
    assert lit[0] == lit[1] != lit[2]
    assert 0 < lit.min() < lit.max() <= 128


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from(["repeat", "clamp", "mirror"]), st.integers(0, 10_000))
def test_textures_give_texels_at_texel_centres(height: int, width: int, wrap: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    maps = MipMaps(Texture(pixels, wrap, wrap))
    rows, columns = (index.ravel() for index in np.indices((height, width)))
    uv = np.stack([(columns + 0.5) / width, 1 - (rows + 0.5) / height], axis=1)
    expected = pixels[rows, columns].astype(np.float32) / 255
    np.testing.assert_allclose(maps.sample(uv, np.ones(len(uv), np.float32)), expected, atol=1e-5)
    beyond = uv + 2.0
    outside = maps.sample(beyond, np.ones(len(uv), np.float32))
    np.testing.assert_allclose(outside, np.broadcast_to(pixels[0, -1] / 255, outside.shape) if wrap == "clamp" else
                               expected, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("wrap", ["repeat", "clamp", "mirror"])
def test_between_texels_textures_are_bilinear(wrap: Any) -> None:
    """At every share of the way from one texel to the next, across and down, and over the edges."""
    pixels = np.random.default_rng(1).integers(0, 256, (3, 5, 4), dtype=np.uint8)
    numbers = {"repeat": lambda i, n: i % n, "clamp": lambda i, n: min(max(i, 0), n - 1)}
    numbers["mirror"] = lambda i, n: min(i % (2 * n), 2 * n - 1 - i % (2 * n))
    places = [(x, y) for x in np.arange(-1.2, 6.0, 0.3) for y in np.arange(-1.1, 4.0, 0.35)]  # in texels' centres

    def expected(x: float, y: float) -> Any:
        total = np.zeros(4)
        for column, row in ((math.floor(x) + i, math.floor(y) + j) for i in (0, 1) for j in (0, 1)):
            share = (1 - abs(x - column)) * (1 - abs(y - row))
            total += share * pixels[numbers[wrap](row, 3), numbers[wrap](column, 5)] / 255
        return total

    uv = np.array([((x + 0.5) / 5, 1 - (y + 0.5) / 3) for x, y in places])
    found = MipMaps(Texture(pixels, wrap, wrap)).sample(uv, np.ones(len(uv), np.float32))
    np.testing.assert_allclose(found, [expected(x, y) for x, y in places], atol=1e-5)


def test_far_textures_are_averages() -> None:
    pixels = np.zeros((16, 16, 4), dtype=np.uint8)
    pixels[::2, ::2] = (255, 0, 0, 255)  # a quarter is red, the rest is transparent
    (colour,) = MipMaps(Texture(pixels)).sample(np.array([[0.3, 0.6]]), np.array([64.0], dtype=np.float32))
    np.testing.assert_allclose(colour, [1.0, 0.0, 0.0, 0.25], atol=1e-5)  # hidden black does not bleed


# ---------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def views() -> Views:
    mesh = square(0.0, 1.0, Material((0.9, 0.5, 0.1, 1.0)))
    return render_views(mesh, sphere_cameras(3, 0.75), 24)


def test_a_folder_of_views_there_and_back(views: Views, tmp_path: Path) -> None:
    views.save(tmp_path / "views")
    again = Views.load(tmp_path / "views")
    assert np.array_equal(again.colours, views.colours)
    assert torch.equal(again.depth, views.depth)
    torch.testing.assert_close(again.cameras.world_to_camera, views.cameras.world_to_camera, atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="exists already"):
        views.save(tmp_path / "views")


@pytest.mark.parametrize(
    ("stem", "reference"),
    [
        ("r_{}", "./train/r_{}"),
        ("r_{}", "train/r_{}.png"),
        ("frame.000{}", "train/frame.000{}"),
        ("v0.5 {}", "./train/v0.5 {}"),
        ("r_{}", "train\\r_{}.png"),
        ("r_{}", ".\\train\\r_{}"),
    ],
)
def test_pictures_are_found_by_the_names_that_programs_write(
    views: Views, tmp_path: Path, stem: str, reference: str
) -> None:
    views.save(tmp_path / "views")
    path = tmp_path / "views" / TRANSFORMS_FILE
    (path.parent / "train").mkdir()
    transforms = json.loads(path.read_text())
    for number, frame in enumerate(transforms["frames"]):
        frame["file_path"] = reference.format(number)
        for ending in (".png", "_depth.npy"):
            old = path.with_name(f"{number:03d}{ending}")
            old.rename(path.parent / "train" / (stem.format(number) + ending))
    path.write_text(json.dumps(transforms))
    again = Views.load(path.parent)
    assert np.array_equal(again.colours, views.colours)
    assert torch.equal(again.depth, views.depth)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_what_is_too_far_or_no_number_is_nothing(views: Views, tmp_path: Path, kind: Any) -> None:
    views.save(tmp_path / "views")
    expected = views.depth.clone()
    for number, nothing in enumerate((np.inf, np.nan, -np.inf if kind is np.float16 else -1e38)):
        depth = np.where(views.depth[number].numpy() < 0, nothing, views.depth[number].numpy()).astype(kind)
        np.save(tmp_path / "views" / f"{number:03d}_depth.npy", depth)
        expected[number] = torch.from_numpy(np.where(views.depth[number] < 0, -1, depth))
    assert torch.equal(Views.load(tmp_path / "views").depth, expected)


def spoil(folder: Path, how: str) -> None:
    """Damage a folder of views in one way."""
    transforms = json.loads((folder / TRANSFORMS_FILE).read_text())
    match how:
        case "no transforms":
            (folder / TRANSFORMS_FILE).unlink()
        case "no JSON":
            (folder / TRANSFORMS_FILE).write_text("{")
        case "frames are no list":
            (folder / TRANSFORMS_FILE).write_text('{"frames": 3}')
        case "outside":
            transforms["frames"][0]["file_path"] = "../../etc/passwd"
            (folder / TRANSFORMS_FILE).write_text(json.dumps(transforms))
        case "truncated picture":
            (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:40])
        case "no depth":
            (folder / "002_depth.npy").unlink()
        case "pickled depth":
            np.save(folder / "002_depth.npy", np.array([{"a": 1}]), allow_pickle=True)
        case "depth of another size":
            np.save(folder / "002_depth.npy", np.zeros((4, 4), np.float32))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no transforms", "no such file"),
        ("no JSON", "not readable as JSON"),
        ("frames are no list", "list 'frames'"),
        ("outside", "outside its folder"),
        ("truncated picture", "001.png"),
        ("no depth", "needs its depth"),
        ("pickled depth", "002_depth.npy"),
        ("depth of another size", "one size"),
    ],
)
def test_damaged_folders_are_one_line(views: Views, tmp_path: Path, how: str, message: str) -> None:
    folder = tmp_path / "views"
    views.save(folder)
    spoil(folder, how)
    with pytest.raises(InputError, match=message) as caught:
        Views.load(folder)
    assert "\n" not in str(caught.value)


def test_views_must_fit_together(views: Views) -> None:
    with pytest.raises(InputError, match="each view needs one"):
        Views(views.colours[:2], views.depth, views.cameras)
    with pytest.raises(InputError, match="world_to_camera"):
        Cameras(torch.eye(4), torch.eye(3)[None])
