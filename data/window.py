"""Reading and decoding the chunks of a source: what a worker process does, and the main process where there are none.

A chunk is part of a window, and a window is read from its tar at once, from front to back. The tar stays open for the
next chunk of the same lane. What cannot be read or decoded becomes a `Fault` in its place, so that the number of
outcomes never changes. A tar that could not be opened, or turned out to end early, is not tried again in the same
epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from data.samples import Fault, Item, Raw, SampleError
from data.shards.manifest import Shard
from data.shards.reader import SINGLE, read_shard
from data.stream import Chunk, Reading

Outcome = Item | Fault

Decode = Callable[[Raw, int], Item]
"""A sample and its epoch -> what is trained on; raises `SampleError`."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything needed to work on the chunks of a source; travels to every worker.

    shards: of its set, in their order.
    decode: picklable.
    seed: of the run.
    """

    shards: tuple[Shard, ...]
    reading: Reading
    decode: Decode
    seed: int

    def index_of(self, chunk: Chunk, place: int) -> int:
        """The number in its tar of the sample at a place of a chunk (from 0 at its start)."""
        window, within = divmod(chunk.start + place, self.reading.window)
        samples = self.shards[chunk.shard].samples
        return self.reading.window_order(self.seed, chunk.epoch, chunk.shard, window, samples)[within]


@dataclass(slots=True)
class _Lane:
    """What a lane has open."""

    epoch: int
    shard: int
    reader: Iterator[Raw]
    next_index: int
    window: int = -1
    order: list[int] = field(default_factory=list)
    samples: dict[int, Raw] = field(default_factory=dict)
    broken: dict[int, SampleError] = field(default_factory=dict)
    failure: SampleError | None = None


class SourceReader:
    """Works on the chunks of one source; in any order, but fast only for chunks of a lane that follow each other."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lanes: dict[int, _Lane] = {}

    def outcomes(self, chunk: Chunk, skip: int = 0) -> Iterator[Outcome]:
        """One outcome for each place of the chunk, but for the first `skip`; decoded one at a time."""
        lane = self._window(chunk)
        first = lane.window * self._job.reading.window
        for place in range(chunk.start + skip, chunk.stop):
            yield self._outcome(chunk, lane, lane.order[place - first])

    def close(self) -> None:
        """Close every tar."""
        for lane in self._lanes.values():
            _close(lane.reader)
        self._lanes.clear()

    def _outcome(self, chunk: Chunk, lane: _Lane, index: int) -> Outcome:
        url = self._job.shards[chunk.shard].url
        # Not kept: a window of large files would stay in memory until the next one.
        raw = lane.samples.pop(index, None)
        if raw is None:
            failure = (
                lane.broken.get(index)
                or lane.failure
                or SampleError("truncated shard", f"{url}: has no sample {index}")
            )
            return Fault(failure.cause, url, index, str(failure))
        try:
            return self._job.decode(raw, chunk.epoch)
        except Exception as error:  # one odd file must not end a run; many of them do, by their share
            return fault_of(error, url, index, raw.id, raw.key)

    def _window(self, chunk: Chunk) -> _Lane:
        """The lane of the chunk, with the samples of its window that can be read."""
        number = chunk.start // self._job.reading.window
        lane = self._lanes.get(chunk.lane)
        if lane is None or (lane.epoch, lane.shard) != (chunk.epoch, chunk.shard):
            if lane is not None:
                _close(lane.reader)
            lane = self._lanes[chunk.lane] = _Lane(chunk.epoch, chunk.shard, iter(()), -1)
        if lane.window != number:
            shard = self._job.shards[chunk.shard]
            lane.window = number
            lane.order = self._job.reading.window_order(self._job.seed, chunk.epoch, chunk.shard, number, shard.samples)
            self._read(lane, shard, number * self._job.reading.window, len(lane.order))
        return lane

    def _read(self, lane: _Lane, shard: Shard, first: int, count: int) -> None:
        """Read the samples of a window into its lane, and what is wrong with those that cannot be read."""
        lane.samples, lane.broken = {}, {}
        index = first
        while index < first + count and lane.failure is None:
            if lane.next_index != index:
                _close(lane.reader)
                lane.reader = read_shard(shard.url, index, shard.samples)
            try:
                for raw in itertools.islice(lane.reader, first + count - index):
                    lane.samples[raw.index] = raw
                    index = raw.index + 1
                lane.next_index = index
                return
            except SampleError as error:
                if error.cause in SINGLE:
                    lane.broken[index] = error
                    index += 1
                else:
                    lane.failure = error
                lane.next_index = -1  # a reader that has failed gives nothing more


def fault_of(error: Exception, url: str, index: int, name: str, key: str = "") -> Fault:
    """What becomes of sample `index` of a tar, called `name` for people, when working on it raised `error`."""
    if isinstance(error, SampleError):
        return Fault(error.cause, url, index, str(error), key=key)
    if isinstance(error, MemoryError):
        return Fault("out of memory", url, index, f"{name}: too large for the memory of a worker", key=key)
    detail = f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"
    return Fault("unexpected error", url, index, detail, key=key)


def _close(reader: Iterator[Raw]) -> None:
    close = getattr(reader, "close", None)  # generators have it, and hold the tar open until they are closed
    if close is not None:
        close()
