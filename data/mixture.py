"""Mixtures: named sources grouped into the paper's tasks, drawn in exact ratio without chance (PAPER 3 and 4).

Every step trains image understanding and one more task, taken in turn in the ratio of the stage; inside a task, sources
take turns in proportion to their size. Both levels are the same schedule, `RoundRobin`. Ratios are whole numbers or
fractions and the arithmetic is exact, so a schedule never drifts, however long it runs.

Why not simply the source that is furthest behind its share? With nine or more sources that rule is off by more than
one draw (weights 40, 20, 5, 2, 40, 1, 20, 20, 1: by 1.07). Here the j-th draw of a source of share p has a window: it
may not come before draw j / p and must come before draw (j + 1) / p, and of all open windows the one that closes first
is served. Windows of this kind always fit (Baruah et al., "Proportionate progress", Algorithmica 1996).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Any

from tokenizer.errors import InputError


class Task(StrEnum):
    """What a sample is used for; an asset is what the paper calls 3D."""

    IMAGE_UNDERSTANDING = "image_understanding"
    IMAGE_RECONSTRUCTION = "image_reconstruction"
    VIDEO_UNDERSTANDING = "video_understanding"
    VIDEO_RECONSTRUCTION = "video_reconstruction"
    ASSET_UNDERSTANDING = "asset_understanding"
    ASSET_RECONSTRUCTION = "asset_reconstruction"


EVERY_STEP = (Task.IMAGE_UNDERSTANDING,)
"""Trained in every step beside the task whose turn it is, and no part of the ratios (PAPER 3)."""

IMAGE_STAGE: Mapping[Task, int] = {Task.IMAGE_RECONSTRUCTION: 1}
"""Stage 1, image foundation (PAPER 3, Table 2)."""

VIDEO_STAGE: Mapping[Task, int] = {
    Task.IMAGE_RECONSTRUCTION: 2,
    Task.VIDEO_UNDERSTANDING: 1,
    Task.VIDEO_RECONSTRUCTION: 6,
}
"""Stage 2, video dynamics: 22.2, 11.1 and 66.6 % are 2 : 1 : 6 ninths (PAPER 3, Table 2)."""

ASSET_STAGE: Mapping[Task, int] = {
    Task.IMAGE_RECONSTRUCTION: 2,
    Task.VIDEO_UNDERSTANDING: 1,
    Task.VIDEO_RECONSTRUCTION: 4,
    Task.ASSET_UNDERSTANDING: 1,
    Task.ASSET_RECONSTRUCTION: 1,
}
"""Stages 3 and 4, 3D geometry and discrete: 2 : 1 : 4 : 1 : 1 ninths (PAPER 3, Table 2)."""


class RoundRobin:
    """Names in exact ratio: after any number of draws each count is its share, rounded up or down.

    Args:
        weights: a positive whole number or fraction for each name. The order of the names breaks ties.

    Raises:
        InputError: no name, or a weight that is not positive or not exact (a float).
    """

    def __init__(self, weights: Mapping[str, int | Fraction]) -> None:
        self.weights = _whole_numbers(weights)
        self.counts = dict.fromkeys(self.weights, 0)
        self._total = sum(self.weights.values())

    def draw(self) -> str:
        """The next name; takes time proportional to the number of names."""
        draws = sum(self.counts.values())
        # In whole numbers: window j of a weight w opens before draw n + 1 if j / w < (n + 1) / total.
        waiting = [name for name, w in self.weights.items() if self.counts[name] * self._total < (draws + 1) * w]
        name = min(waiting, key=self._deadline)
        self.counts[name] += 1
        return name

    def _deadline(self, name: str) -> int:
        """The number of draws by which the next draw of `name` must have come: (j + 1) / share, rounded up."""
        return -(-(self.counts[name] + 1) * self._total // self.weights[name])

    def state_dict(self) -> dict[str, Any]:
        """Weights and counts, ready for JSON."""
        return {"weights": dict(self.weights), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            InputError: the state is of other names or weights; a schedule cannot go on exactly with those.
        """
        if state["weights"] != self.weights:
            raise InputError(
                f"the saved mixture has weights {state['weights']}, this one {self.weights}: "
                "resume with the same sources and sizes, or start the mixture afresh"
            )
        self.counts = {name: int(state["counts"][name]) for name in self.weights}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A set of samples for one task.

    name: unique in the mixture.
    task: what its samples are used for.
    samples: its size; inside a task, sources are drawn in proportion to it (PAPER 4).
    weight: multiplies the size, to see a source more or less often than its size says; exact, not a float.
    """

    name: str
    task: Task
    samples: int
    weight: int | Fraction = 1


class Mixture:
    """Which tasks make up each training step, and which source gives each sample of a task.

    Each task's count is within one of its share of the steps, and each source's within one of its share of its task.

    Args:
        sources: at least one for each task that is drawn. Their order breaks ties.
        ratios: the tasks that take turns, with whole numbers or fractions (`VIDEO_STAGE`).
        every_step: the tasks that are part of every step.

    Raises:
        InputError: two sources of one name, a task without a source, a source whose task is never drawn, a task both
            in turn and in every step, or a size or weight that is not positive and exact.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        ratios: Mapping[Task, int | Fraction],
        every_step: Sequence[Task] = EVERY_STEP,
    ) -> None:
        _check(sources, ratios, every_step)
        self.sources = {source.name: source for source in sources}
        self._every_step = tuple(every_step)
        self._tasks = RoundRobin({str(task): ratio for task, ratio in ratios.items()})
        self._within = {
            task: RoundRobin({s.name: _exact(s.samples, s.name) * s.weight for s in sources if s.task == task})
            for task in dict.fromkeys((*every_step, *ratios))
        }

    def step(self) -> tuple[Task, ...]:
        """The tasks of the next step: those of every step, then the one whose turn it is."""
        return (*self._every_step, Task(self._tasks.draw()))

    def draw(self, task: Task) -> Source:
        """The source of the next sample for a task."""
        return self.sources[self._within[task].draw()]

    def state_dict(self) -> dict[str, Any]:
        """The counters, ready for JSON."""
        within = {str(task): robin.state_dict() for task, robin in self._within.items()}
        return {"tasks": self._tasks.state_dict(), "within": within}

    def load_state_dict(self, state: Mapping[str, Any], *, steps_only: bool = False) -> None:
        """Go on exactly where `state` was taken.

        Args:
            steps_only: take over whose turn it is, and draw sources anew.

        Raises:
            InputError: the state is of a mixture with other tasks, sources, sizes or weights.
        """
        if set(state["within"]) != {str(task) for task in self._within}:
            raise InputError(
                f"the saved mixture has the tasks {sorted(state['within'])}, this one {sorted(self._within)}"
            )
        self._tasks.load_state_dict(state["tasks"])
        for task, robin in self._within.items() if not steps_only else ():
            robin.load_state_dict(state["within"][str(task)])


