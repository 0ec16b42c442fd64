"""3D assets as voxel tokens: packing multi-view renders into voxels, and voxels <-> `SparseTokens` (FORMAT 11, 13).

Pure functions on arrays; reading meshes, images and camera files is the business of `data`.

Each occupied voxel of a cubic grid carries one 16 x 16 patch of colours, taken from the view that is nearest to it. The
box reaches from -0.5 to 0.5 in the world.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.cameras import Cameras, cameras_from_transforms
from tokenizer.errors import InputError
from tokenizer.patches import PATCH_SIZE, PatchSize, patchify
from tokenizer.sparse import SparseTokens

RESOLUTION = 64
"""Voxels along an edge of the released grid."""

VIEW_SIZE = 256
"""Views are resized to this many rows and columns before they are cut into patches."""

MAX_RESOLUTION = 1024
"""Finest grid that is read or made; finer ones hold more voxels than any memory."""

MAX_SURFACE_POINTS = 500_000

ASSET_TIME = 1
"""The t of every voxel token, as released; encoder and decoder see it relative to the batch (FORMAT 10)."""


@dataclass(frozen=True, slots=True)
class AssetSize:
    """What a token file keeps of an asset beside its tokens.

    resolution: voxels along an edge of the cube that the asset was normalised to.
    to_original: 4 x 4, row by row; takes the world of the cube back to the axes and units of the asset's file.
    """

    resolution: int
    to_original: tuple[tuple[float, ...], ...] = (
        (1.0, 0.0, 0.0, 0.0),
        (0.0, 1.0, 0.0, 0.0),
        (0.0, 0.0, 1.0, 0.0),
        (0.0, 0.0, 0.0, 1.0),
    )
    kind: Literal["asset"] = "asset"

    def __post_init__(self) -> None:
        if not 1 <= self.resolution <= MAX_RESOLUTION:
            raise InputError(f"the resolution of an asset must lie in 1..{MAX_RESOLUTION}, got {self.resolution}")
        rows = [list(row) for row in self.to_original]
        if [len(row) for row in rows] != [4] * 4 or not all(math.isfinite(value) for row in rows for value in row):
            raise InputError("to_original must be 4 rows of 4 finite numbers")


def voxels_to_tokens(features: Tensor, coordinates: Tensor, patch_size: PatchSize = PATCH_SIZE) -> SparseTokens:
    """One asset as tokens for `AToken.encode`: colours become frame 0 of a patch, the other frames are zeros.

    Args:
        features: [N, 768] patches of 16 rows, 16 columns and 3 colours, values in [0, 1].
        coordinates: [N, 3] integer x, y, z of the voxels.
        patch_size: of the model.

    Raises:
        InputError: shapes that do not fit, or values outside [0, 1] or not finite.
    """
    frame = patch_size[1] * patch_size[2] * 3
    if features.ndim != 2 or features.shape[1] != frame or not features.is_floating_point():
        raise InputError(f"voxel features must be floats [N, {frame}], got {features.dtype} {tuple(features.shape)}")
    if coordinates.shape != (len(features), 3):
        raise InputError(f"voxel coordinates must be [{len(features)}, 3], got {tuple(coordinates.shape)}")
    if features.numel():
        low, high = (float(value) for value in torch.aminmax(features.detach()))
        if not (low >= -0.01 and high <= 1.01):  # also false for NaN
            raise InputError(f"voxel features must lie in [0, 1], got {low:g} to {high:g}")
    positions = F.pad(coordinates, (1, 0), value=ASSET_TIME)
    return SparseTokens(F.pad(features * 2 - 1, (0, frame * (patch_size[0] - 1))), positions, [len(features)])


def voxel_features(patches: SparseTokens, patch_size: PatchSize = PATCH_SIZE) -> SparseTokens:
    """The part of decoded patches that describes voxels, [N, 768]: frame 0, nominally in [-1, 1]."""
    return patches.with_features(patches.features[:, : patch_size[1] * patch_size[2] * 3])


def pack_views(
    images: Sequence[np.ndarray[Any, Any]],
    depth: Tensor,
    transforms: Mapping[str, Any],
    resolution: int = RESOLUTION,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Multi-view renders of one asset -> its voxels.

    Args:
        images: V pictures, uint8 [H, W, 3 or 4]; alpha is dropped without compositing.
        depth: [V, H', W'] depth along the camera axis, negative where there is nothing.
        transforms: cameras as `cameras_from_transforms` reads them.
        resolution: voxels along an edge.
        generator: thins out more than `MAX_SURFACE_POINTS` surface points; needed only then.

    Returns:
        Features [N, 768] float32 in [0, 1] and coordinates [N, 3] int32 (x, y, z) in row-major order.
    """
    cameras = cameras_from_transforms(transforms)
    if not len(images) == len(depth) == len(cameras.intrinsics):
        raise InputError(
            f"{len(images)} images, {len(depth)} depth maps and {len(cameras.intrinsics)} cameras; each view needs one"
        )
    coordinates = occupied_voxels(surface_points(depth, cameras, generator), resolution)
    maps = torch.stack([view_patches(image) for image in images])
    return nearest_view_features(coordinates, cameras, maps, resolution).float() / 255.0, coordinates


