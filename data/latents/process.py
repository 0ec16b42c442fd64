"""A process among several that share a job: its place, its device, its progress, and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tokenizer.errors import InputError


def place() -> tuple[int, int]:
    """Rank and number of processes, as torchrun tells them.

    Raises:
        InputError: they make no sense.
    """
    try:
        rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    except ValueError:
        rank, world = -1, 0
    if not 0 <= rank < world:
        told = ", ".join(f"{name}={os.environ.get(name, '')}" for name in ("RANK", "WORLD_SIZE"))
        raise InputError(f"{told}: must be whole numbers, RANK below WORLD_SIZE; start with torchrun or unset them")
    return rank, world


def device_of_process(name: str) -> str:
    """Under torchrun the processes of a machine take its CUDA devices in turn."""
    local = os.environ.get("LOCAL_RANK", "")
    if name in ("auto", "cuda") and local.isdigit() and torch.cuda.is_available():
        return f"cuda:{int(local) % torch.cuda.device_count()}"
    return name


@contextlib.contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the run like an error does: half-written files go, and the workers with it."""

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as signal handlers are called
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Bar:
    """Progress of one process on a terminal: samples, and tokens per second."""

    def __init__(self, console: Console, samples: int, *, shown: bool) -> None:
        columns = (
            TextColumn("latents"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        hidden = not (shown and console.is_terminal)
        self._progress = Progress(*columns, console=console, transient=True, disable=hidden)
        self._task: TaskID = self._progress.add_task("latents", total=samples, speed="")
        self._tokens, self._started = 0, time.monotonic()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, samples: int, tokens: int) -> None:
        """Count what was encoded or left out."""
        self._tokens += tokens
        speed = self._tokens / max(1e-9, time.monotonic() - self._started)
        self._progress.update(self._task, advance=samples, speed=f"{speed:.0f} tokens/s")
