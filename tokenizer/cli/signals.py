"""SIGTERM and SIGHUP end a command as errors do, so that half-written files go."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NUMBERS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

_TOGETHER = 2.0
"""Seconds in which signals count as one: supervisors send several, and the first one's cleaning up is not ended."""


class Ended(SystemExit):
    """A signal ended the command; the status is 128 + its number, as shells count it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Ended` in this process, where they would kill it at once.

    Handlers of others stay, and so does `nohup`. Children that are forked inside die of the signals as ever.
    """
    process, last = os.getpid(), -math.inf

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as signal handlers are called
        nonlocal last
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        before, last = last, time.monotonic()
        if last - before > _TOGETHER:
            raise Ended(number)

    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in _NUMBERS if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def signals_kill() -> Iterator[None]:
    """For a command that handles signals itself: inside, those that `signals_raise` took are as they were before."""
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    ours = [number for number, handler in before.items() if getattr(handler, "__module__", None) == __name__]
    for number in ours:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
