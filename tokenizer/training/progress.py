"""Where a run stands, and its steps whose loss or gradient was not finite: each is skipped, counted and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizer.errors import InputError

BAD_STEPS = "bad-steps"
"""Folder in that of a run with what such steps were made on."""


@dataclass(slots=True)
class Progress:
    """step: steps done. bad_row, bad: of them not finite, in a row up to now and in all."""

    step: int = 0
    bad_row: int = 0
    bad: int = 0

    def count(self, done: bool) -> None:
        """Count a step that was done, or else skipped."""
        self.step += 1
        self.bad_row = 0 if done else self.bad_row + 1
        self.bad += not done

    def judge(self, folder: Path, say: Callable[[str], None]) -> None:
        """At the end of the run in `folder`: of steps that were mostly skipped nothing has been learned.

        Raises:
            InputError: more than half of them were.
        """
        if 2 * self.bad > self.step:
            raise InputError(
                f"{self.bad} of {self.step} steps had a loss or gradient that is not finite; what they were made on is "
                f"in {folder / BAD_STEPS}, and no weights are written"
            )
        if self.bad:
            say(f"{self.bad} of {self.step} steps were not finite and were skipped")
