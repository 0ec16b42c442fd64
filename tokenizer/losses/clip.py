"""CLIP perceptual: the distance of what an image network understands (PAPER 2).

    CLIP = 1 - cos(p, p_hat),  in [0, 2],  p: the pooled features of an `ImageNetwork`

The paper names neither network nor distance; `tokenizer.losses.weights` says why these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.errors import InputError


def clip(first: Tensor, second: Tensor) -> Tensor:
    """Distance of two batches of images in the features of one network.

    Args:
        first: [n, D] floating, pooled features; compute a target's once, without gradient.
        second: [n, D].

    Returns:
        [n] float32 (float64 for float64), zero for equal features.

    Raises:
        InputError: shapes that differ.
    """
    if first.shape != second.shape or first.ndim != 2:
        raise InputError(f"CLIP compares features [n, D] of one network, got {list(first.shape)}, {list(second.shape)}")
    with torch.autocast(first.device.type, enabled=False):
        a, b = (F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1) for x in (first, second))
        # Half the squared distance of unit vectors is the same number, and exact where they are nearly equal.
        return 0.5 * (a - b).square().sum(dim=1)
