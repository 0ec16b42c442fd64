"""Which backend computes: Transformer Engine, torchao, our own kernels in Triton, or the emulation.

Nothing is imported to find out; `tokenizer.fp8.backends` imports what was chosen.
"""

from __future__ import annotations

import importlib.util

import torch

from tokenizer.errors import InputError
from tokenizer.fp8.config import Backend, FP8Config

FIRST_CAPABILITY = (8, 9)
"""Compute capability of the first cards with FP8 (Ada; Hopper is 9.0)."""

_PACKAGES: dict[Backend, str] = {
    "transformer_engine": "transformer_engine",
    "torchao": "torchao",
    "triton": "triton",
}
_INSTALL = {
    "transformer_engine": "pip install 'transformer-engine[pytorch]'",
    "torchao": "pip install torchao",
    "triton": "pip install triton",
}


def choose_backend(config: FP8Config, device: torch.device) -> Backend:
    """The backend that `config.backend` means on `device`.

    Raises:
        InputError: a backend that needs CUDA on another device, a card without FP8, or no package for CUDA.
    """
    if config.backend == "emulated" or (config.backend == "auto" and device.type == "cpu"):
        return "emulated"
    if device.type != "cuda":
        raise InputError(f"fp8.backend {config.backend} needs CUDA, and the model is on {device.type}; use 'emulated'")
    _check_card(device)
    if config.backend != "auto":
        if not _installed(config.backend):
            raise InputError(f"fp8.backend {config.backend} is not installed: {_INSTALL[config.backend]}")
        return config.backend
    if _installed("transformer_engine") and config.fast_accumulation == "forward":
        return "transformer_engine"
    if config.fp8_recipe == "tensorwise" and _installed("torchao"):
        return "torchao"
    if not _installed("triton"):
        raise InputError(
            f"FP8 on CUDA needs Transformer Engine, torchao or Triton: {_INSTALL['triton']}; or fp8.backend=emulated "
            "(slow)"
        )
    return "triton"


def _installed(backend: Backend) -> bool:
    return importlib.util.find_spec(_PACKAGES[backend]) is not None


def _check_card(device: torch.device) -> None:
    found = torch.cuda.get_device_capability(device)
    if found < FIRST_CAPABILITY:
        raise InputError(
            f"{torch.cuda.get_device_name(device)} has no FP8: its compute capability is {found[0]}.{found[1]}, and "
            f"{FIRST_CAPABILITY[0]}.{FIRST_CAPABILITY[1]} is the first with it; use bf16"
        )
