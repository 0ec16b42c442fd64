"""Figures must not depend on the device: float32 that is float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within it, convolutions and matrix products of float32 do not round their inputs to TF32 on CUDA."""
    switches = _switches()
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def _switches() -> tuple[Any, ...]:
    # Untyped in torch.
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv, torch.backends.cuda.matmul
