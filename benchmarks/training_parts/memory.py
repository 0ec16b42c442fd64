"""How much memory a step takes, in bytes: of CUDA's allocator on a GPU, of the whole process on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def held(device: torch.device) -> int | None:
    """What is allocated, or resident, now; None on a CPU whose system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _of_process("VmRSS:")


def forget_peak(device: torch.device) -> None:
    """Begin to watch for a new `peak`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _RESET.write_text("5", encoding="ascii")  # Linux: sets the highest resident size to the present one
    except OSError:
        return


def peak(device: torch.device) -> int | None:
    """The most that was held since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _of_process("VmHWM:")


def _of_process(key: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(key)]
    return int(found[0]) * 1024 if found else None
