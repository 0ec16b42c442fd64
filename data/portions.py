"""Portions: a fixed number of samples each step, in as few batches under the token budget as packing gives.

The batch size of a task is that of all processes of a run together (PAPER 4), so that it means the same on any number
of them: each takes its `share`. What one step takes is packed by itself, and nothing waits for the next one: a batch
starts with the oldest sample that is left and is filled as `data.packing` fills it. So a step that has come out leaves
no state but where the source stands, and a run may go on with other sizes and budgets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Generic

from data.packing import BATCHES_AHEAD, Measure, Oversized, Report, Sample, fullest
from tokenizer.errors import InputError

LOOK_AHEAD = 48
"""Samples that a batch is chosen from, at least. More give no fewer batches (measured with 8,192 sizes drawn like those
of pictures, clips and assets), and steps of large samples take longer to pack."""


def share(count: int, rank: int, world: int) -> int:
    """What process `rank` of `world` takes of `count` samples; the parts of all are `count`, none differs by over 1."""
    return (rank + 1) * count // world - rank * count // world


def pack(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `sizes`, each in exactly one batch of at most `budget` tokens; one over it is alone.

    A batch is chosen from the oldest `LOOK_AHEAD` that are left, or as many more as `BATCHES_AHEAD` batches hold: that
    fills batches as well as a choice from all of them does, in time that grows with the samples and not their square.
    """
    batches: list[list[int]] = []
    coming = iter(range(len(sizes)))
    window: list[int] = []
    tokens = 0
    while True:
        while len(window) < LOOK_AHEAD or tokens < BATCHES_AHEAD * budget:
            if (number := next(coming, None)) is None:
                break
            window.append(number)
            tokens += sizes[number]
        if not window:
            return batches
        chosen = set(fullest([sizes[number] for number in window], budget))
        batches.append([number for place, number in enumerate(window) if place in chosen])
        tokens -= sum(sizes[number] for number in batches[-1])
        window = [number for place, number in enumerate(window) if place not in chosen]


class Portions(Generic[Sample]):
    """Takes `count` samples of a stream a step and packs them.

    Args:
        count: samples of a step in this process, at least 1.
        budget, size, oversized, on_skip: as for `data.packing.Packer`. A sample that is skipped does not count: the
            next one of the stream comes in its place.

    Raises:
        InputError: a count or budget below 1.
    """

    def __init__(
        self,
        count: int,
        budget: int,
        size: Callable[[Sample], int],
        *,
        oversized: Oversized = "skip",
        on_skip: Callable[[Sample, str], None] | None = None,
    ) -> None:
        if count < 1:
            raise InputError(f"a step must have at least 1 sample, got {count}")
        self.count, self.budget = count, budget
        self.report = Report()
        self._measure = Measure(budget, size, oversized, on_skip)
        self._taken = 0

    def steps(self, source: Iterable[Sample]) -> Iterator[list[list[Sample]]]:
        """The batches of each step, in the order in which they are filled, their samples in the order of the source.

        The last step has fewer samples where the source ends in it.

        Raises:
            InputError: a sample without tokens, or one over the budget that is to be refused.
        """
        fitting = self._fitting(source)
        while portion := list(itertools.islice(fitting, self.count)):
            waste = self.report.running if len(portion) == self.count else self.report.draining
            batches = pack([tokens for _, tokens in portion], self.budget)
            for batch in batches:
                waste.add(sum(portion[number][1] for number in batch), self.budget)
            yield [[portion[number][0] for number in batch] for batch in batches]

    def _fitting(self, source: Iterable[Sample]) -> Iterator[tuple[Sample, int]]:
        """Samples that a batch can hold, and their tokens."""
        for sample in source:
            tokens = self._measure(sample, self._taken)
            self._taken += 1
            if tokens:
                yield sample, tokens
            else:
                self.report.skipped += 1

    def state_dict(self) -> dict[str, Any]:
        """What has been taken and how full batches were, ready for JSON; no sample waits between steps."""
        return {"settings": {"portions": True}, "taken": self._taken, "waiting": [], "report": asdict(self.report)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; count and budget may be others.

        Raises:
            InputError: the state of a packer in which samples wait, which would be lost.
        """
        if state["waiting"]:
            raise InputError(
                f"the saved packer has {len(state['waiting'])} samples that wait, and a batch size lets none wait: "
                "resume without `batches` for this task, or start the loader afresh"
            )
        self._taken = int(state["taken"])
        self.report = Report.from_dict(state["report"])
