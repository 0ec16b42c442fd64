"""What a run does about samples that cannot be used: count, name, go on, and stop when there are too many.

Every fault is counted under its cause. The quarantine file names each broken sample once, one JSON object a line, so
that a data set can be mended; it is appended to, also by later runs and by other processes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.samples import Fault
from tokenizer.errors import InputError

ENOUGH_TO_JUDGE = 200
"""Samples before the share of faults may stop a run."""


class Quarantine:
    """Counts samples and faults.

    Args:
        max_share: share of all samples that may be broken; more stop the run.
        file: where broken samples are named; nowhere by default.

    Attributes:
        good, causes: samples that were used, and that were lost by cause.
        last: what the last fault was; empty without one.
    """

    def __init__(self, max_share: float = 0.05, file: str | os.PathLike[str] | None = None) -> None:
        if not 0 <= max_share <= 1:
            raise InputError(f"max_share of broken samples must lie in 0..1, got {max_share}")
        self.max_share = max_share
        self.file = None if file is None else Path(file)
        self.good = 0
        self.causes: Counter[str] = Counter()
        self.last = ""
        # A broken shard is one line, not one for each of its samples.
        self._named: set[tuple[str, str, str]] = set()

    @property
    def bad(self) -> int:
        """Samples lost."""
        return self.causes.total()

    def count_good(self) -> None:
        """Count a sample that was used."""
        self.good += 1

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
        return {"good": self.good, "causes": dict(self.causes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with counts of before."""
        self.good = int(state["good"])
        self.causes = Counter({str(cause): int(count) for cause, count in state["causes"].items()})

    def _name(self, fault: Fault) -> None:
        # A key is known where a sample was read but not understood; else what is broken is its shard.
        what = (fault.cause, fault.shard, fault.key)
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