def _check(sources: Sequence[Source], ratios: Mapping[Task, int | Fraction], every_step: Sequence[Task]) -> None:
    names = [source.name for source in sources]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"source names must differ; given twice: {', '.join(repeated)}")
    if both := sorted(set(ratios) & set(every_step)):
        raise InputError(f"in every step and in the ratios: {', '.join(both)}; a task is one or the other")
    drawn, fed = {*ratios, *every_step}, {source.task for source in sources}
    if hungry := sorted(drawn - fed):
        raise InputError(f"no source for {', '.join(hungry)}; add one or leave the task out of the mixture")
    if idle := [source.name for source in sources if source.task not in drawn]:
        raise InputError(f"never drawn: {', '.join(idle)}; give their tasks a ratio or leave the sources out")


def _whole_numbers(weights: Mapping[str, int | Fraction]) -> dict[str, int]:
    """The same ratio in the smallest whole numbers."""
    if not weights:
        raise InputError("a mixture needs at least one name with a weight")
    fractions = {name: _exact(weight, name) for name, weight in weights.items()}
    scale = math.lcm(*(weight.denominator for weight in fractions.values()))
    whole = {name: int(weight * scale) for name, weight in fractions.items()}
    common = math.gcd(*whole.values())
    return {name: weight // common for name, weight in whole.items()}


def _exact(weight: int | Fraction, name: str) -> Fraction:
    if not isinstance(weight, int | Fraction) or weight <= 0:
        raise InputError(f"{name}: sizes and weights must be positive whole numbers or fractions, got {weight!r}")
    return Fraction(weight)
