"""Which steps keep full precision in half-precision models (FORMAT 14)."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """float32 for half types; float32 and float64 stay what they are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or unchanged if it is float32 or float64 already."""
    return x.to(full_precision(x.dtype))
