"""Packing: samples of any size into batches under a token budget, online, in bounded memory, without padding.

The packer looks ahead over `buffer` samples, or more where those are too small for two batches. A batch starts with the
oldest of them, so none waits for more batches than there were samples before it, and is filled with those whose sizes
come closest to the budget: not greedily, but the best subset, found exactly with the bits of one whole number (bit s is
set if some subset has s tokens). Of equally good subsets the one of older samples wins, so the order of batches is a
function of the sizes alone.

A packer's state holds no sample: only where each waiting one stood in the source. To resume, the source is read again
from `replay_from` on, at most a few batches back, and what has already gone out is passed by.

Give each task its own packer; a batch then holds samples of one task. `data.portions` packs a fixed number of samples
instead, in as many batches as they need.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Literal, TypeVar

from tokenizer.errors import InputError

Sample = TypeVar("Sample")

BATCHES_AHEAD = 2
"""Budgets of tokens that are looked at ahead, at least: what a batch takes, and as much to choose from."""

Oversized = Literal["skip", "alone", "refuse"]
"""What becomes of a sample that is larger than the budget: reported and left out; a batch of its own; an error."""


@dataclass(slots=True)
class Waste:
    """How full batches were. A batch over the budget (a sample "alone") wastes nothing.

    batches: how many.
    tokens: in all of them together.
    wasted: tokens of the budget left free, in all of them together.
    largest: left free in the worst of them.
    """

    batches: int = 0
    tokens: int = 0
    wasted: int = 0
    largest: int = 0

    @property
    def mean(self) -> float:
        """Tokens of the budget left free in a batch, on average; 0 before the first."""
        return self.wasted / self.batches if self.batches else 0.0

    def add(self, tokens: int, budget: int) -> None:
        """Count one batch."""
        free = max(0, budget - tokens)
        self.batches += 1
        self.tokens += tokens
        self.wasted += free
        self.largest = max(self.largest, free)


@dataclass(slots=True)
class Report:
    """What a packer has done so far.

    running: batches packed while the source had more to give.
    draining: batches packed after it had ended, from what was left; the last ones cannot be full.
    skipped: samples left out because they are larger than the budget.
    """

    running: Waste = field(default_factory=Waste)
    draining: Waste = field(default_factory=Waste)
    skipped: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The report that `asdict` made the values of."""
        return cls(Waste(**values["running"]), Waste(**values["draining"]), int(values["skipped"]))


class Measure(Generic[Sample]):
    """How many tokens samples have, and which of them are left out because no batch holds them.

    Args:
        budget, size, oversized, on_skip: as for `Packer`.

    Raises:
        InputError: a budget below 1, or an unknown `oversized`.
    """

    def __init__(
        self,
        budget: int,
        size: Callable[[Sample], int],
        oversized: Oversized,
        on_skip: Callable[[Sample, str], None] | None,
    ) -> None:
        if budget < 1:
            raise InputError(f"a budget must be at least 1 token, got {budget}")
        if oversized not in ("skip", "alone", "refuse"):
            raise InputError(f"oversized must be 'skip', 'alone' or 'refuse', got '{oversized}'")
        self.budget, self.oversized = budget, oversized
        self.size, self._on_skip = size, on_skip

    def __call__(self, sample: Sample, place: int) -> int:
        """Tokens of a sample; 0 where it is to be left out.

        Args:
            place: in the source, for messages.

        Raises:
            InputError: a sample without tokens, or one over the budget that is to be refused.
        """
        tokens = self.size(sample)
        if tokens < 1:
            raise InputError(f"sample {place} of the source has {tokens} tokens; leave empty samples out")
        if tokens <= self.budget or self.oversized == "alone":
            return tokens
        reason = f"larger than the budget: {tokens} tokens, at most {self.budget} fit a batch"
        if self.oversized == "refuse":
            raise InputError(f"sample {place} of the source is {reason}; lower its resolution or raise the budget")
        if self._on_skip is not None:
            self._on_skip(sample, reason)
        return 0


