"""The loader: shards of many sources in, packed batches of one task each out, for one process of a run.

    loader = Loader(feeds, ratios=VIDEO_STAGE, budgets={Task.IMAGE_UNDERSTANDING: 65536, ...}, seed=0, workers=8)
    for batches in loader:                       # one step: a batch of each task of the step
        ...

A task that has a batch size gives as many batches a step as its samples need, one behind the other; the other tasks
give one, filled up to its budget.

    state = loader.state_dict()                  # of every process, into the checkpoint

Which samples come, and in which order, depends on the seed, the sources, their reading and the place among the
processes of the run, but not on the number of workers. A run that goes on with as many processes gives the batches
that the uninterrupted one would have given; with another number, what is left of each epoch is dealt anew, and within
an epoch no sample is lost or given twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from data.batch import Batch
from data.faults import TOO_LARGE, Quarantine
from data.mixture import EVERY_STEP, Mixture, Source, Task
from data.packing import Oversized, Packer, Report
from data.portions import Portions, share
from data.samples import Fault
from data.shards.manifest import ShardSet
from data.stream import Position, Reading, Stream
from data.tap import Held, Tap, make_fetcher, read_again
from data.window import Decode, Job
from tokenizer.errors import InputError

LOOK_AHEAD: Mapping[Task, int] = {
    Task.IMAGE_UNDERSTANDING: 64,
    Task.IMAGE_RECONSTRUCTION: 64,
    Task.VIDEO_UNDERSTANDING: 8,
    Task.VIDEO_RECONSTRUCTION: 8,
    Task.ASSET_UNDERSTANDING: 16,
    Task.ASSET_RECONSTRUCTION: 16,
}
"""Decoded samples that packing chooses from, at least (`Packer`); they are held in memory."""


@dataclass(frozen=True, slots=True)
class Feed:
    """A source and how to read it.

    source: name, task, size and weight.
    shards: what it consists of.
    decode: picklable; a sample and its epoch -> what is trained on.
    """

    source: Source
    shards: ShardSet
    decode: Decode
    reading: Reading = field(default_factory=Reading)


class Loader:
    """Packed batches for one process.

    Args:
        feeds: the sources.
        ratios: tasks that take turns.
        budgets: tokens of a batch, at most, for each task.
        batches: samples of a step, for tasks that have a batch size: in all processes together, each of which takes
            its share every time it is asked.
        seed: of the run.
        every_step: tasks of every step.
        workers: processes that read and decode; 0 does it here, when a batch is asked for.
        rank, world: which process of the run this is, of how many.
        look_ahead: samples to choose from when a batch is packed, by task.
        ahead: chunks of each source that workers read ahead; a batch waits for what it takes beyond them.
        oversized: what becomes of a sample larger than its budget; skipped ones are named and counted, but not broken.
        quarantine: counts broken samples and stops the run where there are too many.
        timeout: seconds after which a worker that gives nothing is replaced.

    Raises:
        InputError: a task without budget or source, a batch size below the number of processes, or anything else that
            makes no sense.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        *,
        ratios: Mapping[Task, int | Fraction],
        budgets: Mapping[Task, int],
        batches: Mapping[Task, int] | None = None,
        seed: int,
        every_step: Sequence[Task] = EVERY_STEP,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        look_ahead: Mapping[Task, int] = LOOK_AHEAD,
        ahead: int = 32,
        oversized: Oversized = "skip",
        quarantine: Quarantine | None = None,
        timeout: float = 300.0,
    ) -> None:
        if not 0 <= rank < world:
            raise InputError(f"rank must lie in 0..{world - 1} for {world} processes, got {rank}")
        self.mixture = Mixture([feed.source for feed in feeds], ratios, every_step)
        tasks = dict.fromkeys((*every_step, *ratios))
        if missing := [task for task in tasks if task not in budgets]:
            raise InputError(f"no token budget for {', '.join(missing)}")
        self.quarantine = quarantine or Quarantine()
        self._rank, self._world, self._seed = rank, world, seed
        self._jobs = {f.source.name: Job(f.shards.shards, f.reading, f.decode, seed) for f in feeds}
        counts = {task: _own_share(task, count, rank, world) for task, count in (batches or {}).items()}
        self._packers: dict[Task, Packer[Held] | Portions[Held]] = {
            task: Portions(counts[task], budgets[task], _tokens_of, oversized=oversized, on_skip=self._too_large)
            if task in counts
            else Packer(
                budgets[task],
                _tokens_of,
                buffer=look_ahead.get(task, LOOK_AHEAD[task]),
                oversized=oversized,
                on_skip=self._too_large,
            )
            for task in tasks
        }
        self._fetcher = make_fetcher(self._jobs, workers, timeout)
        self._taps = {f.source.name: Tap(self._stream(f), self._fetcher, self.quarantine, ahead) for f in feeds}
        self._finished: set[str] = set()
        self._steps = {task: self._steps_of(task) for task in self._packers}
        self._waited, self._started = 0.0, time.perf_counter()
        self._begun = self._ended = False

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """The batches of the next step, task by task. Without end, unless readings have epochs: then it ends with the
        first step for which one of its tasks has nothing left.

        What that step had drawn of its other tasks by then is dropped, and counts as taken in `state_dict`: whether a
        source has another sample shows only when it is read.
        """
        if self._ended:
            raise StopIteration
        self._begun = True
        asked = time.perf_counter()
        batches = []
        for task in self.mixture.step():
            portion = next(self._steps[task], None)
            if portion is None:
                self._ended = True  # else every further call would drop as much again
                raise StopIteration
            batches += [Batch(task, [sample.item for sample in held]) for held in portion]
        self._waited += time.perf_counter() - asked
        return batches

    def close(self) -> None:
        """Stop the workers."""
        self._fetcher.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ what to log

    def wait_share(self) -> float:
        """Share of the time since the last call (or the start) that was spent in here: what data costs a run."""
        now = time.perf_counter()
        share = self._waited / max(now - self._started, 1e-9)
        self._waited, self._started = 0.0, now
        return share

    @property
    def reports(self) -> dict[Task, Report]:
        """For each task, how full its batches were, the largest waste among them."""
        return {task: packer.report for task, packer in self._packers.items()}

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands, ready for JSON. A checkpoint holds the states of all processes."""
        return {
            "rank": self._rank,
            "world": self._world,
            "seed": self._seed,
            "sources": {name: self._fingerprint(job) for name, job in self._jobs.items()},
            "mixture": self.mixture.state_dict(),
            "streams": {name: tap.stream.state_dict() for name, tap in self._taps.items()},
            "packers": {str(task): packer.state_dict() for task, packer in self._packers.items()},
            "waiting": {
                str(task): [[place, held.source, *held.position] for place, held in packer.waiting.items()]
                for task, packer in self._packers.items()
                if isinstance(packer, Packer)
            },
            "quarantine": self.quarantine.state_dict(),
        }

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on where a run stopped.

        Args:
            states: of all its processes, in any order. As many as there are now: go on exactly. More or fewer: what
                is left of each epoch is dealt anew.

        Raises:
            InputError: states are missing, or are of a run with another seed, or with other sources, or this loader
                has given batches already.
        """
        ordered = sorted(states, key=lambda state: int(state["rank"]))
        self._check_states(ordered)
        if len(ordered) == self._world:
            self._go_on(ordered[self._rank])
        else:
            self._deal_anew(ordered)

    def _go_on(self, state: Mapping[str, Any]) -> None:
        self.quarantine.load_state_dict(state["quarantine"])
        self.mixture.load_state_dict(state["mixture"])
        for name, tap in self._taps.items():
            tap.stream.load_state_dict(state["streams"][name])
        for task, packer in self._packers.items():
            packer.load_state_dict(state["packers"][str(task)])
            if isinstance(packer, Packer):
                self._read_waiting(packer, state["waiting"][str(task)])

    def _read_waiting(self, packer: Packer[Held], waiting: Sequence[Sequence[Any]]) -> None:
        """Read the samples again that waited in a packer."""
        again = read_again([_position(entry) for entry in waiting], self._jobs)
        for lost in again:
            if isinstance(lost, Fault):
                self.quarantine.add(lost)
        places = [int(place) for place, *_ in waiting]
        packer.restore({p: held for p, held in zip(places, again, strict=True) if isinstance(held, Held)})

    def _deal_anew(self, states: Sequence[Mapping[str, Any]]) -> None:
        if self._rank == 0:
            self.quarantine.load_state_dict(*(state["quarantine"] for state in states))
        self.mixture.load_state_dict(states[0]["mixture"], steps_only=True)
        waiting = [[_position(entry) for part in s["waiting"].values() for entry in part] for s in states]
        for name, tap in self._taps.items():
            of_source = [[position for source, position in held if source == name] for held in waiting]
            tap.stream.deal_anew([state["streams"][name] for state in states], of_source)

    def _check_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        if self._begun:
            raise InputError("this loader has given batches already; load a state into a new one")
        worlds = {int(state["world"]) for state in states}
        if len(worlds) != 1 or [int(state["rank"]) for state in states] != list(range(*worlds)):
            raise InputError(
                f"the checkpoint holds the loader states of processes {[int(s['rank']) for s in states]} "
                f"of {sorted(worlds)}; all states of one run are needed"
            )
        if states[0]["seed"] != self._seed:
            raise InputError(f"the saved loader has seed {states[0]['seed']}, this one {self._seed}: use the same")
        ours = {name: self._fingerprint(job) for name, job in self._jobs.items()}
        for name in sorted({*ours, *states[0]["sources"]}):
            then, now = states[0]["sources"].get(name), ours.get(name)
            if then != now:
                raise InputError(
                    f"source {name} is not what it was when the state was saved: {then} then, {now} now; "
                    "resume with the same sources, or start the loader afresh"
                )

    @staticmethod
    def _fingerprint(job: Job) -> dict[str, Any]:
        """What must be the same for places in the source to mean the same."""
        reading = job.reading
        return {
            "samples": [shard.samples for shard in job.shards],
            **{name: getattr(reading, name) for name in ("lanes", "window", "chunk", "shuffle")},
        }

    # ------------------------------------------------------------------ samples

    def _stream(self, feed: Feed) -> Stream:
        counts = [shard.samples for shard in feed.shards.shards]
        name = feed.source.name
        return Stream(name, counts, feed.reading, seed=self._seed, rank=self._rank, world=self._world)

    def _steps_of(self, task: Task) -> Iterator[list[list[Held]]]:
        """What each step takes of a task: the samples of one batch or more."""
        packer, source = self._packers[task], self._samples(task)
        return packer.steps(source) if isinstance(packer, Portions) else ([held] for held in packer.batches(source))

    def _samples(self, task: Task) -> Iterator[Held]:
        """The samples of a task, its sources in exact ratio as long as all last."""
        names = {name for name, source in self.mixture.sources.items() if source.task == task}
        while not names <= self._finished:
            name = self.mixture.draw(task).name
            if name in self._finished:
                continue
            held = self._taps[name].next()
            if held is not None:
                yield held
                continue
            if self._taps[name].stream.reading.epochs is None:
                raise InputError(
                    f"source {name} has too few samples for {self._world} processes: give it smaller windows, "
                    "more samples, or leave it out"
                )
            self._finished.add(name)

    def _too_large(self, held: Held, reason: str) -> None:
        shard = self._jobs[held.source].shards[held.position.shard]
        fault = Fault(TOO_LARGE, shard.url, -1, f"{held.item.id}: {reason}", key=held.item.id)
        self.quarantine.leave_out(held.source, fault)


def _tokens_of(held: Held) -> int:
    return held.item.tokens


def _own_share(task: Task, count: int, rank: int, world: int) -> int:
    """What this process takes of a batch size.

    Raises:
        InputError: too few samples for every process to have one.
    """
    if count < max(1, world):
        raise InputError(f"batches of {task} have {count} samples for {world} processes; each needs at least one")
    return share(count, rank, world)


def _position(entry: Sequence[Any]) -> tuple[str, Position]:
    _, source, epoch, shard, place = entry
    return str(source), Position(int(epoch), int(shard), int(place))
