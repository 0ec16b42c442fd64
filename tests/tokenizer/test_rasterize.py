"""The rasteriser against closed forms and against every pixel and Gaussian by brute force, values and gradients."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenizer.cameras import Cameras, sphere_cameras, turntable_cameras
from tokenizer.errors import InputError
from tokenizer.gaussians import rasterize_gsplat, rasterize_torch, tiles
from tokenizer.gaussians.attributes import Gaussians, rotation_matrices
from tokenizer.gaussians.rasterize import Rendering, rasterize, rasterize_tensors
from tokenizer.gaussians.tiles import TileGrid

Scene = list[Tensor]
"""means, scales, rotations, opacities, colours."""

CUT = 1 / 255


def random_scene(count: int, seed: int, sizes: tuple[float, float] = (3e-3, 0.3)) -> Scene:
    """Gaussians in the unit cube; standard deviations from the smallest to the largest size, uniform in logarithm."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    scales = torch.exp(math.log(sizes[0]) + uniform(count, 3) * math.log(sizes[1] / sizes[0]))
    rotations = torch.nn.functional.normalize(uniform(count, 4) - 0.5, dim=1)
    return [uniform(count, 3) - 0.5, scales, rotations, uniform(count, 1), uniform(count, 3)]


def cameras_of(count: int, radius: float = 0.6) -> Cameras:
    return sphere_cameras(count, radius, phase=0.3).to(dtype=torch.float64)


def by_brute_force(scene: Scene, cameras: Cameras, size: tuple[int, int], background: Tensor) -> Tensor:
    """[V, H, W, 5] colours, depth, alpha: every Gaussian at every pixel in float64.

    It follows the definition, with whole covariance matrices, their determinants and inverses.
    """
    means, scales, rotations, opacities, colours = scene
    height, width = size
    turned = rotation_matrices(rotations) @ torch.diag_embed(scales)
    covariances = turned @ turned.mT
    pixels = torch.cartesian_prod(torch.arange(height) + 0.5, torch.arange(width) + 0.5).flip(1).double()
    views = []
    for matrix, intrinsics in zip(cameras.world_to_camera, cameras.intrinsics, strict=True):
        focal, middle = intrinsics.diagonal()[:2], intrinsics[:2, 2]
        to_pixels = torch.tensor([width, height]).double()
        local = means @ matrix[:3, :3].T + matrix[:3, 3]
        seen = (local[:, 2] > 0.01).nonzero()[:, 0]
        seen = seen[local[seen, 2].argsort(stable=True)]
        local = local[seen]
        # The derivative of the projection is taken no further than 0.15 picture widths outside the picture.
        slopes = (local[:, :2] / local[:, 2:]).clamp((-0.15 - middle) / focal, (1.15 - middle) / focal)
        by_plane, by_depth = torch.eye(2).expand(len(local), 2, 2).double(), -slopes[..., None]
        derivative = (to_pixels * focal)[:, None] * torch.cat([by_plane, by_depth], 2) / local[:, 2, None, None]
        derivative = derivative @ matrix[:3, :3]
        sharp = derivative @ covariances[seen] @ derivative.mT
        wide = sharp + 0.1 * torch.eye(2).double()
        ratio = torch.linalg.det(sharp) / torch.linalg.det(wide)
        opacity = opacities[seen, 0] * ratio.clamp_min(2.5e-5).sqrt()
        away = pixels[:, None] - (local[:, :2] / local[:, 2:] * focal + middle) * to_pixels
        power = torch.einsum("pgi,gij,pgj->pg", away, torch.linalg.inv(wide), away)
        alpha = (opacity * torch.exp(-0.5 * power)).clamp_max(0.999)
        alpha = torch.where(alpha > CUT, alpha, 0.0)
        after = torch.cumprod(1 - alpha, 1)
        before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], 1)
        weights = alpha * before * (after > 1e-4)
        total = weights.sum(1, keepdim=True)
        depth = (weights @ local[:, 2:]) / torch.where(total > 0, total, 1.0)
        views.append(torch.cat([weights @ colours[seen] + (1 - total) * background, depth, total], 1))
    return torch.stack(views).view(len(cameras), height, width, 5)


def draw(scene: Scene, cameras: Cameras, size: int | tuple[int, int], **arguments: Any) -> Rendering:
    means, scales, rotations, opacities, colours = scene
    return rasterize_tensors(means, scales, rotations, opacities, colours, cameras, size, **arguments)