class Packer(Generic[Sample]):
    """Packs a stream of samples into batches of at most `budget` tokens, each sample whole and in exactly one batch.

    Args:
        budget: tokens of a batch, at most.
        size: the number of tokens of a sample, at least 1; always the same for the same sample.
        buffer: samples looked at ahead, at least; as many more as `BATCHES_AHEAD` batches hold, for a batch cannot be
            fuller than what is there to fill it.
        oversized: what becomes of a sample larger than the budget.
        on_skip: called with each skipped sample and the reason, once, also across resumes.

    Raises:
        InputError: a budget or buffer below 1.
    """

    def __init__(
        self,
        budget: int,
        size: Callable[[Sample], int],
        *,
        buffer: int = 128,
        oversized: Oversized = "skip",
        on_skip: Callable[[Sample, str], None] | None = None,
    ) -> None:
        if budget < 1 or buffer < 1:
            raise InputError(f"budget and buffer must be at least 1, got {budget} tokens and {buffer} samples")
        self.budget, self.buffer, self.oversized = budget, buffer, oversized
        self.report = Report()
        self._measure = Measure(budget, size, oversized, on_skip)
        self._taken = 0
        # Tokens of the waiting samples by their place in the source, oldest first; the samples themselves apart, since
        # they are no part of the state.
        self._waiting: dict[int, int] = {}
        self._samples: dict[int, Sample] = {}

    @property
    def replay_from(self) -> int:
        """How many samples of the source to pass over before giving it to `batches`; 0 for a new packer."""
        return next(iter(self._waiting), self._taken)

    @property
    def waiting(self) -> Mapping[int, Sample]:
        """Samples that are in no batch yet, by their place in the source, oldest first."""
        return self._samples

    @property
    def places(self) -> list[int]:
        """Places in the source of the samples that wait; also after loading a state, when they are still to be read."""
        return list(self._waiting)

    def restore(self, samples: Mapping[int, Sample]) -> None:
        """Give a packer whose state was loaded the samples that waited, instead of a source that starts with them.

        Args:
            samples: by their place in the source. Those that are missing have been lost and are forgotten.

        Raises:
            InputError: a sample that has another number of tokens than it had.
        """
        self._waiting = {place: tokens for place, tokens in self._waiting.items() if place in samples}
        for place, tokens in self._waiting.items():
            self._check_size(place, self._measure.size(samples[place]), tokens)
        self._samples = {place: samples[place] for place in self._waiting}

    def batches(self, source: Iterable[Sample]) -> Iterator[list[Sample]]:
        """The batches, each in the order of the source, until the source ends and nothing waits.

        The state may be taken between any two batches; it counts the batches that came out, the last one included.
        After the end, a source that goes on behind the first one (the next epoch) may be given.

        Args:
            source: the samples from `replay_from` on, the same and in the same order as before a resume.

        Raises:
            InputError: a sample without tokens, a sample over the budget that is to be refused, or, after a resume, a
                source that is not the one of before.
        """
        stream = iter(source)
        if len(self._samples) < len(self._waiting):
            self._replay(stream)
        ended = False
        while True:
            ended = ended or not self._fill(stream)
            if not self._waiting:
                return
            chosen = self._choose()
            tokens = sum(self._waiting.pop(place) for place in chosen)
            (self.report.draining if ended else self.report.running).add(tokens, self.budget)
            yield [self._samples.pop(place) for place in chosen]

    def _fill(self, stream: Iterator[Sample]) -> bool:
        """Look ahead until the buffer is full; false if the source ended first."""
        tokens = sum(self._waiting.values())
        while len(self._waiting) < self.buffer or tokens < BATCHES_AHEAD * self.budget:
            try:
                sample = next(stream)
            except StopIteration:
                return False
            tokens += self._take(sample)
        return True

    def _take(self, sample: Sample) -> int:
        """Let a sample wait, or leave it out; tokens that wait for it."""
        place, tokens = self._taken, self._measure(sample, self._taken)
        if tokens:
            self._waiting[place] = tokens
            self._samples[place] = sample
        else:
            self.report.skipped += 1
        self._taken += 1
        return tokens

    def _choose(self) -> list[int]:
        """Places of the next batch: the oldest waiting sample and what fills up best with it."""
        places = list(self._waiting)
        return [places[number] for number in fullest(list(self._waiting.values()), self.budget)]

    def _replay(self, stream: Iterator[Sample]) -> None:
        """Read again from the oldest waiting sample up to where the source had been read, keeping what waits."""
        self._samples.clear()
        for place in range(self.replay_from, self._taken):
            try:
                sample = next(stream)
            except StopIteration:
                raise InputError(
                    f"the source ends before sample {place}, but {self._taken} had been read when the state was saved: "
                    "resume on the same shards, from sample `replay_from` on"
                ) from None
            if place not in self._waiting:
                continue
            self._check_size(place, self._measure.size(sample), self._waiting[place])
            self._samples[place] = sample

    def _check_size(self, place: int, tokens: int, before: int) -> None:
        if tokens != before:
            raise InputError(
                f"sample {place} of the source has {tokens} tokens, but had {before} when the state was saved: "
                "resume on the same shards with the same seed"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, ready for JSON; a few numbers for each waiting sample."""
        return {
            "settings": self._settings(),
            "taken": self._taken,
            "waiting": [[place, tokens] for place, tokens in self._waiting.items()],
            "report": asdict(self.report),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken: call `batches` with the source from `replay_from` on.

        Raises:
            InputError: the state is of a packer with other settings, which would pack other batches.
        """
        if state["settings"] != self._settings():
            raise InputError(
                f"the saved packer has the settings {state['settings']}, this one {self._settings()}: "
                "resume with the same, or start the packer afresh"
            )
        self._taken = int(state["taken"])
        self._waiting = {int(place): int(tokens) for place, tokens in state["waiting"]}
        self._samples = {}
        self.report = Report.from_dict(state["report"])

    def _settings(self) -> dict[str, int | str]:
        return {"budget": self.budget, "buffer": self.buffer, "oversized": self.oversized}


def fullest(sizes: Sequence[int], budget: int) -> list[int]:
    """Indices, ascending, of a batch: the first size, and of the others what fills up best with it.

    Args:
        sizes: at least one, each at least 1. The first may be over the budget: it travels alone then.
    """
    room = max(0, budget - sizes[0])
    fitting, copies = [], Counter[int]()
    for number, size in enumerate(sizes[1:], start=1):
        copies[size] += size
        if copies[size] <= room:  # of equal sizes, more than fit at once only cost time
            fitting.append(number)
    return [0, *(fitting[number] for number in best_subset([sizes[number] for number in fitting], room))]


def best_subset(sizes: Sequence[int], room: int) -> list[int]:
    """Indices, ascending, of the sizes whose sum comes closest to `room` without exceeding it.

    Of equally good choices, the one that can be made from the fewest of the first sizes. Takes time and memory of
    len(sizes) x room bits, in whole-number operations; far less where an early choice fills the room, as near as the
    common divisor of the sizes lets it.

    Args:
        sizes: whole numbers, at least 1.
        room: a whole number, at least 0.
    """
    # In units of what all sizes share, an odd room for even sizes is filled, and the search ends there.
    unit = math.gcd(*sizes) or 1
    sizes, room = [size // unit for size in sizes], room // unit
    within = (1 << room + 1) - 1
    # sums[i] has bit s set if some subset of the first i sizes adds up to s.
    sums = [1]
    for size in sizes:
        sums.append((sums[-1] | sums[-1] << size) & within)
        if sums[-1] >> room:
            break
    left = sums[-1].bit_length() - 1
    chosen = []
    for index in range(len(sums) - 2, -1, -1):
        if not sums[index] >> left & 1:  # not to be had from the sizes before this one alone
            chosen.append(index)
            left -= sizes[index]
    return chosen[::-1]
