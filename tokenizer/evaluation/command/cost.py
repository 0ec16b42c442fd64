"""What a call costs: seconds, and the most memory in use while it ran."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import psutil
import torch

T = TypeVar("T")

_INTERVAL: Final = 0.01
"""Seconds between looks at the memory of the process."""


@dataclass(frozen=True, slots=True)
class Cost:
    """seconds: by the clock, with all work of the device. memory: bytes; on CUDA what torch had allocated on the
    device, else what the whole process held, everything that was loaded before included."""

    seconds: float
    memory: int


def measured(call: Callable[[], T], device: torch.device) -> tuple[T, Cost]:
    """The result of a call, and its cost."""
    if device.type != "cuda":
        with _Watcher() as watcher:
            start = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - start
        return result, Cost(seconds, watcher.peak)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    result = call()
    torch.cuda.synchronize(device)
    return result, Cost(time.perf_counter() - start, torch.cuda.max_memory_allocated(device))


class _Watcher:
    """Looks at the memory of this process again and again: the system keeps no peak that could be reset."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak = 0

    def __enter__(self) -> _Watcher:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._end.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, int(self._process.memory_info().rss))
