"""Assets in shards: voxels and views as two files, so that nothing is rendered or packed in training.

KEY.voxels.safetensors    features          uint8 [N, 768]: 0..255 for 0..1; patches come from 8-bit pictures
                          coordinates       int16 [N, 3]: x, y, z
                          world_to_camera   float32 [V, 4, 4], and
                          intrinsics        float32 [V, 3, 3]: of all views, the seen ones first
                          seen              bool [V]: whether the voxels were made from the view
KEY.views.webp            all views, row by row in a grid as square as can be: lossless, straight alpha, with the
                          colours that lie under alpha zero
KEY.json                  resolution, rule, view_size, views (how many), to_original (see `AssetSize`)
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from data.samples import VIEWS_EXTENSION, VOXELS_EXTENSION, SampleError, Seen
from tokenizer.assets.rules import PackingRule
from tokenizer.assets.views import Views
from tokenizer.cameras import Cameras
from tokenizer.errors import InputError
from tokenizer.media.images import open_image
from tokenizer.voxels import AssetSize

DAMAGED = "damaged asset"

MAX_SIDE = 16383
"""Pixels a side of a WebP picture."""

IDENTITY = tuple(tuple(float(row == column) for column in range(4)) for row in range(4))

_EFFORT = 30
"""Of lossless WebP, 0..100: more takes several times as long and saves a few per cent."""

_LAYOUT = {
    "features": (torch.uint8, (-1, -1)),
    "coordinates": (torch.int16, (-1, 3)),
    "world_to_camera": (torch.float32, (-1, 4, 4)),
    "intrinsics": (torch.float32, (-1, 3, 3)),
    "seen": (torch.bool, (-1,)),
}


@dataclass(frozen=True, slots=True)
class StoredVoxels:
    """What KEY.voxels.safetensors holds; shapes and types as in the module text."""

    features: Tensor
    coordinates: Tensor
    cameras: Cameras
    seen: Tensor


def encode_asset_files(
    features: Tensor,
    coordinates: Tensor,
    resolution: int,
    rule: PackingRule,
    seen: Views,
    unseen: Views | None = None,
    *,
    to_original: Sequence[Sequence[float]] = IDENTITY,
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of an asset, and its part of KEY.json.

    Args:
        features: [N, 768] floating, in [0, 1].
        coordinates: [N, 3] integer, in 0..resolution - 1.
        resolution: voxels along an edge of the cube.
        rule: by which the features were packed.
        seen: the views that the voxels were made from.
        unseen: further views of the same size; their depth is not kept, nor that of the seen ones.
        to_original: [4, 4], from the cube to the axes and units of the asset's file (`AssetSize`).

    Returns:
        Contents by extension; facts.

    Raises:
        InputError: shapes, types or ranges that do not fit, or more or larger views than one picture holds.
    """
    size = AssetSize(resolution, tuple(tuple(float(value) for value in row) for row in to_original))
    _check_voxels(features, coordinates, resolution)
    parts = [seen] if unseen is None else [seen, unseen]
    if len({views.size for views in parts}) != 1:
        raise InputError(f"views of one asset must have one size, got {[views.size for views in parts]}")
    count = sum(len(views) for views in parts)
    if max(_grid(count)) * seen.size > MAX_SIDE:
        raise InputError(
            f"{count} views of {seen.size} x {seen.size} do not fit a WebP of {MAX_SIDE} pixels a side; store fewer"
        )
    cameras = [views.cameras.to(dtype=torch.float32) for views in parts]
    tensors = {
        "features": (features.float() * 255).round().clamp(0, 255).to(torch.uint8),
        "coordinates": coordinates.to(torch.int16),
        "world_to_camera": torch.cat([camera.world_to_camera for camera in cameras]),
        "intrinsics": torch.cat([camera.intrinsics for camera in cameras]),
        "seen": torch.cat([torch.full((len(views),), views is seen) for views in parts]),
    }
    files = {
        VOXELS_EXTENSION: safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}),
        VIEWS_EXTENSION: _encode_views(np.concatenate([views.colours for views in parts])),
    }
    facts = {
        "resolution": resolution,
        "rule": rule,
        "view_size": seen.size,
        "views": count,
        "to_original": [list(row) for row in size.to_original],
    }
    return files, facts


