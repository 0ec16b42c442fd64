"""Editing Gaussians: put assets together, move, turn and resize them, cut a box out. Gradients pass through.

A Gaussian stays one under every affine map, but only a similarity keeps the shape that scales and quaternions describe
apart (and the colours as they are), so only similarities are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.gaussians.attributes import CHANNELS, Gaussians

_SIMILARITY_TOLERANCE = 1e-4
"""Relative; matrices that went through float32 files and a few products stay far below."""


def merge(parts: Sequence[Gaussians]) -> Gaussians:
    """All Gaussians of all parts as one asset, in order.

    The way back is `dataclasses.replace(merged, lengths=...)`, which names the lengths of the assets again.

    Raises:
        InputError: no parts, or parts of different dtypes or on different devices.
    """
    if not parts:
        raise InputError("there are no Gaussians to merge")
    kinds = {(part.means.dtype, part.means.device) for part in parts}
    if len(kinds) > 1:
        named = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise InputError(f"Gaussians to merge must share dtype and device, got {named}; use .to()")
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in CHANNELS}
    return Gaussians(**joined, lengths=torch.tensor([len(joined["means"])], device="cpu"))


def transform(gaussians: Gaussians, matrix: Tensor | Sequence[Sequence[float]]) -> Gaussians:
    """Turn, resize and move Gaussians.

    Args:
        matrix: [4, 4] from old to new world coordinates, for columns (x, y, z, 1): a rotation times a positive factor,
            and a translation. `torch.as_tensor` must take it.

    Returns:
        The Gaussians in the dtype and on the device they had; each covariance becomes A covariance A^T, where A is
        the upper left part of the matrix.

    Raises:
        InputError: the matrix is not 4 x 4, not finite or not affine, mirrors, flattens, or stretches unevenly.
    """
    exact = torch.as_tensor(matrix, dtype=torch.float64, device="cpu")
    factor, rotation = _similarity(exact)
    turn = quaternion_of(rotation).to(gaussians.quaternions)
    linear, offset = exact[:3, :3].to(gaussians.means), exact[:3, 3].to(gaussians.means)
    return replace(
        gaussians,
        means=gaussians.means @ linear.T + offset,
        scales=gaussians.scales * factor,
        quaternions=_product(turn, gaussians.quaternions),
    )


def crop(gaussians: Gaussians, low: Sequence[float], high: Sequence[float]) -> Gaussians:
    """The Gaussians whose centres lie in the box from `low` to `high` (x, y, z; world units; faces included).

    The number of assets stays; some may become empty.

    Raises:
        InputError: a corner is not three numbers, or `low` exceeds `high`.
    """
    corners = (
        torch.tensor([tuple(low), tuple(high)], dtype=torch.float64, device="cpu")
        if len(low) == len(high) == 3
        else None
    )
    if corners is None or not bool((corners[0] <= corners[1]).all()):
        raise InputError(f"a box needs two corners x, y, z, the low one first; got {list(low)} and {list(high)}")
    lowest, highest = corners.to(gaussians.means.device)
    inside = ((gaussians.means >= lowest) & (gaussians.means <= highest)).all(dim=1)
    asset = torch.repeat_interleave(torch.arange(len(gaussians.lengths), device="cpu"), gaussians.lengths)
    lengths = torch.bincount(asset[inside.cpu()], minlength=len(gaussians.lengths))
    return gaussians.select(inside, lengths)


def quaternion_of(rotation: Tensor) -> Tensor:
    """The unit quaternion [4] (w, x, y, z), w >= 0, of a rotation matrix [3, 3].

    The trace of R^T R(q) is a quadratic form of q; its largest eigenvector is the quaternion of the nearest rotation
    (I. Bar-Itzhack, "New method for extracting the quaternion from a rotation matrix", 2000). There is no case to tell
    apart, as there is in formulas that divide by one component.
    """
    xx, xy, xz, yx, yy, yz, zx, zy, zz = rotation.flatten().unbind(0)
    form = torch.stack(
        [
            torch.stack([xx + yy + zz, zy - yz, xz - zx, yx - xy]),
            torch.stack([zy - yz, xx - yy - zz, xy + yx, xz + zx]),
            torch.stack([xz - zx, xy + yx, yy - xx - zz, yz + zy]),
            torch.stack([yx - xy, xz + zx, yz + zy, zz - xx - yy]),
        ]
    )
    quaternion: Tensor = torch.linalg.eigh(form).eigenvectors[:, -1]
    return -quaternion if quaternion[0] < 0 else quaternion


def _similarity(matrix: Tensor) -> tuple[float, Tensor]:
    """(factor, rotation [3, 3]) of a float64 matrix [4, 4], or `InputError`."""
    if matrix.shape != (4, 4) or not bool(matrix.isfinite().all()):
        raise InputError(f"a transform must be a finite matrix [4, 4], got {list(matrix.shape)}")
    if matrix[3].tolist() != [0.0, 0.0, 0.0, 1.0]:
        raise InputError(f"the last row of a transform must be 0, 0, 0, 1, got {matrix[3].tolist()}")
    linear = matrix[:3, :3]
    stretches = torch.linalg.svdvals(linear)
    if stretches[2] <= _SIMILARITY_TOLERANCE * stretches[0]:
        raise InputError("the transform flattens space (its determinant is zero); Gaussians need a volume")
    if torch.linalg.det(linear) < 0:
        raise InputError("the transform mirrors space; only rotation, one scale and translation can be applied")
    if stretches[0] - stretches[2] > _SIMILARITY_TOLERANCE * stretches[0]:
        raise InputError(
            "the transform shears or scales unevenly (by "
            f"{', '.join(f'{value:.4g}' for value in stretches.tolist())}); only rotation, one scale and translation "
            "can be applied"
        )
    factor = float(stretches.mean())
    return factor, linear / factor


def _product(turn: Tensor, quaternions: Tensor) -> Tensor:
    """Hamilton product of one quaternion [4] with each of [M, 4]: first the rotation of the latter, then `turn`."""
    w, x, y, z = turn.unbind(0)
    rows = [[w, -x, -y, -z], [x, w, -z, y], [y, z, w, -x], [z, -y, x, w]]
    left = torch.stack([torch.stack(row) for row in rows])
    return quaternions @ left.T
