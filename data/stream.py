"""One source of a process as an endless row of chunks, epoch after epoch; where it stands is a few numbers.

`Stream` plans and never reads: the chunks it gives are read ahead by workers (`data.fetch`), and its state counts what
has been taken, not what has been planned. So it goes on exactly, on any number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.order import Span, deal, joined, shuffled, subtract
from tokenizer.errors import InputError


@dataclass(frozen=True, slots=True)
class Chunk:
    """Samples to read and decode together: places `start` to `stop` of one window of a shard.

    source: its name. lane: which of the source's lanes it belongs to; one lane reads its shards front to back.
    shard: number in the set.
    """

    source: str
    epoch: int
    lane: int
    shard: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Samples, broken ones counted."""
        return self.stop - self.start


class Position(NamedTuple):
    """One sample of an epoch."""

    epoch: int
    shard: int
    place: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How a source is read. A run that goes on must read it in the same way.

    lanes: shards open at once in a process, whose samples alternate.
    window: samples shuffled together; their files are held in memory.
    chunk: samples of one lane that follow each other, and travel together from worker to process.
    shuffle: else shards and samples come in their order.
    epochs: how many; without end by default.
    """

    lanes: int = 4
    window: int = 128
    chunk: int = 8
    shuffle: bool = True
    epochs: int | None = None

    def __post_init__(self) -> None:
        if min(self.lanes, self.window, self.chunk) < 1:
            raise InputError(f"lanes, window and chunk must be at least 1, got {self}")
        if self.epochs is not None and self.epochs < 0:
            raise InputError(f"epochs must not be negative, got {self.epochs}")

    def window_order(self, seed: int, epoch: int, shard: int, window: int, samples: int) -> list[int]:
        """The numbers in their tar of the samples of a window, in the order of their places.

        Args:
            seed: of the run.
            epoch, shard, window: which.
            samples: how many the tar holds.
        """
        first = window * self.window
        count = max(0, min(self.window, samples - first))
        order = shuffled(count, "samples", seed, epoch, shard, window) if self.shuffle else range(count)
        return [first + number for number in order]


class _Cursor(NamedTuple):
    """Between two chunks: which lane is next, and of each lane the number of its span and how much of it is read."""

    epoch: int
    turn: int
    lanes: tuple[tuple[int, int], ...]


class Stream:
    """The chunks of one source for one process.

    Args:
        name: of the source.
        counts: samples of each shard.
        reading: see there.
        seed: of the run.
        rank, world: which process this is, of how many.

    Raises:
        InputError: no samples at all.
    """

    def __init__(
        self, name: str, counts: Sequence[int], reading: Reading, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        if not sum(counts):
            raise InputError(f"source {name}: its shards hold no samples")
        self.name, self.reading = name, reading
        self._counts, self._seed, self._rank, self._world = tuple(counts), seed, rank, world
        # Of epochs that were begun on another number of processes: what was left of them then.
        self._left: dict[int, list[Span]] = {}
        self._dealt: dict[int, list[tuple[Span, ...]]] = {}
        self._turns_from = 0  # epochs in which the parts of small sets change places; later for checkpoints of before
        self._behind = self._ahead = self._settled(self._start(0))
        self._planned: list[tuple[Chunk, _Cursor]] = []  # chunks between the two cursors, each with what follows it
        self._taken = 0  # samples taken of the first planned chunk

    @property
    def samples(self) -> int:
        """In an epoch, of all processes together."""
        return sum(self._counts)

    def plan(self) -> Chunk | None:
        """The next chunk to read ahead, or None after the last epoch."""
        planned = self._after(self._ahead)
        if planned is None:
            return None
        self._planned.append(planned)
        self._ahead = planned[1]
        return planned[0]

    def take(self) -> Position:
        """Count the next sample of the planned chunks as taken (or lost), and say which it was."""
        chunk, following = self._planned[0]
        position = Position(chunk.epoch, chunk.shard, chunk.start + self._taken)
        self._taken += 1
        if self._taken == chunk.size:
            del self._planned[0]
            self._behind, self._taken = self._settled(following), 0
        return position

    @property
    def planned(self) -> int:
        """Chunks that are planned and not yet taken."""
        return len(self._planned)

    @property
    def taken_of_first(self) -> int:
        """How many samples of the first chunk that `plan` gives after a resume have been taken before it."""
        return self._taken

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, ready for JSON."""
        cursor = self._behind
        return {
            "epoch": cursor.epoch,
            "turn": cursor.turn,
            "lanes": [list(lane) for lane in cursor.lanes],
            "taken": self._taken,
            "turns_from": self._turns_from,
            "left": {str(epoch): [list(span) for span in spans] for epoch, spans in self._left.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken, in the same place among as many processes."""
        self._left = {int(epoch): [Span(*span) for span in spans] for epoch, spans in state["left"].items()}
        self._dealt.clear()
        lanes = tuple((int(number), int(read)) for number, read in state["lanes"])
        self._behind = self._ahead = _Cursor(int(state["epoch"]), int(state["turn"]), lanes)
        self._turns_from = int(state.get("turns_from", self._behind.epoch + 1))
        self._planned, self._taken = [], int(state["taken"])

    def deal_anew(self, states: Sequence[Mapping[str, Any]], waiting: Sequence[Sequence[Position]]) -> None:
        """Go on from the states of another number of processes: what none of them took is dealt to the new ones.

        Args:
            states: of all processes of before, in their order.
            waiting: samples that each of them had taken and not yet used; they are read again.
        """
        olds = []
        for rank, state in enumerate(states):
            old = Stream(self.name, self._counts, self.reading, seed=self._seed, rank=rank, world=len(states))
            old.load_state_dict(state)
            olds.append(old)
        if any("turns_from" not in state for state in states):
            for old in olds:  # nothing changed places anywhere
                old._turns_from = max(state["epoch"] for state in states) + 1
        # Also epochs that are over but for waiting samples, and those that no process has reached, but some had begun
        # before an earlier change of their number: an epoch that is not named here would be dealt whole.
        begun = [*(old._behind.epoch for old in olds), *(position.epoch for held in waiting for position in held)]
        last = max(max(old._behind.epoch, *old._left, 0) for old in olds)
        epochs = range(min(begun), last + 1)
        self._left = {epoch: [] for epoch in epochs}
        for old, held in zip(olds, waiting, strict=True):
            for epoch in epochs:
                self._left[epoch] += old._remaining(epoch)
            for position in held:
                self._left[position.epoch].append(Span(position.shard, position.place, position.place + 1))
        self._left = {epoch: joined(spans) for epoch, spans in sorted(self._left.items())}
        self._dealt.clear()
        self._behind = self._ahead = self._settled(self._start(min(self._left)))
        self._planned, self._taken = [], 0

    def _remaining(self, epoch: int) -> list[Span]:
        """What this process has not yet taken of an epoch."""
        cursor = self._behind
        if epoch < cursor.epoch:
            return []
        lanes = self._lanes(epoch)
        if epoch > cursor.epoch:
            return [span for lane in lanes for span in lane]
        left: list[Span] = []
        for spans, (number, read) in zip(lanes, cursor.lanes, strict=True):
            if number < len(spans):
                shard, start, stop = spans[number]
                left += [Span(shard, start + read, stop), *spans[number + 1 :]]
        begun = self._after(cursor) if self._taken else None
        if begun is not None:
            chunk = begun[0]
            left = subtract(left, [Span(chunk.shard, chunk.start, chunk.start + self._taken)])
        return left

    # ------------------------------------------------------------------ order

    def _start(self, epoch: int) -> _Cursor:
        return _Cursor(epoch, 0, ((0, 0),) * self.reading.lanes)

    def _lanes(self, epoch: int) -> list[tuple[Span, ...]]:
        """This process's share of an epoch."""
        if epoch not in self._dealt:
            whole = [Span(shard, 0, count) for shard, count in enumerate(self._counts)]
            shards = len(self._counts)
            order = shuffled(shards, "shards", self._seed, epoch) if self.reading.shuffle else range(shards)
            spans = self._left.get(epoch, whole)
            # Of few windows one process has more than another, and so comes to its next epoch later: it would see the
            # same ones less often for ever.
            turn = epoch if self.reading.shuffle and epoch >= self._turns_from else 0
            dealt = deal(spans, order, self._world, self.reading.lanes, self.reading.window, turn)
            self._dealt = {e: lanes for e, lanes in self._dealt.items() if abs(e - epoch) <= 1}
            self._dealt[epoch] = dealt[self._rank]
        return self._dealt[epoch]

    def _after(self, cursor: _Cursor) -> tuple[Chunk, _Cursor] | None:
        """The chunk at a cursor and the cursor behind it; None at the end."""
        cursor = self._settled(cursor)
        lane = self._open_lane(cursor)
        return None if lane is None else self._chunk(cursor, lane)

    def _settled(self, cursor: _Cursor) -> _Cursor:
        """The same place, said as the beginning of the next epoch where one is over."""
        last = max(self._left, default=0)
        while self._open_lane(cursor) is None:
            # Nothing here for this process, and never more: a set of fewer windows than processes.
            if cursor.epoch > last and not any(self._lanes(cursor.epoch)):
                break
            if self.reading.epochs is not None and cursor.epoch + 1 >= self.reading.epochs:
                break
            cursor = self._start(cursor.epoch + 1)
        return cursor

    def _open_lane(self, cursor: _Cursor) -> int | None:
        """The next lane from which there is something to read."""
        if self.reading.epochs is not None and cursor.epoch >= self.reading.epochs:
            return None
        lanes = self._lanes(cursor.epoch)
        turns = ((cursor.turn + step) % len(lanes) for step in range(len(lanes)))
        return next((lane for lane in turns if cursor.lanes[lane][0] < len(lanes[lane])), None)

    def _chunk(self, cursor: _Cursor, lane: int) -> tuple[Chunk, _Cursor]:
        number, read = cursor.lanes[lane]
        span = self._lanes(cursor.epoch)[lane][number]
        start = span.start + read
        end_of_window = (start // self.reading.window + 1) * self.reading.window
        stop = min(start + self.reading.chunk, end_of_window, span.stop)
        now = (number + 1, 0) if stop == span.stop else (number, stop - span.start)
        places = (*cursor.lanes[:lane], now, *cursor.lanes[lane + 1 :])
        following = _Cursor(cursor.epoch, (lane + 1) % self.reading.lanes, places)
        return Chunk(self.name, cursor.epoch, lane, span.shard, start, stop), following
