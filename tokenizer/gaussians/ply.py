"""Gaussians as .ply files, in the columns that splat viewers read (FORMAT 11)."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError
from tokenizer.gaussians.attributes import Gaussians


def ply_columns(gaussians: Gaussians) -> dict[str, Tensor]:
    """Column name -> [M] values, in file order.

    Positions are world coordinates, normals are zero, scales are logarithms, opacities logits, rotations quaternions
    (w, x, y, z) that are not normalised. No axis is turned.
    """
    groups: list[tuple[str, Tensor]] = [
        *zip("xyz", gaussians.means.unbind(1), strict=True),
        *((f"n{axis}", torch.zeros_like(gaussians.means[:, 0])) for axis in "xyz"),
        *((f"f_dc_{i}", column) for i, column in enumerate(gaussians.dc.unbind(1))),
        ("opacity", gaussians.opacity_logits[:, 0]),
        *((f"scale_{i}", column) for i, column in enumerate(gaussians.scales.log().unbind(1))),
        *((f"rot_{i}", column) for i, column in enumerate(gaussians.quaternions.unbind(1))),
    ]
    return dict(groups)


def write_ply(gaussians: Gaussians, path: str | os.PathLike[str]) -> None:
    """Write one asset as binary little-endian .ply, float32 columns; the file appears whole or not at all.

    Raises:
        InputError: the Gaussians are of several assets.
    """
    if len(gaussians.lengths) != 1:
        raise InputError(f"a .ply file holds one asset, got a batch of {len(gaussians.lengths)}; write gaussians[i]")
    columns = ply_columns(gaussians)
    table = torch.stack([column.detach().float().cpu() for column in columns.values()], dim=1).numpy()
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(gaussians)}",
        *(f"property float {name}" for name in columns),
        "end_header\n",
    ]
    with atomic_path(path) as temporary:
        temporary.write_bytes("\n".join(header).encode("ascii") + table.astype(np.dtype("<f4")).tobytes())
