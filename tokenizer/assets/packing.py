"""Views of an asset -> its voxels, each with one 16 x 16 patch of colours (FORMAT 13 and better rules).

All rules fill the same tokens, and differ in what the patch of a voxel shows:

- "released": the cell of the nearest view's 16 x 16 grid of patches in which the voxel's centre falls, seen or not.
  What the released weights were trained on, down to the 16 bits in which depths and patches were stored.
- "visible": the same, of the nearest view that sees a surface inside the voxel.
- "average": the mean of those cells over all views that see the voxel (the paper's text).
- "surface": a picture of the surface inside the voxel, put together from the pixels of all views that fall into it. Its
  upper half shows the colours of the voxel's eight octants; the greys of its lower half tell where in the voxel the
  surface lies and where it faces. A patch of a view is four voxels wide, so that neighbours share it and none says
  which part of it is its own; this one says what a decoder has to know, in the low spatial frequencies that a tokenizer
  of pictures keeps best.

Pixels are where their centres are, except for "released", which puts them at their upper left corners.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.assets.rules import PACKING_RULES, PackingRule
from tokenizer.assets.views import Views
from tokenizer.cameras import Cameras
from tokenizer.errors import InputError
from tokenizer.voxels import RESOLUTION, nearest_view_features, occupied_voxels, surface_points, view_patches

CELL = 4
"""Rows and columns of a cell of a "surface" patch, which has 4 x 4 cells."""

THICKEST = 12**-0.5
"""Standard deviation of points spread evenly across a voxel, in voxels."""


@dataclass(frozen=True, slots=True)
class Voxels:
    """features [N, 768] float32 in [0, 1] and coordinates [N, 3] int32 (x, y, z), row-major order."""

    features: Tensor
    coordinates: Tensor


def pack(
    views: Views,
    rule: PackingRule = "surface",
    resolution: int = RESOLUTION,
    generator: torch.Generator | None = None,
) -> Voxels:
    """The voxels of an asset.

    Args:
        views: all cameras outside the cube that the voxels fill.
        rule: see the top of this file.
        resolution: voxels along an edge of the cube.
        generator: for "released" with more than 500,000 surface pixels, of which it keeps a random half million.

    Raises:
        InputError: an unknown rule, or views that show nothing inside the cube.
    """
    if rule not in PACKING_RULES:
        raise InputError(f"unknown packing rule '{rule}'; known: {', '.join(PACKING_RULES)}")
    if rule == "released":
        return _pack_as_released(views, resolution, generator)
    pixels = _surface_pixels(views, resolution)
    _refuse_nothing(pixels.coordinates)
    if rule == "surface":
        return Voxels(_surface_patches(pixels, resolution), pixels.coordinates)
    maps = torch.stack([view_patches(picture) for picture in views.colours]).float() / 255
    return Voxels(_view_cells(pixels, views.cameras, maps, resolution, average=rule == "average"), pixels.coordinates)


def _pack_as_released(views: Views, resolution: int, generator: torch.Generator | None) -> Voxels:
    depth = views.depth.half().float()  # near the cube up to 1/16 of a voxel of 64: some others are filled
    coordinates = occupied_voxels(surface_points(depth, views.cameras, generator), resolution)
    _refuse_nothing(coordinates)
    maps = torch.stack([view_patches(picture) for picture in views.colours])
    features = nearest_view_features(coordinates, views.cameras, maps, resolution).float() / 255
    return Voxels(features.half().float(), coordinates)


def octants(views: Views, resolution: int = RESOLUTION) -> tuple[Voxels, Tensor, Tensor, Tensor]:
    """What the views say about the octants of each voxel; for fitting a decoder's start and for baselines.

    Returns:
        The voxels of the rule "surface"; and for each voxel and octant 4 x + 2 y + z: the mean place of its surface
        [N, 8, 3] in 0..1 across the voxel, its mean colour [N, 8, 3] in 0..1, and its number of pixels [N, 8].
    """
    pixels = _surface_pixels(views, resolution)
    _refuse_nothing(pixels.coordinates)
    place = _place(pixels, resolution)
    total = _octant_sums(pixels, place, torch.cat([place, pixels.colours], dim=1))
    means = total[..., :6] / total[..., 6:].clamp_min(1)
    voxels = Voxels(_surface_patches(pixels, resolution), pixels.coordinates)
    return voxels, means[..., :3], means[..., 3:], total[..., 6]


def _refuse_nothing(coordinates: Tensor) -> None:
    if not len(coordinates):
        raise InputError(
            "the views show no surface inside the cube from -0.5 to 0.5: all of it is transparent, or lies elsewhere "
            "and is to be normalised"
        )


@dataclass(frozen=True, slots=True)
class _SurfacePixels:
    """P pixels that see a surface inside the cube, and the N voxels they fall into.

    points: [P, 3] world; towards: [P, 3] unit vectors to the camera; colours: [P, 3] in 0..1; view: [P];
    voxel: [P] rows of `coordinates`; coordinates: [N, 3] int32, row-major; count: [N] pixels of each voxel.
    """

    points: Tensor
    towards: Tensor
    colours: Tensor
    view: Tensor
    voxel: Tensor
    coordinates: Tensor
    count: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """[P, C] -> [N, C]."""
        total = values.new_zeros(len(self.coordinates), values.shape[1]).index_add_(0, self.voxel, values)
        return total / self.count[:, None]


def _surface_pixels(views: Views, resolution: int) -> _SurfacePixels:
    size = views.depth.shape[1]
    if size != views.size:
        raise InputError(f"this packing rule needs depth as large as the views, got {size} and {views.size}")
    view, row, column = torch.nonzero(views.depth >= 0, as_tuple=True)
    depth = views.depth[view, row, column].float()
    image = torch.stack([(column + 0.5) / size, (row + 0.5) / size, torch.ones(len(row), device="cpu")], dim=1)
    inverse = torch.linalg.inv(views.cameras.intrinsics.float())
    local = (inverse[view] @ image[:, :, None])[..., 0] * depth[:, None]
    to_world = torch.linalg.inv(views.cameras.world_to_camera.float())
    points = (to_world[view, :3, :3] @ local[:, :, None])[..., 0] + to_world[view, :3, 3]
    cell = torch.floor((points + 0.5) * resolution).long()
    # Faces of the cube belong to the outermost voxels: normalised assets touch them.
    on_face = (points.abs() - 0.5).abs() < 1e-3 / resolution
    cell = torch.where(on_face, cell.clamp(0, resolution - 1), cell)
    inside = ((cell >= 0) & (cell < resolution)).all(dim=1)
    cell, points, view, row, column = cell[inside], points[inside], view[inside], row[inside], column[inside]
    key, voxel, count = torch.unique(
        (cell[:, 0] * resolution + cell[:, 1]) * resolution + cell[:, 2], return_inverse=True, return_counts=True
    )
    coordinates = torch.stack([key // resolution**2, key // resolution % resolution, key % resolution], dim=1).int()
    colours = torch.from_numpy(views.colours)[view, row, column, :3].float() / 255
    towards = F.normalize(views.cameras.centres.float()[view] - points, dim=1)
    return _SurfacePixels(points, towards, colours, view, voxel, coordinates, count)


def _surface_patches(pixels: _SurfacePixels, resolution: int) -> Tensor:
    """[N, 768] of the rule "surface"."""
    place = _place(pixels, resolution)
    upper = _octant_colours(pixels, place)
    centre = pixels.mean(place)
    spread = place - centre[pixels.voxel]
    covariance = pixels.mean((spread[:, :, None] * spread[:, None, :]).flatten(1)).unflatten(1, (3, 3))
    variances, axes = torch.linalg.eigh(covariance.double())
    normal = axes[:, :, 0].float()
    facing = (normal * pixels.mean(pixels.towards)).sum(dim=1, keepdim=True)
    normal = torch.where(facing < 0, -normal, normal)
    thickness = (variances[:, :1].clamp_min(0).sqrt() / THICKEST).float()
    extent = (variances[:, 2:].clamp_min(0).sqrt() / THICKEST / 2).float()
    lower = torch.cat([centre, thickness, (normal + 1) / 2, extent], dim=1).clamp(0, 1)
    cells = torch.cat([upper, lower[:, :, None].expand(-1, -1, 3)], dim=1).unflatten(1, (4, 4))
    # Smooth transitions: what changes abruptly is lost in the high frequencies.
    patches = F.interpolate(cells.permute(0, 3, 1, 2), scale_factor=CELL, mode="bilinear", align_corners=False)
    return patches.permute(0, 2, 3, 1).flatten(1)


def _place(pixels: _SurfacePixels, resolution: int) -> Tensor:
    """[P, 3] in 0..1 across the voxel."""
    return (pixels.points + 0.5) * resolution - pixels.coordinates[pixels.voxel]


def _octant_colours(pixels: _SurfacePixels, place: Tensor) -> Tensor:
    """[N, 8, 3], octant 4 x + 2 y + z; an empty one has the mean colour of the voxel."""
    total = _octant_sums(pixels, place, pixels.colours)
    mean = pixels.mean(pixels.colours)[:, None]
    return torch.where(total[..., 3:] > 0, total[..., :3] / total[..., 3:].clamp_min(1), mean)


def _octant_sums(pixels: _SurfacePixels, place: Tensor, values: Tensor) -> Tensor:
    """[P, C] -> [N, 8, C + 1] sums over octants, the number of pixels last."""
    half = (place >= 0.5).long()
    slot = pixels.voxel * 8 + half[:, 0] * 4 + half[:, 1] * 2 + half[:, 2]
    total = torch.zeros(len(pixels.coordinates) * 8, values.shape[1] + 1, device="cpu")
    total.index_add_(0, slot, F.pad(values, (0, 1), value=1.0))
    sums: Tensor = total.unflatten(0, (-1, 8))
    return sums


def _view_cells(pixels: _SurfacePixels, cameras: Cameras, maps: Tensor, resolution: int, *, average: bool) -> Tensor:
    """[N, 768]: the cells of `maps` [V, 768, h, w] where voxels fall, in one or in all of the views that see them."""
    voxels, views = len(pixels.coordinates), len(maps)
    seen = torch.zeros(voxels, views, dtype=torch.bool, device="cpu")
    seen[pixels.voxel, pixels.view] = True
    centres = (pixels.coordinates.float() + 0.5) / resolution - 0.5
    place, depth = cameras.project(centres)
    if not average:
        nearest = torch.where(seen.T, depth, torch.inf).argmin(dim=0)
        seen = F.one_hot(nearest, views).bool()
    total = torch.zeros(voxels, maps.shape[1], device="cpu")
    height, width = maps.shape[2:]
    for view in range(views):
        rows = torch.nonzero(seen[:, view])[:, 0]
        u, v = place[view, rows].unbind(1)
        column = torch.round(u * (width - 1)).long().clamp(0, width - 1)
        row = torch.round(v * (height - 1)).long().clamp(0, height - 1)
        total[rows] += maps[view, :, row, column].T
    return total / seen.sum(dim=1, keepdim=True)
