"""Which steps keep full precision in half-precision models (FORMAT 14)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """float32 for half types; float32 and float64 stay what they are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or unchanged if it is float32 or float64 already."""
    return x.to(full_precision(x.dtype))


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within it, matrix products are computed in the dtype of what they multiply.

    Devices that know no autocast ("meta") are let through: torch refuses to turn off there what cannot be on.
    """
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
