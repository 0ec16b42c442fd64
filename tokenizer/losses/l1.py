"""L1: the mean absolute difference of patches, at native resolution (PAPER 2).

    L1_i = mean over the values of patch i that exist of |x - x_hat|,  0 or more; at most 2 for pixels in [-1, 1]

It serves images, videos and voxels alike. The paper averages over patches: a large picture counts for more than a small
one, by as much as it has more patches. The three zero frames behind a still do not exist: they are thrown away after
decoding, so nothing is learned from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.errors import InputError


def l1(decoded: Tensor, target: Tensor, existing: Tensor | int | None = None) -> Tensor:
    """L1 of every patch.

    Args:
        decoded: [N, P] floating; rows of `SparseTokens.features`.
        target: [N, P], what it should be.
        existing: how many of the P values exist, for all patches or for each [N] (integer, 1 to P); they come first. A
            still of patches of Pt frames has P / Pt. None: all.

    Returns:
        [N] float32 (float64 for float64); the loss is its mean.

    Raises:
        InputError: shapes that differ.
    """
    if decoded.shape != target.shape or decoded.ndim != 2:
        raise InputError(f"L1 compares patches [N, P], got {list(decoded.shape)} and {list(target.shape)}")
    if isinstance(existing, int):
        decoded, target, existing = decoded[:, :existing], target[:, :existing], None
    # bf16 keeps too few digits for a mean over 3072 values.
    kind = torch.float64 if decoded.dtype == torch.float64 else torch.float32
    difference = (decoded.to(kind) - target.to(kind)).abs()
    if existing is None:
        return difference.mean(dim=1)
    count = existing.to(difference.device)[:, None]
    column = torch.arange(difference.shape[1], device=difference.device)
    # `where`, not a product: a value that does not exist may be anything, NaN too.
    return torch.where(column < count, difference, 0.0).sum(dim=1) / count[:, 0]