def decode_voxels(files: Mapping[str, bytes], facts: Mapping[str, Any], name: str) -> StoredVoxels:
    """Read KEY.voxels.safetensors.

    Args:
        files: of the sample, by extension.
        facts: of the sample.
        name: of the sample, for errors.

    Raises:
        SampleError: "damaged asset" for a file that cannot be read or holds something else, "damaged facts" for a
            `KEY.json` that does not describe an asset.
    """
    size = asset_size(facts, name)
    try:
        tensors = safetensors.torch.load(files[VOXELS_EXTENSION])
    # TypeError, KeyError, ValueError: headers that are JSON and yet not what they should be.
    except (SafetensorError, TypeError, KeyError, ValueError, OverflowError, RuntimeError) as error:
        raise _damaged(name, f"not readable as safetensors ({' '.join(str(error).split())})") from None
    for key, (dtype, shape) in _LAYOUT.items():
        tensor = tensors.get(key)
        if tensor is None or tensor.dtype != dtype or not _fits(tensor, shape):
            found = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise _damaged(name, f"'{key}' must be {dtype} {shape} (-1: any), got {found}")
    features, coordinates = tensors["features"], tensors["coordinates"]
    views = {len(tensors[key]) for key in ("world_to_camera", "intrinsics", "seen")}
    if not 0 < len(features) == len(coordinates) or len(views) != 1:
        raise _damaged(name, f"{len(features)} patches at {len(coordinates)} places, cameras {sorted(views)}")
    if int(coordinates.min()) < 0 or int(coordinates.max()) >= size.resolution:
        raise _damaged(name, f"coordinates outside 0..{size.resolution - 1}")
    cameras = Cameras(tensors["world_to_camera"], tensors["intrinsics"])
    if not bool(cameras.world_to_camera.isfinite().all() and cameras.intrinsics.isfinite().all()):
        raise _damaged(name, "cameras that are not finite")
    return StoredVoxels(features, coordinates, cameras, tensors["seen"])


def decode_views(files: Mapping[str, bytes], stored: StoredVoxels, chosen: Sequence[int], name: str) -> Seen:
    """Some views by number.

    Raises:
        SampleError: "damaged asset" for a picture that is missing, cannot be read or has another number of views.
    """
    if VIEWS_EXTENSION not in files:
        raise _damaged(name, "has no pictures of its views")
    try:
        image = open_image(files[VIEWS_EXTENSION])
        pixels = np.asarray(image.convert("RGBA"))
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead them to
        raise _damaged(name, f"pictures that cannot be read ({' '.join(str(error).split())})") from None
    rows, columns = _grid(len(stored.seen))
    size = pixels.shape[0] // rows
    if pixels.shape[:2] != (rows * size, columns * size) or size == 0:
        raise _damaged(name, f"{len(stored.seen)} views do not fill a picture of {pixels.shape[0]} x {pixels.shape[1]}")
    tiles = pixels.reshape(rows, size, columns, size, 4)
    pictures = np.stack([tiles[number // columns, :, number % columns] for number in chosen])
    index = torch.tensor(chosen, dtype=torch.int64)
    return Seen(
        torch.from_numpy(pictures),
        Cameras(stored.cameras.world_to_camera[index], stored.cameras.intrinsics[index]),
    )


def asset_size(facts: Mapping[str, Any], name: str) -> AssetSize:
    """Resolution and orientation of a stored asset.

    Raises:
        SampleError: "damaged facts" where they are missing or make no sense.
    """
    try:
        rows = facts.get("to_original", IDENTITY)
        return AssetSize(int(facts["resolution"]), tuple(tuple(float(value) for value in row) for row in rows))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = "no 'resolution'" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise SampleError("damaged facts", f"{name}.json: does not describe an asset ({reason})") from None


def _encode_views(pictures: NDArray[np.uint8]) -> bytes:
    """uint8 [V, H, H, 4] -> one WebP."""
    rows, columns = _grid(len(pictures))
    size = pictures.shape[1]
    tiles = np.zeros((rows * columns, size, size, 4), np.uint8)
    tiles[: len(pictures)] = pictures
    grid = tiles.reshape(rows, columns, size, size, 4).transpose(0, 2, 1, 3, 4).reshape(rows * size, columns * size, 4)
    encoded = io.BytesIO()
    Image.fromarray(grid).save(encoded, "WEBP", lossless=True, exact=True, quality=_EFFORT, method=4)
    return encoded.getvalue()


def _grid(views: int) -> tuple[int, int]:
    """Rows and columns of the picture of so many views."""
    columns = math.isqrt(max(1, views) - 1) + 1
    return -(-views // columns), columns


def _check_voxels(features: Tensor, coordinates: Tensor, resolution: int) -> None:
    if features.ndim != 2 or not features.is_floating_point() or len(features) == 0:
        raise InputError(f"features must be floating [N, 768], got {features.dtype} {tuple(features.shape)}")
    if coordinates.shape != (len(features), 3) or coordinates.is_floating_point():
        raise InputError(f"coordinates must be integer [{len(features)}, 3], got {tuple(coordinates.shape)}")
    low, high = (float(value) for value in torch.aminmax(features))
    if not (low >= -0.01 and high <= 1.01):  # also false for NaN
        raise InputError(f"features must lie in [0, 1], got {low:g} to {high:g}")
    if int(coordinates.min()) < 0 or int(coordinates.max()) >= resolution:
        raise InputError(f"coordinates must lie in 0..{resolution - 1}")


def _fits(tensor: Tensor, shape: Sequence[int]) -> bool:
    return tensor.ndim == len(shape) and all(
        wanted in (-1, side) for side, wanted in zip(tensor.shape, shape, strict=True)
    )


def _damaged(name: str, what: str) -> SampleError:
    return SampleError(DAMAGED, f"{name}: {what}")
