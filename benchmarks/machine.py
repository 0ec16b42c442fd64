"""What a measurement was made on, the matrix-product rate it is compared with, and what is refused before it."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenizer.atomic import temporary_beside
from tokenizer.cli.models import choose_device
from tokenizer.errors import InputError


def find_device(name: str) -> torch.device:
    """The CPU or GPU of that name.

    Raises:
        InputError: unknown, absent, or of another sort.
    """
    device = choose_device(name)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: only cpu and cuda can be measured")
    return device


def check_options(options: argparse.Namespace, *counts: str) -> None:
    """Refuse before minutes of measuring what makes no sense, or would only fail after them.

    Args:
        options: of a benchmark; where there is `out`, a file is written there.
        counts: names of options that are numbers from 1 up, lists of them, or None for a default.

    Raises:
        InputError: a number below 1, or a file that cannot be written.
    """
    for name in counts:
        given = getattr(options, name)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {number}")
    if getattr(options, "out", None) is not None:
        _check_out(options.out)


def _check_out(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"--out {path}: is a folder; name a file")
    probe = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written: {error.strerror}") from None


def describe(device: torch.device) -> dict[str, Any]:
    """Device, processor, threads and versions, for the head of a results file."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The fastest of `repeats` timed calls after one that is not timed; waits for the device."""
    return seconds_in_turns([call], device, repeats)[0]


def seconds_in_turns(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[float]:
    """`seconds` of several calls that take turns, so that what neighbours do to a shared machine falls on all alike.

    Only so are the quotients of their times worth comparing: measured one after the other, two calls that do the same
    work differed by a fifth.
    """
    for call in calls:
        call()
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for number, call in enumerate(calls):
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            best[number] = min(best[number], time.perf_counter() - start)
    return best


def matrix_products(device: torch.device, dtype: torch.dtype, work: float) -> tuple[Callable[[], object], float]:
    """Products of two square matrices, 2048 wide on a CPU and 8192 on a GPU: a call of about `work` FLOP, and its FLOP.

    Give it the work of the call it is compared with: on a shared machine a short product finds a quiet moment that no
    long computation finds.
    """
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    count = max(1, round(work / (2 * size**3)))

    def products() -> None:
        for _ in range(count):
            torch.mm(a, b)

    return products, 2.0 * size**3 * count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - not a file of ours
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