def layers(rendering: Rendering) -> Tensor:
    return torch.cat([rendering.colours, rendering.depth[..., None], rendering.alpha[..., None]], -1)


def gradients(image: Tensor, inputs: Scene, seed: int = 0) -> Scene:
    weights = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed), dtype=image.dtype)
    return list(torch.autograd.grad((image * weights).sum(), inputs))


def tracked(scene: Scene) -> Scene:
    return [tensor.clone().requires_grad_() for tensor in scene]


# ---------------------------------------------------------------------- closed forms


def test_one_round_gaussian_by_its_formula() -> None:
    """In the middle of the picture a sphere is seen as a circle: standard deviation f W s / z, plus the filter."""
    opacity, scale, size = 0.7, 0.05, 33
    cameras = cameras_of(1)
    colour = torch.tensor([[0.9, 0.4, 0.1]]).double()
    identity = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).double()
    background = (0.2, 0.3, 0.4)
    means, scales = torch.zeros(1, 3).double(), torch.full((1, 3), scale).double()
    scene = [means, scales, identity, torch.tensor([opacity]).double(), colour]
    picture = draw(scene, cameras, size, background=background)
    distance = float(cameras.world_to_camera[0, 2, 3])
    sharp = (float(cameras.intrinsics[0, 0, 0]) * size * scale / distance) ** 2
    away = torch.arange(size).double() + 0.5 - size / 2
    radius = away[:, None] ** 2 + away**2
    alpha = opacity * sharp / (sharp + 0.1) * torch.exp(-0.5 * radius / (sharp + 0.1))
    alpha = torch.where(alpha > CUT, alpha, 0.0)
    torch.testing.assert_close(picture.alpha[0], alpha, rtol=0, atol=1e-7)  # matrices of cameras are float32
    assert picture.alpha[0, 16, 16] == pytest.approx(opacity * sharp / (sharp + 0.1), abs=1e-7)
    assert 0 < int((picture.alpha == 0).sum()) < size**2
    expected = alpha[..., None] * colour[0] + (1 - alpha[..., None]) * torch.tensor(background).double()
    torch.testing.assert_close(picture.colours[0], expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(
        picture.depth[0], torch.where(alpha > 0, distance, torch.zeros_like(alpha)), rtol=0, atol=1e-7
    )


def test_the_nearer_gaussian_covers_the_other() -> None:
    """Red in front of green, whatever their order; from behind green covers red."""
    size, scale = 9, 10.0  # so wide that alpha is the opacity everywhere
    red, green = (0.6, 0.5)
    means = torch.tensor([[0.0, -0.1, 0.0], [0.0, 0.1, 0.0]]).double()
    identity = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).double().expand(2, 4)
    attributes = [means, torch.full((2, 3), scale).double(), identity, torch.tensor([red, green]).double()]
    attributes.append(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).double())
    cameras = turntable_cameras(2, 0.6, elevation=0.0).to(dtype=torch.float64)
    distance = float(cameras.world_to_camera[0, 2, 3])
    for order in ([0, 1], [1, 0]):
        picture = draw([tensor[order] for tensor in attributes], cameras, size, background=(0, 0, 1))
        for view, (near, far) in enumerate([(red, green), (green, red)]):
            weights = {near: near, far: (1 - near) * far}
            left = (1 - near) * (1 - far)
            expected = torch.tensor([weights[red], weights[green], left]).double()
            torch.testing.assert_close(picture.colours[view, 4, 4], expected, rtol=0, atol=1e-4)
            depth = (weights[near] * (distance - 0.1) + weights[far] * (distance + 0.1)) / (1 - left)
            assert picture.depth[view, 4, 4] == pytest.approx(depth, abs=1e-4)
            assert picture.alpha[view, 4, 4] == pytest.approx(1 - left, abs=1e-4)


def test_small_gaussians_are_where_cameras_project_them() -> None:
    cameras = cameras_of(3)
    point = torch.tensor([[0.11, -0.23, 0.17]]).double()
    height, width = 40, 60
    scales, rotation = torch.full((1, 3), 0.02).double(), torch.tensor([[0.5, 0.5, 0.5, 0.5]]).double()
    scene = [point, scales, rotation, torch.ones(1).double(), torch.ones(1, 3).double()]
    picture = draw(scene, cameras, (height, width))
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    share = picture.alpha / picture.alpha.sum((1, 2), keepdim=True)
    centroid = torch.stack([(share.sum(1) * x).sum(1) / width, (share.sum(2) * y).sum(1) / height], 1)
    places, depths = cameras.project(point)
    torch.testing.assert_close(centroid, places[:, 0], rtol=0, atol=2e-4)
    torch.testing.assert_close(picture.depth.amax((1, 2)), depths[:, 0])


