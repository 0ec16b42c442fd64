"""What a run does about samples that cannot be used: count, name, go on, and stop when there are too many.

Every fault is counted under its cause. The quarantine file names each broken sample once, one JSON object a line, so
that a data set can be mended; it is appended to, also by later runs, which do not repeat what it holds, and by other
processes.

A sample that is larger than a batch may be is whole: it is counted too, but apart, and the first of a source are named.
Of a large source some are to be expected; a source of which hardly any sample fits has settings that do not fit it, and
stops the run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.samples import Fault
from data.shards.tar import DAMAGED, TRUNCATED
from data.urls import UNREACHABLE
from tokenizer.errors import InputError

ENOUGH_TO_JUDGE = 200
"""Samples before the share of faults, or of those too large, may stop a run."""

MOST_TOO_LARGE = 0.9
"""Share of a source's samples that may be too large for a batch. What is left of such a source is a choice of its
small samples, at a tenth of the speed; nobody wants that, but fewer may be meant."""

MOST_NAMED = 100
"""Samples of a source that a process names as too large. They show what is too large for which budget; all of them may
be millions, and nothing is to be mended in them."""

TOO_LARGE = "too large"
"""The cause under which such samples are named."""

OF_SHARDS = frozenset({TRUNCATED, DAMAGED, UNREACHABLE})
"""Causes for which all samples of a shard are lost from some place on. Others are of the sample alone."""


class Quarantine:
    """Counts samples and faults.

    Args:
        max_share: share of all samples that may be broken; more stop the run.
        file: where broken samples are named; nowhere by default.

    Attributes:
        good, causes: samples that could be read, and that were lost by cause.
        too_large: by source, how many that could be read, and how many of them no batch can hold.
        last: what the last fault was; empty without one.
    """

    def __init__(self, max_share: float = 0.05, file: str | os.PathLike[str] | None = None) -> None:
        if not 0 <= max_share <= 1:
            raise InputError(f"max_share of broken samples must lie in 0..1, got {max_share}")
        self.max_share = max_share
        self.file = None if file is None else Path(file)
        self.good = 0
        self.causes: Counter[str] = Counter()
        self.too_large: dict[str, tuple[int, int]] = {}
        self.last = ""
        # A broken shard is one line, not one for each of its samples.
        self._named = set() if self.file is None else _named_in(self.file)

    @property
    def bad(self) -> int:
        """Samples lost."""
        return self.causes.total()

    def count_good(self, source: str) -> None:
        """Count a sample that could be read."""
        self.good += 1
        read, left_out = self.too_large.get(source, (0, 0))
        self.too_large[source] = read + 1, left_out

    def leave_out(self, source: str, fault: Fault) -> None:
        """Count a sample, counted as good already, that no batch can hold, and name it if it is of the first.

        Raises:
            InputError: hardly any sample of the source is of use.
        """
        read, left_out = self.too_large.get(source, (0, 0))
        self.too_large[source] = read, left_out + 1
        if left_out < MOST_NAMED:  # which a run that goes on has not done anew, since its counts go on
            self._name(fault)
        if read >= ENOUGH_TO_JUDGE and left_out + 1 > MOST_TOO_LARGE * read:
            raise InputError(
                f"source {source}: {left_out + 1} of {read} samples are {TOO_LARGE}; raise the budget of its task or "
                f"lower its resolution; the last: {fault.detail}"
            )

    def add(self, fault: Fault) -> None:
        """Count and name a fault.

        Raises:
            InputError: more than the allowed share of samples is broken.
        """
        self.causes[fault.cause] += fault.samples
        self.last = fault.detail
        self._name(fault)
        seen = self.good + self.bad
        if seen >= ENOUGH_TO_JUDGE and self.bad > self.max_share * seen:
            where = f"; they are named in {self.file}" if self.file else ""
            raise InputError(
                f"{self.bad} of {seen} samples are broken ({self.summary()}), more than the allowed share of "
                f"{self.max_share:g}{where}; the last: {fault.detail}"
            )

    def summary(self) -> str:
        """Causes and counts in one phrase, the most frequent first; empty without faults."""
        return ", ".join(f"{cause}: {count}" for cause, count in self.causes.most_common())

    def state_dict(self) -> dict[str, Any]:
        """The counts, ready for JSON."""
        return {
            "good": self.good,
            "causes": dict(self.causes),
            "too large": {source: list(counts) for source, counts in self.too_large.items()},
        }

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Go on with counts of before, those of several processes added up."""
        self.good = sum(int(state["good"]) for state in states)
        self.causes, self.too_large = Counter(), {}
        for state in states:
            # Checkpoints of before counted what is too large among what is broken.
            self.causes.update({str(cause): int(n) for cause, n in state["causes"].items() if cause != TOO_LARGE})
            for source, (read, left_out) in state.get("too large", {}).items():
                before = self.too_large.get(source, (0, 0))
                self.too_large[source] = before[0] + int(read), before[1] + int(left_out)

    def _name(self, fault: Fault) -> None:
        what = _what(fault)
        if what in self._named:
            return
        self._named.add(what)
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(fault), ensure_ascii=False) + "\n"
        # One write to a file opened for appending: lines of several processes do not mix.
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode("utf-8", errors="backslashreplace"))
        finally:
            os.close(descriptor)


def _what(fault: Fault) -> tuple[str, str, str]:
    """What one line of the file is for."""
    # A key is known where a sample was read but not understood; what was not read has its place in the shard.
    place = "" if fault.cause in OF_SHARDS else fault.key or str(fault.index)
    return fault.cause, fault.shard, place


def _named_in(file: Path) -> set[tuple[str, str, str]]:
    """What a run that was killed, and goes on from before that, has named already."""
    named: set[tuple[str, str, str]] = set()
    with contextlib.suppress(FileNotFoundError):
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, TypeError):  # a line that is not of this file, or not whole
                named.add(_what(Fault(**json.loads(line))))
    return named