def surface_points(depth: Tensor, cameras: Cameras, generator: torch.Generator | None = None) -> Tensor:
    """World points that the depth maps see, [P, 3] float32.

    Args:
        depth: [V, H, W], negative where there is nothing. A pixel stands for its upper left corner, as released.
        generator: thins out more than `MAX_SURFACE_POINTS` points; needed only then.
    """
    views, height, width = depth.shape
    depth = depth.float()
    v, u = torch.meshgrid(
        torch.arange(height, device="cpu") / height, torch.arange(width, device="cpu") / width, indexing="ij"
    )
    pixels = torch.stack([u, v, torch.ones_like(u)], dim=-1).reshape(1, -1, 3)
    rays = pixels @ torch.linalg.inv(cameras.intrinsics).transpose(1, 2)
    local = F.pad(rays * depth.reshape(views, -1, 1), (0, 1), value=1.0)
    world: Tensor = (local @ torch.linalg.inv(cameras.world_to_camera).transpose(1, 2))[..., :3]
    points = world[depth.reshape(views, -1) >= 0]
    if len(points) <= MAX_SURFACE_POINTS:
        return points
    if generator is None:
        raise InputError(f"{len(points)} surface points are thinned out at random; give a torch.Generator")
    return points[torch.randperm(len(points), generator=generator)[:MAX_SURFACE_POINTS]]


def occupied_voxels(points: Tensor, resolution: int = RESOLUTION) -> Tensor:
    """Voxels that hold a point, [N, 3] int32 (x, y, z) in row-major order.

    A point on the face between two voxels fills both; points outside the box fill none.
    """
    cell = torch.floor((points + 0.5) * resolution)
    low, high = cell.clone(), cell.clone()
    for neighbour, side in ((low, -1), (high, 1)):
        centre = (cell + side + 0.5) / resolution - 0.5
        neighbour += side * ((centre - points).abs() <= 0.5 / resolution)
    corners = torch.stack([low, high]).long()
    choice = torch.cartesian_prod(*[torch.arange(2, device="cpu")] * 3)
    filled = torch.stack([corners[choice[:, axis], :, axis] for axis in range(3)], dim=-1).reshape(-1, 3)
    filled = filled[((filled >= 0) & (filled < resolution)).all(dim=1)]
    key = torch.unique((filled[:, 0] * resolution + filled[:, 1]) * resolution + filled[:, 2])
    return torch.stack([key // resolution**2, key // resolution % resolution, key % resolution], dim=1).int()


def view_patches(image: np.ndarray[Any, Any]) -> Tensor:
    """A view as a map of patches, uint8 [768, 16, 16]: (row, column, colour) of a patch, then the row and column of it.

    Args:
        image: uint8 [H, W, 3 or 4], resized to 256 x 256; alpha weighs the colours while resizing and is then dropped.
    """
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
        raise InputError(f"a view must be uint8 [H, W, 3 or 4], got {image.dtype} {image.shape}")
    resized = Image.fromarray(image).resize((VIEW_SIZE, VIEW_SIZE), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(resized)[None, :, :, :3])
    _, rows, columns = PATCH_SIZE
    return patchify(pixels, (1, rows, columns)).T.reshape(-1, VIEW_SIZE // rows, VIEW_SIZE // columns)


def nearest_view_features(coordinates: Tensor, cameras: Cameras, maps: Tensor, resolution: int = RESOLUTION) -> Tensor:
    """The patch that the nearest view has where the voxel's centre falls, [N, 768] in the dtype of `maps`.

    Nearest is the smallest depth along the camera axis, of several the first; there is no test for visibility, and a
    centre outside the picture of its nearest view gives zeros (as released).

    Args:
        coordinates: [N, 3] integer x, y, z.
        maps: [V, 768, h, w].
    """
    centres = (coordinates.float() + 0.5) / resolution - 0.5
    local = F.pad(centres, (0, 1), value=1.0) @ cameras.world_to_camera.transpose(1, 2)
    view = local[..., 2].argmin(dim=0)
    chosen = local[view, torch.arange(len(view), device="cpu"), :3]
    projected = (cameras.intrinsics[view] @ chosen[:, :, None])[..., 0]
    u, v = (projected[:, :2] / projected[:, 2:]).unbind(1)
    height, width = maps.shape[2:]
    column, row = torch.round(u * (width - 1)), torch.round(v * (height - 1))
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    cells = maps[view, :, row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()]
    return cells * inside[:, None].to(maps.dtype)
