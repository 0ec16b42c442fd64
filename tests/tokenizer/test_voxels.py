"""Packing views into voxels: an analytic scene, faces, and voxels as tokens (recorded values are in test_parity)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tokenizer import voxels
from tokenizer.cameras import Cameras, cameras_from_transforms
from tokenizer.errors import InputError
from tokenizer.voxels import (
    nearest_view_features,
    occupied_voxels,
    pack_views,
    surface_points,
    view_patches,
    voxel_features,
    voxels_to_tokens,
)


def camera_at(distance: float, axis: int) -> dict[str, Any]:
    """A frame of transforms.json that looks at the origin from `distance` along an axis; 60 degrees wide."""
    toward = np.zeros(3)
    toward[axis] = 1.0
    right = np.roll(toward, 1)
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([right, np.cross(toward, right), toward], axis=1)
    matrix[:3, 3] = distance * toward
    return {"transform_matrix": matrix.tolist(), "camera_angle_x": math.pi / 3}


def transforms(*frames: dict[str, Any]) -> dict[str, Any]:
    return {"frames": list(frames)}


def test_camera_conventions() -> None:
    cameras = cameras_from_transforms(transforms(camera_at(2.0, 2)))
    origin = cameras.world_to_camera[0] @ torch.tensor([0.0, 0.0, 0.0, 1.0])
    torch.testing.assert_close(origin, torch.tensor([0.0, 0.0, 2.0, 1.0]))  # two units in front
    above = cameras.world_to_camera[0] @ torch.tensor([0.0, 0.1, 0.0, 1.0])
    assert above[1] < 0  # y points down
    assert float(cameras.intrinsics[0, 0, 0]) == pytest.approx(0.5 / math.tan(math.pi / 6))


def test_points_lie_where_the_depth_says() -> None:
    """A flat wall through the origin, seen from +z."""
    cameras = cameras_from_transforms(transforms(camera_at(2.0, 2)))
    depth = torch.full((1, 8, 8), 2.0)
    depth[0, 0, 0] = -1.0
    points = surface_points(depth, cameras)
    assert len(points) == 63
    torch.testing.assert_close(points[:, 2], torch.zeros(63), rtol=0, atol=1e-6)
    half = 2 * math.tan(math.pi / 6)
    corner = points[:, :2].abs().max()
    assert float(corner) == pytest.approx(half, abs=1e-5)  # the upper left corner of a pixel, not its middle


def test_too_many_points_are_thinned_out_by_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voxels, "MAX_SURFACE_POINTS", 10)
    cameras = cameras_from_transforms(transforms(camera_at(2.0, 2)))
    depth = torch.full((1, 8, 8), 2.0)
    with pytest.raises(InputError, match="64 surface points are thinned out at random"):
        surface_points(depth, cameras)
    first, second = (surface_points(depth, cameras, torch.Generator().manual_seed(0)) for _ in range(2))
    assert len(first) == 10
    assert torch.equal(first, second)


def test_voxels_are_found_in_row_major_order() -> None:
    points = torch.tensor([[0.3, -0.3, 0.1], [-0.4, 0.4, 0.4], [-0.4, 0.4, 0.41], [0.7, 0.0, 0.0]])
    assert occupied_voxels(points, 4).tolist() == [[0, 3, 3], [3, 0, 2]]


def test_a_point_on_a_face_fills_both_neighbours() -> None:
    assert occupied_voxels(torch.tensor([[0.25, 0.1, 0.1]]), 4).tolist() == [[2, 2, 2], [3, 2, 2]]
    corner = occupied_voxels(torch.tensor([[0.0, 0.0, 0.0]]), 4)
    assert len(corner) == 8
    assert occupied_voxels(torch.tensor([[0.5, 0.5, 0.5]]), 4).tolist() == [[3, 3, 3]]
    assert occupied_voxels(torch.tensor([[-0.5, 0.1, 0.1]]), 4).tolist() == [[0, 2, 2]]


def test_no_points_no_voxels() -> None:
    assert occupied_voxels(torch.zeros(0, 3), 8).shape == (0, 3)


def test_patches_of_a_view() -> None:
    image = np.zeros((256, 256, 4), dtype=np.uint8)
    image[16 * 3 + 5, 16 * 7 + 2] = (10, 20, 30, 255)
    image[..., 3] = 255
    patches = view_patches(image)
    assert patches.shape == (768, 16, 16)
    first = (5 * 16 + 2) * 3
    assert patches[first : first + 3, 3, 7].tolist() == [10, 20, 30]
    assert int(patches.int().sum()) == 60


def test_alpha_is_dropped_without_a_background() -> None:
    image = np.full((256, 256, 4), 200, dtype=np.uint8)
    image[..., 3] = 1
    assert set(view_patches(image).unique().tolist()) == {200}


def test_the_nearest_view_gives_the_colours() -> None:
    cameras = cameras_from_transforms(transforms(camera_at(2.0, 0), camera_at(2.0, 2)))
    maps = torch.stack(
        [torch.full((768, 16, 16), 1, dtype=torch.uint8), torch.full((768, 16, 16), 2, dtype=torch.uint8)]
    )
    coordinates = torch.tensor([[7, 4, 4], [4, 4, 7], [6, 6, 6]])
    features = nearest_view_features(coordinates, cameras, maps, 8)
    assert features[:, 0].tolist() == [1, 2, 1]  # equally near: the first


def test_the_cell_is_rounded_half_to_even_over_its_corners() -> None:
    """u = 0.5 falls between cells 7 and 8 of 16; round-half-even(7.5) is 8."""
    camera = Cameras(torch.eye(4)[None], torch.tensor([[[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1.0]]]))
    maps = torch.arange(256).reshape(1, 1, 16, 16)
    assert nearest_view_features(torch.tensor([[1, 1, 2]]), camera, maps, 3).tolist() == [[8 * 16 + 8]]


def test_outside_the_picture_is_black() -> None:
    camera = Cameras(torch.eye(4)[None], torch.tensor([[[9.0, 0, 0.5], [0, 9.0, 0.5], [0, 0, 1.0]]]))
    maps = torch.full((1, 768, 16, 16), 7, dtype=torch.uint8)
    features = nearest_view_features(torch.tensor([[7, 7, 7], [4, 4, 7]]), camera, maps, 8)
    assert not features[0].any()


def test_pack_views_of_a_cube() -> None:
    """Six cameras around a cube whose sides have six colours; every voxel shows the colour of the side it is on."""
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    frames = [camera_at(2.0, axis) for axis in range(3)]
    depth = torch.full((3, 64, 64), 2.0 - 0.2)  # each camera sees a wall 0.2 in front of the origin
    images = [
        np.broadcast_to(np.asarray([*colours[axis].tolist(), 255], dtype=np.uint8), (32, 32, 4)).copy()
        for axis in range(3)
    ]
    features, coordinates = pack_views(images, depth, transforms(*frames), resolution=16)
    assert features.shape == (len(coordinates), 768)
    assert coordinates.dtype == torch.int32
    for row, xyz in zip(features, coordinates.tolist(), strict=True):
        side = int(np.argmax(xyz))
        if sorted(xyz)[-1] > sorted(xyz)[-2]:  # clearly nearest to one camera
            assert row.reshape(256, 3).unique(dim=0).tolist() == [(colours[side] / 255).tolist()]


def test_views_must_come_together() -> None:
    with pytest.raises(InputError, match="1 images, 2 depth maps and 1 cameras"):
        pack_views([np.zeros((8, 8, 3), np.uint8)], torch.zeros(2, 8, 8), transforms(camera_at(2.0, 2)))
    with pytest.raises(InputError, match="need 'frames'"):
        cameras_from_transforms({"frames": [{"camera_angle_x": 1.0}]})
    with pytest.raises(InputError, match=r"uint8 \[H, W, 3 or 4\]"):
        view_patches(np.zeros((8, 8), np.uint8))


def test_voxels_become_tokens_and_come_back() -> None:
    features = torch.rand(5, 768, generator=torch.Generator().manual_seed(0))
    coordinates = torch.randint(0, 64, (5, 3), generator=torch.Generator().manual_seed(1))
    tokens = voxels_to_tokens(features, coordinates)
    assert tokens.features.shape == (5, 3072)
    assert not tokens.features[:, 768:].any()
    assert tokens.positions.tolist() == [[1, *xyz] for xyz in coordinates.tolist()]
    assert torch.equal(voxel_features(tokens).features, features * 2 - 1)


@pytest.mark.parametrize(
    ("features", "coordinates", "message"),
    [
        (torch.zeros(2, 767), torch.zeros(2, 3, dtype=torch.int32), r"floats \[N, 768\], got torch.float32 \(2, 767\)"),
        (torch.zeros(2, 768, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.int32), "must be floats"),
        (torch.zeros(2, 768), torch.zeros(2, 4, dtype=torch.int32), r"must be \[2, 3\], got \(2, 4\)"),
        (torch.full((2, 768), -1.0), torch.zeros(2, 3, dtype=torch.int32), r"must lie in \[0, 1\], got -1 to -1"),
        (torch.full((2, 768), float("nan")), torch.zeros(2, 3, dtype=torch.int32), "got nan to nan"),
    ],
)
def test_bad_voxels(features: torch.Tensor, coordinates: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        voxels_to_tokens(features, coordinates)