# ---------------------------------------------------------------------- brute force


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(1, 60),
    st.integers(0, 1000),
    st.tuples(st.integers(1, 23), st.integers(1, 23)),
    st.sampled_from([(3e-3, 0.3), (1e-3, 1e-2), (0.05, 3.0)]),
    st.sampled_from([0.6, 0.1]),
    st.booleans(),
)
def test_random_scenes_by_brute_force(
    count: int, seed: int, size: tuple[int, int], sizes: tuple[float, float], radius: float, solid: bool
) -> None:
    """With radius 0.1 the cameras stand inside the cube: Gaussians beside and behind them."""
    scene = random_scene(count, seed, sizes)
    if solid:
        scene[3] = scene[3] ** 0.02
    inputs = tracked([*scene, torch.tensor([0.1, 0.5, 0.9]).double()])
    cameras = cameras_of(2, radius)
    ours = layers(draw(inputs[:5], cameras, size, background=inputs[5]))
    exact = by_brute_force(inputs[:5], cameras, size, inputs[5])
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-11)
    for mine, theirs in zip(gradients(ours, inputs), gradients(exact, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10 * (1 + float(theirs.abs().max())))


def test_gradients_by_finite_differences() -> None:
    """Wide Gaussians, so that none is cut inside the picture and the function is smooth."""
    scene = random_scene(3, 3, (0.3, 0.6))
    scene[3] = 0.2 + 0.5 * scene[3]

    def pictures(*inputs: Tensor) -> tuple[Tensor, ...]:
        picture = draw(list(inputs[:5]), cameras_of(1), (2, 3), background=inputs[5])
        return picture.colours, picture.alpha, picture.depth

    assert torch.autograd.gradcheck(pictures, tracked([*scene, torch.tensor([0.3, 0.1, 0.6]).double()]))


@pytest.mark.parametrize(
    "limits",
    [
        {"_RANGE": 5000},
        {"_RANGE": 10_000, "_KEPT": 0},
        {"_BLOCK": 300, "_LAYERS": 1},
        {"_BLOCK": 1 << 30},
        {"_TILES": (1,)},
        {"_TILES": (2,), "_RANGE": 3000, "_BLOCK": 500, "_LAYERS": 3},
        {"_TILES": (16,), "_RANGE": 2000},
        {"_TILES": (64,)},
        {"SORTABLE": 40},
    ],
    ids=str,
)
def test_chunks_and_tiles_do_not_matter(limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scene = random_scene(90, 7)
    scene[3] = scene[3] ** 0.1
    inputs, size = tracked(scene), (37, 29)
    expected = layers(draw(inputs, cameras_of(1), size))
    expected_gradients = gradients(expected, inputs)
    for name, value in limits.items():
        monkeypatch.setattr(rasterize_torch, name, value)
        if name == "SORTABLE":
            monkeypatch.setattr(tiles, "SORTABLE", value)
    ours = layers(draw(inputs, cameras_of(1), size))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    for mine, theirs in zip(gradients(ours, inputs), expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))


def test_gradients_of_single_layers_add_up() -> None:
    """Channels that a loss does not look at are left out of the backward pass."""
    inputs = tracked(random_scene(40, 9))
    image = layers(draw(inputs, cameras_of(1), 12))
    weights = torch.randn(image.shape, generator=torch.Generator().manual_seed(0), dtype=image.dtype)
    together = torch.autograd.grad((image * weights).sum(), inputs, retain_graph=True)
    single = [
        torch.autograd.grad((image * weights)[..., i].sum(), inputs, retain_graph=True, materialize_grads=True)
        for i in range(5)
    ]
    for whole, *parts in zip(together, *single, strict=True):
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=0, atol=1e-12 * float(whole.abs().max()))


# ---------------------------------------------------------------------- memory and precision


