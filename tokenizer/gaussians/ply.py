"""Gaussians as .ply files, in the columns that splat viewers and trainers read and write (FORMAT 11).

Positions are world coordinates, scales are natural logarithms, opacities logits, rotations quaternions (w, x, y, z) of
any length, colours coefficients of the constant spherical harmonic. No axis is turned, in either direction.
"""

from __future__ import annotations

import os
import re
import warnings
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError
from tokenizer.gaussians.attributes import CHANNELS, Gaussians
from tokenizer.gaussians.plytable import PlyTable

MAX_GAUSSIANS: Final = 50_000_000
"""Files of more are refused; as `Gaussians` these take 2.8 GB."""

_COLUMNS: Final = {
    "means": ("x", "y", "z"),
    "scales": ("scale_0", "scale_1", "scale_2"),
    "quaternions": ("rot_0", "rot_1", "rot_2", "rot_3"),
    "dc": ("f_dc_0", "f_dc_1", "f_dc_2"),
    "opacity_logits": ("opacity",),
}
"""Field of `Gaussians` -> the columns that hold it."""


class PlyWarning(UserWarning):
    """Something of a .ply file that `Gaussians` cannot hold was left out."""


def ply_columns(gaussians: Gaussians) -> dict[str, Tensor]:
    """Column name -> [M] values, in file order and in the dtype of the Gaussians; the normals are zeros."""
    # In float64, so that a file that was read is written again as it was.
    logarithms = gaussians.scales.double().log().to(gaussians.scales.dtype)
    groups: list[tuple[str, Tensor]] = [
        *zip("xyz", gaussians.means.unbind(1), strict=True),
        *((f"n{axis}", torch.zeros_like(gaussians.means[:, 0])) for axis in "xyz"),
        *zip(_COLUMNS["dc"], gaussians.dc.unbind(1), strict=True),
        ("opacity", gaussians.opacity_logits[:, 0]),
        *zip(_COLUMNS["scales"], logarithms.unbind(1), strict=True),
        *zip(_COLUMNS["quaternions"], gaussians.quaternions.unbind(1), strict=True),
    ]
    return dict(groups)


def write_ply(gaussians: Gaussians, path: str | os.PathLike[str]) -> None:
    """Write one asset as binary little-endian .ply, float32 columns; the file appears whole or not at all.

    Raises:
        InputError: the Gaussians are of several assets, there are none, or a value is not finite: the file would be
            one that `read_ply` refuses.
    """
    if len(gaussians.lengths) != 1:
        raise InputError(f"a .ply file holds one asset, got a batch of {len(gaussians.lengths)}; write gaussians[i]")
    if not len(gaussians):
        raise InputError(f"{os.fspath(path)}: there are no Gaussians to write")
    columns = ply_columns(gaussians)
    table = torch.stack([column.detach().float().cpu() for column in columns.values()], dim=1).numpy()
    _check_finite(table, list(columns), 0, os.fspath(path))
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(gaussians)}",
        *(f"property float {name}" for name in columns),
        "end_header\n",
    ]
    with atomic_path(path) as temporary:
        temporary.write_bytes("\n".join(header).encode("ascii") + table.astype(np.dtype("<f4")).tobytes())


def read_ply(path: str | os.PathLike[str]) -> Gaussians:
    """Read one asset from a .ply file of Gaussians, as `write_ply`, trainers and splat editors write it.

    Args:
        path: binary of either byte order or ASCII; columns of any numeric type in any order. Normals and other columns
            are passed over. Colours that depend on the direction of view (f_rest_*) are dropped, with a `PlyWarning`.

    Returns:
        float32 on the CPU, one asset. A file of float32 columns is kept bit for bit, but for the scales, which are
        logarithms in the file: written again they are the same bits for scales below 1/e. Standard deviations below
        the smallest normal float32 become that.

    Raises:
        InputError: the file is not a .ply, is damaged, or holds no Gaussians (a mesh, a point cloud, a packed format);
            a value is not finite, a scale overflows, a rotation is zero; or there are more than `MAX_GAUSSIANS`.
    """
    table = PlyTable(path)
    names = [column for columns in _COLUMNS.values() for column in columns]
    _check_columns(table, names)
    _warn_of_view_dependence(table)
    values = np.empty((table.count, len(names)), dtype=np.float32)
    first = 0
    for piece in table.rows(names):
        values[first : first + len(piece)] = _checked(piece, names, first, table.name)
        first += len(piece)
    groups = torch.from_numpy(values).split([CHANNELS[field] for field in _COLUMNS], dim=1)
    fields = {field: group.contiguous() for field, group in zip(_COLUMNS, groups, strict=True)}
    return Gaussians(**fields, lengths=torch.tensor([table.count], device="cpu"))


def _check_columns(table: PlyTable, names: list[str]) -> None:
    missing = [name for name in names if name not in table.columns]
    if "packed_position" in table.columns:
        raise InputError(f"{table.name}: is a packed splat file; save it as an ordinary (uncompressed) .ply")
    if len(missing) == 1:
        raise InputError(f"{table.name}: the column {missing[0]} is missing")
    if missing:
        raise InputError(
            f"{table.name}: holds a mesh or points, no Gaussians: {missing[0]} and {len(missing) - 1} other columns "
            f"are missing; its vertices have {', '.join(table.columns[:12]) or 'none'}"
        )
    if table.count == 0:
        raise InputError(f"{table.name}: holds no Gaussians (its header announces 0)")
    if table.count > MAX_GAUSSIANS:
        raise InputError(f"{table.name}: holds {table.count} Gaussians; at most {MAX_GAUSSIANS} are read")


def _warn_of_view_dependence(table: PlyTable) -> None:
    rest = sum(re.fullmatch(r"f_rest_\d+", name) is not None for name in table.columns)
    if rest:
        degree = round((rest / 3 + 1) ** 0.5) - 1
        warnings.warn(
            f"{table.name}: colours that change with the direction of view ({rest} columns, spherical harmonics up to "
            f"degree {degree}) are dropped; each Gaussian keeps its mean colour",
            PlyWarning,
            stacklevel=3,
        )


def _checked(piece: NDArray[np.float64], names: list[str], first: int, name: str) -> NDArray[np.float32]:
    """A piece of the file as float32 values of `Gaussians`."""
    _check_finite(piece, names, first, name)
    scales = [names.index(column) for column in _COLUMNS["scales"]]
    with np.errstate(over="ignore", under="ignore"):
        piece[:, scales] = np.maximum(np.exp(piece[:, scales]), np.finfo(np.float32).tiny)
        values = piece.astype(np.float32)
        lengths = np.square(values[:, [names.index(column) for column in _COLUMNS["quaternions"]]]).sum(axis=1)
    _check_finite(values, names, first, name, "is too large for float32")
    odd = np.flatnonzero((lengths == 0) | ~np.isfinite(lengths))
    if len(odd):
        raise InputError(
            f"{name}: the rotation (rot_0..3) of Gaussian {first + odd[0]} has no direction: its length is "
            f"{'zero' if lengths[odd[0]] == 0 else 'too large'}"
        )
    return values


def _check_finite(
    table: NDArray[np.floating[Any]],
    names: list[str],
    first: int,
    name: str,
    problem: str = "is not a finite number",
) -> None:
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise InputError(f"{name}: {names[column]} of Gaussian {first + row} {problem}")
