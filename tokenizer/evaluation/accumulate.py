"""Figures sample by sample, so that each is counted once however a run was cut up.

A run may be interrupted and resumed, spread over processes, and padded by a sampler that repeats samples to give all
processes as many. Records are therefore kept by the name of the sample: merging is the union, and a mean is taken when
all are there, over samples in the order of their names. So it does not depend on who measured what, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from tokenizer.errors import InputError
from tokenizer.evaluation.bootstrap import Interval, bootstrap_mean
from tokenizer.evaluation.frechet import FeatureStatistics

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Summary:
    """What was measured.

    Attributes:
        figures: mean of each figure by its name, with a 95 % interval, over the samples that have it.
        samples: number of samples measured.
        left_out: why each sample that could not be measured was left out, by its name.
    """

    figures: dict[str, Interval]
    samples: int
    left_out: dict[str, str]


class Records:
    """Figures of samples by name.

    A name must be the same in every process and every run: the path below the data folder, or shard and key.
    """

    def __init__(self) -> None:
        self._figures: dict[str, dict[str, float]] = {}
        self._left_out: dict[str, str] = {}

    def __contains__(self, sample: str) -> bool:
        """Whether the sample is done: measured or left out. A resumed run passes over it."""
        return sample in self._figures or sample in self._left_out

    def __len__(self) -> int:
        """Samples measured."""
        return len(self._figures)

    def add(self, sample: str, figures: Mapping[str, float]) -> bool:
        """Record a sample; False if it was there already, and then what was there stays.

        Raises:
            InputError: a figure is not finite; nothing is recorded.
        """
        for name, value in figures.items():
            if not math.isfinite(value):
                raise InputError(f"{sample}: {name} is {value}: leave the sample out")
        if sample in self._figures:
            return False
        self._left_out.pop(sample, None)
        self._figures[sample] = {name: float(value) for name, value in figures.items()}
        return True

    def leave_out(self, sample: str, reason: str) -> None:
        """Record that a sample could not be measured, unless it was."""
        if sample not in self._figures:
            self._left_out.setdefault(sample, reason)

    def merge(self, other: Records) -> None:
        """Add what `other` has and this lacks. A sample measured by one and left out by the other was measured."""
        for sample, figures in other._figures.items():
            self.add(sample, figures)
        for sample, reason in other._left_out.items():
            self.leave_out(sample, reason)

    def samples(self) -> dict[str, dict[str, float]]:
        """Figures of every sample, in the order of names: for tables, and to find the best and the worst."""
        return {sample: dict(self._figures[sample]) for sample in sorted(self._figures)}

    def values(self, figure: str) -> dict[str, float]:
        """One figure of the samples that have it, in the order of names."""
        return {sample: figures[figure] for sample, figures in self.samples().items() if figure in figures}

    def summary(self, seed: int = 0) -> Summary:
        """Means and intervals.

        Args:
            seed: of the bootstrap.
        """
        names = dict.fromkeys(name for figures in self.samples().values() for name in figures)
        return Summary(
            figures={name: bootstrap_mean(list(self.values(name).values()), seed) for name in names},
            samples=len(self._figures),
            left_out={sample: self._left_out[sample] for sample in sorted(self._left_out)},
        )

    def state(self) -> dict[str, Any]:
        """Ready for JSON; `from_state` reads it back, every number to the last bit."""
        return {"figures": self.samples(), "left_out": dict(self._left_out)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Records:
        """Records equal to those whose `state` this is.

        Raises:
            InputError: it is not such a state.
        """
        result = cls()
        try:
            for sample, figures in state["figures"].items():
                result.add(sample, {name: float(value) for name, value in figures.items()})
            for sample, reason in state["left_out"].items():
                result.leave_out(sample, str(reason))
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise InputError(f"state of an evaluation cannot be read ({error}): delete it and start anew") from None
        return result


def shard(samples: Sequence[T], rank: int, processes: int) -> Sequence[T]:
    """The samples of one process: every one of them in exactly one process, none twice.

    Feature statistics are sums, from which a repeated sample cannot be taken out again: cut the samples with this, not
    with a sampler that pads.
    """
    return samples[rank::processes]


def gather_records(records: Records) -> Records:
    """The records of all processes together, in every process; those of this process without distributed processes."""
    together = Records()
    for state in _all(records.state()):
        together.merge(Records.from_state(state))
    return together


def gather_statistics(statistics: FeatureStatistics) -> FeatureStatistics:
    """The statistics of all processes together, in every process, merged in the order of ranks."""
    together = FeatureStatistics(statistics.width)
    for state in _all(statistics.state()):
        together.merge(FeatureStatistics.from_state(state))
    return together


def _all(value: dict[str, Any]) -> list[dict[str, Any]]:
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    gathered: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, value)
    return gathered
