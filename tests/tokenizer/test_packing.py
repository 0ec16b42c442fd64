"""Voxels from views: which voxels, and what each rule puts into their patches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.tokenizer.test_asset_views import square, stacked
from tokenizer.assets.mesh import Material, Mesh
from tokenizer.assets.packing import octants, pack
from tokenizer.assets.raycast import render_views
from tokenizer.assets.rules import PACKING_RULES
from tokenizer.assets.views import Views
from tokenizer.cameras import Cameras, cameras_from_transforms, sphere_cameras, transforms_from_cameras
from tokenizer.errors import InputError
from tokenizer.voxels import pack_views, voxels_to_tokens

RED, BLUE = Material((1.0, 0.0, 0.0, 1.0)), Material((0.0, 0.0, 1.0, 1.0))


def seen(mesh: Mesh, count: int = 6) -> Views:
    return render_views(mesh, sphere_cameras(count, 0.75), 96, light="none", samples=1)


def test_the_released_rule_is_the_released_one() -> None:
    """Whose files hold depths and patches with 16 bits."""
    views = seen(square(0.1, 0.76, RED))
    mine = pack(views, "released", 16)
    features, coordinates = pack_views(
        list(views.colours), views.depth.half(), {"frames": transforms_from_cameras(views.cameras)}, 16
    )
    assert torch.equal(mine.coordinates, coordinates)
    assert torch.equal(mine.features, features.half().float())


@pytest.mark.parametrize("shift", [-1e-4, 0.0, 1e-4])
def test_the_released_rule_gives_what_was_recorded(golden: Path, shift: float) -> None:
    """From views in float32, too, as they come from a renderer: 1e-4 is less than 16 bits of depth tell apart."""
    recorded = load_file(golden / "multiview.safetensors")
    resolution = json.loads((golden / "README.json").read_text())["shapes"]["mv"]["res"]
    depth = recorded["in.depth_f16"].float()
    cameras = cameras_from_transforms(json.loads(bytes(recorded["in.transforms_json_u8"].tolist())))
    depth = torch.where(depth >= 0, depth * (1 + shift), depth)
    voxels = pack(Views(recorded["in.images_rgba_u8"].numpy(), depth, cameras), "released", resolution)
    assert torch.equal(voxels.coordinates, recorded["coords"])
    assert torch.equal(voxels.features, (recorded["feats_u8"].float() / 255).half().float())


@pytest.mark.parametrize("rule", PACKING_RULES)
def test_every_rule_fills_the_voxels_of_the_surface(rule: str) -> None:
    views = seen(square(0.1, 0.76, RED))
    voxels = pack(views, rule, 10)  # type: ignore[arg-type]
    # The square at z = 0.1 + 0.5 lies on the lower face of voxel 6 of 10, up to rounding.
    assert set(voxels.coordinates[:, 2].tolist()) <= {5, 6}
    plane = torch.unique(voxels.coordinates[:, :2], dim=0)
    assert plane.amin() == 1
    assert plane.amax() == 8
    assert len(plane) == 64
    voxels_to_tokens(voxels.features, voxels.coordinates).validate()
    key = (voxels.coordinates.long() * torch.tensor([100, 10, 1])).sum(dim=1)
    assert bool((key[1:] > key[:-1]).all())


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.floats(0.02, 0.98))
def test_surface_patches_say_where_the_surface_lies_and_faces(share: float) -> None:
    height = (4 + share) / 8 - 0.5  # inside voxel 4 of 8
    voxels = pack(seen(square(height, 0.75, RED)), "surface", 8)
    inner = (voxels.coordinates[:, :2] >= 2).all(dim=1) & (voxels.coordinates[:, :2] <= 5).all(dim=1)
    picture = voxels.features[inner].unflatten(1, (16, 16, 3))
    assert set(voxels.coordinates[inner, 2].tolist()) == {4}
    torch.testing.assert_close(picture[:, :6, :, 0], torch.ones_like(picture[:, :6, :, 0]))  # colour in the upper half
    torch.testing.assert_close(picture[:, :6, :, 1:], torch.zeros_like(picture[:, :6, :, 1:]))
    found = octants(seen(square(height, 0.75, RED)), 8)
    centre = (found[1] * found[3][..., None]).sum(1) / found[3].sum(1, keepdim=True)
    torch.testing.assert_close(centre[inner][:, 2], torch.full((int(inner.sum()),), share), atol=2e-3, rtol=0)


def test_the_side_that_faces_the_cameras_is_the_normal() -> None:
    """A horizontal square, seen from above only or from below only."""
    everywhere = sphere_cameras(6, 0.75)
    for half, sign in ((slice(0, 3), 1.0), (slice(3, 6), 0.0)):
        mesh = square(0.05, 0.9, RED)
        voxels = pack(render_views(mesh, everywhere[half], 96, light="none", samples=1), "surface", 8)
        normal = voxels.features.unflatten(1, (16, 16, 3))[:, 15, 9]  # lowest row, third cell
        assert float((normal.mean() - sign).abs()) < 0.1


def cells_of(voxels: Tensor) -> Tensor:
    """[N, 768] of the rule "surface" -> the greys [N, 8] of its lower cells, read back from the smooth patches."""
    spread = F.interpolate(torch.eye(4)[None], scale_factor=4, mode="linear", align_corners=False)[0].T  # [16, 4]
    back = torch.linalg.pinv(spread)
    cells: Tensor = back @ voxels.unflatten(1, (16, 16, 3))[..., 0] @ back.T
    return cells[:, 2:].flatten(1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_lower_greys_of_a_known_face(sign: float) -> None:
    """A tilted square seen from one side only: where it lies, how thick it is, and the normal to the cameras."""
    normal = torch.tensor([0.6, 0.0, 0.8])
    across, along = np.array([0.8, 0.0, -0.6]) / 2, np.array([0.0, 1.0, 0.0]) / 2
    corners = np.array([-across - along, across - along, across + along, along - across])
    mesh = Mesh(corners, np.array([[0, 1, 2], [0, 2, 3]]), np.zeros(2, dtype=np.int64), (RED,))
    cameras = sphere_cameras(24, 0.75)
    chosen = torch.nonzero(sign * (cameras.centres.float() @ normal) > 0.5)[:, 0]
    cameras = Cameras(cameras.world_to_camera[chosen], cameras.intrinsics[chosen])
    views = render_views(mesh, cameras, 128, light="none", samples=1)
    voxels = pack(views, "surface", 4)
    # Voxels that the square crosses in full have greys that say all about it.
    greys = cells_of(voxels.features)
    middle = (voxels.coordinates[:, 1] >= 1) & (voxels.coordinates[:, 1] <= 2)
    centre, thickness, facing = greys[middle, :3], greys[middle, 3], greys[middle, 4:7]
    world = (voxels.coordinates[middle] + centre) / 4 - 0.5
    torch.testing.assert_close(world @ normal, torch.zeros(len(world)), atol=2e-3, rtol=0)
    torch.testing.assert_close(thickness, torch.zeros(len(world)), atol=1e-2, rtol=0)
    torch.testing.assert_close(facing, ((sign * normal + 1) / 2).expand(len(world), 3), atol=1e-2, rtol=0)


def test_octants_keep_colours_apart() -> None:
    mesh = stacked(square(-0.05, 0.9, RED), square(0.05, 0.9, BLUE))
    voxels, place, colour, count = octants(seen(mesh), 1)
    assert voxels.coordinates.tolist() == [[0, 0, 0]]
    below, above = colour[0, 0::2], colour[0, 1::2]  # z is the lowest bit
    torch.testing.assert_close(below, torch.tensor([[1.0, 0.0, 0.0]]).expand_as(below))
    torch.testing.assert_close(above, torch.tensor([[0.0, 0.0, 1.0]]).expand_as(above))
    assert bool((count > 0).all())
    torch.testing.assert_close(place[0, :, 2], torch.tensor([0.45, 0.55] * 4), atol=1e-4, rtol=0)


def test_only_views_that_see_a_voxel_are_averaged() -> None:
    """Two squares hide each other: from above only the blue one is seen, from below only the red one."""
    mesh = stacked(square(-0.3, 0.95, RED), square(0.3, 0.95, BLUE))
    voxels = pack(seen(mesh, 12), "visible", 8)
    middle = (voxels.coordinates[:, :2] >= 3).all(dim=1) & (voxels.coordinates[:, :2] <= 4).all(dim=1)
    colours = voxels.features[middle].unflatten(1, (256, 3)).mean(dim=1)
    upper = voxels.coordinates[middle, 2] > 3
    assert bool((colours[upper, 2] > 0.9).all())
    assert bool((colours[~upper, 0] > 0.9).all())
    single = seen(mesh, 1)
    assert torch.equal(pack(single, "average", 8).features, pack(single, "visible", 8).features)


def test_nothing_to_pack() -> None:
    views = seen(square(0.0, 0.5, RED))
    nothing = Views(np.zeros_like(views.colours), torch.full_like(views.depth, -1.0), views.cameras)
    for rule in PACKING_RULES:
        with pytest.raises(InputError, match="no surface"):
            pack(nothing, rule)
    with pytest.raises(InputError, match="unknown packing rule 'best'"):
        pack(views, "best")  # type: ignore[arg-type]
