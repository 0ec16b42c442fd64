"""From whatever stands for an asset, a file, a mesh or views of it, to voxels."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from tokenizer.assets.load import load_mesh
from tokenizer.assets.mesh import Mesh
from tokenizer.assets.packing import Voxels, pack
from tokenizer.assets.raycast import render_views
from tokenizer.assets.rules import PackingRule
from tokenizer.assets.views import TRANSFORMS_FILE, Views
from tokenizer.cameras import sphere_cameras
from tokenizer.voxels import AssetSize

AssetSource = str | PathLike[str] | Mesh | Views

VIEWS, VIEW_SIZE, VIEW_SAMPLES = 16, 256, 2
"""Views that an asset is seen from, their rows and columns, and rays along each side of a pixel at edges."""


def asset_voxels(
    source: AssetSource, rule: PackingRule, resolution: int, on_view: Callable[[], object] | None = None
) -> tuple[Voxels, AssetSize]:
    """The voxels of one asset.

    Args:
        source: a file of a mesh, a mesh, views, a folder of views, or its `transforms.json`. Meshes are normalised to
            the cube and rendered; views must show the cube from -0.5 to 0.5 already.
        rule: see `tokenizer.assets.packing`.
        resolution: voxels along an edge of the cube.
        on_view: called after each rendered view, for progress.

    Raises:
        InputError: a file that cannot be read, or nothing to see.
    """
    views, to_original = asset_views(source, on_view)
    voxels = pack(views, rule, resolution, torch.Generator().manual_seed(0))
    return voxels, AssetSize(resolution, tuple(tuple(row) for row in to_original.tolist()))


def asset_views(
    source: AssetSource, on_view: Callable[[], object] | None = None
) -> tuple[Views, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """The views that voxels are made from, and the matrix [4, 4] back to the axes and units of the source."""
    if isinstance(source, (str, PathLike)):
        path = Path(source)
        if is_views(path):
            source = Views.load(path.parent if path.name == TRANSFORMS_FILE else path)
        else:
            source = load_mesh(path)
    if isinstance(source, Views):
        return source, np.eye(4)
    mesh = source.normalised()
    cameras = sphere_cameras(VIEWS, mesh.radius)
    views = render_views(mesh, cameras, VIEW_SIZE, samples=VIEW_SAMPLES, on_view=on_view)
    return views, mesh.to_original.astype(np.float64)


def is_views(path: Path) -> bool:
    """Whether `path` is a folder of views or its `transforms.json`."""
    return path.name == TRANSFORMS_FILE or (path / TRANSFORMS_FILE).is_file()
