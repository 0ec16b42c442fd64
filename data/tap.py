"""One source, opened: its samples one after the other, read ahead, broken ones counted and passed over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data.faults import Quarantine
from data.fetch import Fetcher, InProcess, Workers
from data.samples import Fault, Item
from data.shards.manifest import ShardSet
from data.stream import Chunk, Position, Reading, Stream
from data.window import Decode, Job, SourceReader
from tokenizer.errors import InputError


@dataclass(frozen=True, slots=True)
class Held:
    """A sample and where it stands in its source, so that it can be read again."""

    item: Item
    source: str
    position: Position


class Tap:
    """The samples of a source, in the order of its stream.

    Args:
        stream: where the source stands.
        fetcher: reads its chunks; has a job for `stream.name`.
        quarantine: counts samples.
        ahead: chunks read ahead.
    """

    def __init__(self, stream: Stream, fetcher: Fetcher, quarantine: Quarantine, ahead: int) -> None:
        self.stream = stream
        self._fetcher, self._quarantine, self._ahead = fetcher, quarantine, ahead
        self._lost = 0  # samples since the last whole one

    def next(self) -> Held | None:
        """The next sample that is whole; None after the last epoch.

        Raises:
            InputError: too many broken samples, or workers that die; or a source that has none that is whole, which
                would be read for ever, however many may be broken.
        """
        while self._plan():
            outcome = self._fetcher.next(self.stream.name)
            position = self.stream.take()
            if isinstance(outcome, Item):
                self._quarantine.count_good(self.stream.name)
                self._lost = 0
                return Held(outcome, self.stream.name, position)
            self._quarantine.add(outcome)
            self._lost += 1
            if self._lost > self.stream.samples:
                raise InputError(
                    f"source {self.stream.name}: not one of its samples can be read; the last: {self._quarantine.last}"
                )
        return None

    def _plan(self) -> bool:
        """Have chunks read ahead; false if none is left."""
        while self.stream.planned < self._ahead:
            chunk = self.stream.plan()
            if chunk is None:
                break
            self._fetcher.submit(chunk, self.stream.taken_of_first if self.stream.planned == 1 else 0)
        return self.stream.planned > 0


def make_fetcher(jobs: dict[str, Job], workers: int, timeout: float) -> Fetcher:
    """Processes that read, or none.

    Raises:
        InputError: a negative number of workers.
    """
    if workers < 0:
        raise InputError(f"workers must not be negative, got {workers}; 0 reads in this process")
    return Workers(jobs, workers, timeout=timeout) if workers else InProcess(jobs)


def read_items(
    shards: ShardSet,
    decode: Decode,
    *,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    quarantine: Quarantine | None = None,
    timeout: float = 300.0,
) -> Iterator[Item]:
    """Every sample of a set once, for measuring and converting; with one process in the order of its shards.

    Args:
        decode: a sample and an epoch (0) -> what is wanted of it.
        workers: processes; 0 reads in this one.
        rank, world: which part of the set, of how many.
        quarantine: counts broken samples, which are passed over; by default any share is allowed.
    """
    reading = Reading(lanes=1, window=8, chunk=8, shuffle=False, epochs=1)
    # One lane would keep one worker busy; several change the order, so they are used only where workers are.
    if workers > 1:
        reading = Reading(lanes=workers, window=8, chunk=8, shuffle=False, epochs=1)
    stream = Stream("set", [shard.samples for shard in shards.shards], reading, seed=0, rank=rank, world=world)
    fetcher = make_fetcher({"set": Job(shards.shards, reading, decode, 0)}, workers, timeout)
    tap = Tap(stream, fetcher, quarantine or Quarantine(max_share=1.0), ahead=2 * reading.lanes)
    try:
        while (held := tap.next()) is not None:
            yield held.item
    finally:
        fetcher.close()


def read_again(held: list[tuple[str, Position]], jobs: dict[str, Job]) -> list[Held | Fault]:
    """Samples by where they stand, in the order given; read in this process."""
    found: dict[tuple[str, Position], Held | Fault] = {}
    readers = {name: SourceReader(job) for name, job in jobs.items()}
    for name, position in sorted(set(held)):  # in the order of the tars, so that each is read once
        chunk = Chunk(name, position.epoch, 0, position.shard, position.place, position.place + 1)
        (outcome,) = readers[name].outcomes(chunk)
        found[name, position] = Held(outcome, name, position) if isinstance(outcome, Item) else outcome
    for reader in readers.values():
        reader.close()
    return [found[key] for key in held]
