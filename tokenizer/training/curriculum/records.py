"""What a run writes down: two JSONL files, TensorBoard where it is installed, and a progress bar, or lines.

    out/metrics.jsonl    what a step did: losses, norms, rates, tokens, packing, validation. A run that was killed and
                         goes on writes the same lines as one that was not.
    out/speed.jsonl      how long it took: seconds, tokens a second, utilisation, share of time spent waiting for data
    out/tensorboard/     both

Lines that a stopped run wrote after its last checkpoint are dropped; those steps come again.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError

PATIENCE = 30.0
"""Seconds between two lines where there is no bar."""

METRICS, SPEED, TENSORBOARD = "metrics.jsonl", "speed.jsonl", "tensorboard"


def lines_of(path: Path) -> list[dict[str, Any]]:
    """One of these files, line by line.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is not the log of a run ({error}); remove the run and train it again") from None


class Records:
    """Logs and bar of one process; those of all but the first do nothing.

    Args:
        folder: of the run.
        name: of the run, beside the bar.
        steps: of the run.
        active: whether this is the first process.
    """

    def __init__(self, folder: Path, name: str, steps: int, *, active: bool) -> None:
        self.folder, self.name, self.steps, self.active = folder, name, steps, active
        self.console = Console(stderr=True)
        self._bar = _progress(self.console)
        self._bar.disable = not active or not self.console.is_terminal
        self._task = self._bar.add_task(name, total=steps, note="")
        self._board: Any = None
        self._first, self._began, self._next_line = 0, time.monotonic(), 0.0

    def start(self, step: int) -> None:
        """Begin after `step` steps."""
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, SPEED):
            forget_log_after(self.folder / name, step)
        if not has_tensorboard():
            self.say("tensorboard is not installed (pip install -e '.[train]'): curves go to the JSONL files alone")
        else:
            from torch.utils.tensorboard import SummaryWriter

            writer: Any = SummaryWriter
            self._board = writer(str(self.folder / TENSORBOARD), purge_step=step + 1)
        self._bar.update(self._task, completed=step)
        self._first, self._began = step, time.monotonic()

    def __enter__(self) -> Records:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._board is not None:
            self._board.close()

    def flush(self) -> None:
        """Have on disk what was written, before a checkpoint says that these steps will not come again."""
        if self._board is not None:
            self._board.flush()

    def say(self, line: str) -> None:
        """Show a line above the bar."""
        if self.active:
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def advance(self, step: int, note: str) -> None:
        """Move the bar to `step` steps."""
        self._bar.update(self._task, completed=step, note=note)

    def report(self, step: int, note: str) -> None:
        """Where there is no terminal for a bar: a line every `PATIENCE` seconds, for the log of a cluster's job."""
        now = time.monotonic()
        if self.console.is_terminal or (now < self._next_line and step != self.steps):
            return
        self._next_line = now + PATIENCE
        left = (now - self._began) / max(1, step - self._first) * (self.steps - step)
        self.say(f"step {step} of {self.steps}: {note}, {timedelta(seconds=round(left))} left")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line of what is the same in every run of these settings."""
        self._write(METRICS, step, values)

    def speed(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line of what depends on the machine and the hour."""
        self._write(SPEED, step, values)

    def _write(self, file: str, step: int, values: Mapping[str, float]) -> None:
        if not self.active:
            return
        # JSON knows no NaN.
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": step, **plain}, allow_nan=False) + "\n"
        with (self.folder / file).open("a", encoding="utf-8") as out:
            out.write(line)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def _progress(console: Console) -> Progress:
    """Steps done, time gone and time left, and the field "note" beside them."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def forget_log_after(path: Path, step: int) -> None:
    """Drop from a JSONL log what a stopped run wrote after its last state, of `step` steps; those steps come again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    with atomic_path(path) as temporary:
        temporary.write_text("".join(line for line in lines if _precedes(line, step)), encoding="utf-8")


def _precedes(line: str, step: int) -> bool:
    """Whether a line of the log is whole and belongs to what a state of `step` steps holds."""
    try:
        return step > 0 and int(json.loads(line)["step"]) <= step
    except (ValueError, TypeError, KeyError):  # half a line, or something else
        return False


def has_tensorboard() -> bool:
    """Whether curves can be written for it too."""
    return importlib.util.find_spec("tensorboard") is not None
