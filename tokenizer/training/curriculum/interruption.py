"""SIGTERM (a cluster takes its machine back) and SIGINT (Ctrl-C): the step ends, a checkpoint is written, that is it.

The exit status is 128 + the signal's number, 143 or 130, as shells count it: the run has lost nothing, but is not done,
and a scheduler that starts unfinished jobs again sees that. Another signal of the same sort ends the process at once,
but for one that comes right behind the first: torchrun hands on to its processes a signal that Ctrl-C in a terminal, or
Slurm, has sent to them too.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

ECHO = 3.0
"""Seconds in which a signal of the same sort is the first one handed on."""


class Interruption:
    """Remembers the first signal that came while it was entered; only a process's main thread hears signals."""

    def __init__(self) -> None:
        self.signal = 0
        self._heard: dict[int, float] = {}
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        if time.monotonic() - self._heard.setdefault(number, time.monotonic()) > ECHO:
            signal.signal(number, self._before.get(number, signal.SIG_DFL))
            signal.raise_signal(number)


def exit_status(number: int) -> int:
    """The status of a run that signal `number` ended; 0 for none."""
    return 128 + number if number else 0