def test_memory_grows_with_neither_lists_nor_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists stay below their limit although every Gaussian covers the picture, and opaque tiles get none any more."""
    lengths, elements = [], []
    tile_lists = tiles.tile_lists
    make_block = rasterize_torch._Sweep._block

    def counted_lists(*arguments: Any) -> Any:
        lists = tile_lists(*arguments)
        lengths.append(len(lists.gaussians))
        return lists

    def counted_block(*arguments: Any) -> Any:
        block = make_block(*arguments)
        elements.append(block.weights.numel())
        return block

    monkeypatch.setattr(rasterize_torch, "tile_lists", counted_lists)
    monkeypatch.setattr(rasterize_torch._Sweep, "_block", counted_block)
    monkeypatch.setattr(rasterize_torch, "_TILES", (8,))
    monkeypatch.setattr(rasterize_torch, "_RANGE", 1000 * 64)
    monkeypatch.setattr(rasterize_torch, "_BLOCK", 1 << 13)
    scene = random_scene(1000, 0, (2.0, 3.0))
    scene[3] = 0.2 * scene[3]
    picture = draw(scene, cameras_of(1), 64)
    pairs = 1000 * TileGrid(64, 64, 8).tiles
    assert len(lengths) >= pairs // 1000
    assert max(lengths) <= 1000
    assert max(elements) <= 1 << 13
    assert sum(lengths) < 0.3 * pairs
    assert float(picture.alpha.min()) > 0.999


def test_float32_is_close_to_float64() -> None:
    """Rounding can move an alpha across the cut, which changes single pixels by 1 / 255 at most, and no more."""
    scene = random_scene(2000, 5, (3e-3, 2e-2))
    exact = layers(draw(scene, cameras_of(2), 64))
    single = layers(draw([tensor.float() for tensor in scene], cameras_of(2), 64))
    assert single.dtype == torch.float32
    difference = (single - exact)[..., [0, 1, 2, 4]].abs()
    assert float(difference.max()) < CUT
    assert float((difference > 2e-5).double().mean()) < 1e-2
    half = draw([tensor.half() for tensor in scene], cameras_of(1), 8)
    assert half.colours.dtype == torch.float32


def test_extreme_gaussians_give_finite_pictures_and_gradients() -> None:
    """Behind the camera, in its centre, beside it, huge, flat, invisible and opaque ones, in float32."""
    cameras = cameras_of(1).to(dtype=torch.float32)
    centre = cameras.centres
    ahead = cameras.world_to_camera[0, 2, :3]
    means = torch.cat(
        [
            centre - ahead,  # behind
            centre,
            centre + 0.011 * ahead + torch.tensor([[3.0, 3.0, 0.0]]),  # beside, hardly in front
            torch.zeros(7, 3),
            torch.full((1, 3), 1e30),
        ]
    )
    scales = torch.full((len(means), 3), 0.05)
    scales[3], scales[4], scales[5] = 1e38, 1e5, 1e-30
    scales[6] = torch.tensor([0.1, 0.1, 0.0])  # a disc, seen at an angle
    rotations = torch.nn.functional.normalize(torch.randn(len(means), 4, generator=torch.Generator().manual_seed(0)))
    opacities = torch.full((len(means),), 0.5)
    opacities[7], opacities[8], opacities[9] = 0.0, 1.0, 1e-3
    inputs = tracked([means, scales, rotations, opacities, torch.rand(len(means), 3)])
    image = layers(draw(inputs, cameras, 24))
    assert bool(image.isfinite().all())
    assert float(image[..., 4].detach().min()) > 0.49  # the huge ones cover everything
    for gradient in gradients(image, inputs):
        assert bool(gradient.isfinite().all())
        assert not gradient[:2].any()
        assert gradient[8].any()


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_to_see_gives_the_background(count: int) -> None:
    """No Gaussian, or only such as stand behind the camera."""
    cameras = cameras_of(2)[:1]
    behind = cameras.centres - cameras.world_to_camera[:, 2, :3]
    inputs = tracked([tensor[:count] for tensor in random_scene(3, 0)])
    with torch.no_grad():
        inputs[0][:] = behind
    background = torch.rand(7, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    picture = draw(inputs, cameras, (7, 5), background=background)
    assert torch.equal(picture.colours[0], background)
    assert not picture.alpha.any()
    assert not picture.depth.any()
    assert all(not gradient.any() for gradient in gradients(layers(picture), inputs))


def test_a_background_in_numbers_is_as_exact_as_the_picture() -> None:
    nothing = [tensor[:0] for tensor in random_scene(1, 0)]
    picture = draw(nothing, cameras_of(1), 1, background=(0.1, 0.7, 0.9))
    assert picture.colours[0, 0, 0].tolist() == [0.1, 0.7, 0.9]


# ---------------------------------------------------------------------- arguments


def gaussians_of(lengths: list[int]) -> Gaussians:
    means, scales, rotations, opacities, colours = random_scene(sum(lengths), 2)
    return Gaussians(means, scales, 3.0 * rotations, colours, opacities.logit(), torch.tensor(lengths))


def test_gaussians_are_drawn_by_their_attributes() -> None:
    batch = gaussians_of([30, 20])
    one = batch[1]
    drawn = rasterize(one, cameras_of(2), (11, 13), background=(1.0, 1.0, 1.0))
    expected = rasterize_tensors(
        one.means, one.scales, one.rotations, one.opacities, one.colours, cameras_of(2), (11, 13), background=(1, 1, 1)
    )
    assert drawn.colours.shape == (2, 11, 13, 3)
    assert drawn.alpha.shape == drawn.depth.shape == (2, 11, 13)
    assert torch.equal(layers(drawn), layers(expected))
    assert layers(rasterize(one, cameras_of(1), 8)).shape == (1, 8, 8, 5)
    single = layers(rasterize(one.to(dtype=torch.float32), cameras_of(1), 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layers(rasterize(one.to(dtype=torch.float32), cameras_of(1), 8)), single)
    with pytest.raises(InputError, match=r"draws one asset, got a batch of 2; draw gaussians\[i\]"):
        rasterize(batch, cameras_of(1), 8)


def with_value(index: int, value: float) -> Callable[[Scene], None]:
    def change(scene: Scene) -> None:
        scene[index][1] = value

    return change


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"size": 0}, r"size must be \(height, width\) of at least one pixel, got 0"),
        (None, {"size": (4, -1)}, "at least one pixel"),
        (None, {"kernel_size": 0.0}, "kernel_size and near must be positive"),
        (None, {"near": math.nan}, "kernel_size and near must be positive"),
        (None, {"background": torch.zeros(5, 3)}, r"background must be \[3\], \[4, 6, 3\] or \[2, 4, 6, 3\]"),
        (None, {"engine": "opengl"}, "engine must be 'auto', 'torch' or 'gsplat', got 'opengl'"),
        (None, {"engine": "gsplat"}, "draws on CUDA alone, but the Gaussians are on cpu"),
        (with_value(0, math.nan), {}, "means of 1 of 3 Gaussians are not finite"),
        (with_value(3, math.inf), {}, "opacities of 1 of 3 Gaussians are not finite"),
        (lambda scene: scene.__setitem__(2, scene[2][:, :3]), {}, r"rotations of 3 Gaussians must be \[3, 4\]"),
        (None, {"cameras": Cameras(torch.full((2, 4, 4), math.inf), torch.eye(3).expand(2, 3, 3))}, "not finite"),
    ],
)
def test_what_it_refuses(change: Callable[[Scene], None] | None, arguments: dict[str, Any], message: str) -> None:
    scene = random_scene(3, 0)
    if change:
        change(scene)
    with pytest.raises(InputError, match=message):
        draw(scene, **{"cameras": cameras_of(2), "size": (4, 6), **arguments})


def test_without_gsplat_one_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", dict[str, None]().get)
    means, scales, rotations, opacities, colours = random_scene(3, 0)
    with pytest.raises(InputError, match=r"needs the package 'gsplat', which is not installed: pip install gsplat$"):
        rasterize_gsplat.draw(
            means, scales, rotations, opacities[:, 0], colours, cameras_of(1), (4, 4), kernel_size=0.1, near=0.01
        )


def test_tiles_and_pictures() -> None:
    image = torch.rand(2, 7, 10, generator=torch.Generator().manual_seed(0))
    grid = TileGrid(7, 10, 4)
    cells = grid.split(image)
    assert cells.shape == (2, 16, 6)
    assert torch.equal(grid.join(cells), image)
    x, y = grid.offsets(torch.float32, torch.device("cpu"))
    middles = grid.middles(torch.arange(6), torch.float32)
    place = torch.stack([middles[0] + x[:, None], middles[1] + y[:, None]])
    inside = (place[0] < 10) & (place[1] < 7)
    seen = image[0, place[1].long().clamp(max=6), place[0].long().clamp(max=9)]
    assert torch.equal(cells[0], torch.where(inside, seen, 0.0))
