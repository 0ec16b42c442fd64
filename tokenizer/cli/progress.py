"""Progress bars on stderr, shown on a terminal only."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class ProgressBars:
    """One bar for the files, where there are several, and one for the frames of the current video.

    Args:
        files: how many files the command works on.
    """

    def __init__(self, files: int) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._files = self._progress.add_task("files", total=files) if files > 1 else None
        self._frames: TaskID | None = None

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start_frames(self, description: str, frames: int) -> None:
        """Show a bar for the frames of one video; it replaces an earlier one."""
        self._end_frames()
        self._frames = self._progress.add_task(description, total=frames)

    def advance_frames(self, frames: int) -> None:
        if self._frames is not None:
            self._progress.advance(self._frames, frames)

    def file_done(self) -> None:
        self._end_frames()
        if self._files is not None:
            self._progress.advance(self._files)

    def print(self, line: str) -> None:
        """Print a line of results to stdout, with the bars out of the way."""
        self._progress.stop()
        print(line, flush=True)
        self._progress.start()

    def _end_frames(self) -> None:
        if self._frames is not None:
            self._progress.remove_task(self._frames)
            self._frames = None
