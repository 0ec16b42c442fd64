"""PSNR as a loss: every item counts by its relative error.

    PSNR_b = 10 log10(4 / (MSE_b + 4e-6)) dB,  MSE_b over the values of item b that exist, in [-1, 1]

It is what reconstruction is measured by, so that smooth pictures are not drowned by rough ones. It nears 60 dB as the
error vanishes, so that its gradient stays finite: 40 dB count as 39.96, 60 dB as 57. The paper's objective has no such
term (`tokenizer.losses.weights`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.errors import InputError

_FLOOR = 4e-6
"""Squared error of 60 dB for values in [-1, 1]."""


def psnr(decoded: Tensor, target: Tensor, lengths: Tensor, existing: int | None = None) -> Tensor:
    """PSNR in dB of every item.

    Args:
        decoded: [N, P] floating; rows of `SparseTokens.features`.
        target: [N, P], what it should be.
        lengths: [B] integer on the CPU, patches of each item; they add up to N.
        existing: how many of the P values exist, the first ones. None: all.

    Returns:
        [B] float32 (float64 for float64), to be made large: the loss is minus its mean.

    Raises:
        InputError: shapes that differ.
    """
    if decoded.shape != target.shape or decoded.ndim != 2:
        raise InputError(f"PSNR compares patches [N, P], got {list(decoded.shape)} and {list(target.shape)}")
    kind = torch.float64 if decoded.dtype == torch.float64 else torch.float32
    squared = (decoded[:, :existing].to(kind) - target[:, :existing].to(kind)).square().mean(dim=1)
    error = torch.segment_reduce(squared, "mean", lengths=lengths.to(squared.device, non_blocking=True), unsafe=True)
    return 10 * torch.log10(4 / (error + _FLOOR))
