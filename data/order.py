"""In what order the samples of a set of shards are read: a function of the seed, the epoch and how many read together.

An epoch gives every sample once. Shards are shuffled and dealt to the processes of a run, and inside a process to a
fixed number of lanes, which are read side by side, chunk after chunk in turn. Inside a shard, samples are shuffled
within windows, since a tar is read from front to back; a place says how many samples of a shard, in this shuffled
order, come before. Nothing here depends on how many workers do the reading.

What is left of an epoch is a list of spans. Only where a run goes on with another number of processes are they dealt
anew: no sample is lost or seen twice within its epoch, but the order is another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple


class Span(NamedTuple):
    """Places `start` to `stop` (exclusive) of a shard, which is given by its number in the set."""

    shard: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def shuffled(count: int, *purpose: object) -> list[int]:
    """0..count-1 in an order that depends on `purpose` alone: not on platform, version or what was drawn before."""
    prefix = "\0".join(map(str, purpose)).encode()

    def rank(number: int) -> bytes:
        return hashlib.blake2b(b"%s\0%d" % (prefix, number), digest_size=8).digest()

    return sorted(range(count), key=rank)


def deal(
    spans: Iterable[Span], order: Sequence[int], processes: int, lanes: int, window: int, turn: int = 0
) -> list[list[tuple[Span, ...]]]:
    """The spans of each lane of each process.

    Where there are fewer spans than lanes, they are cut at windows, so that a small set feeds every process too.
    Lanes of one process are filled evenly, and all processes get as many spans, give or take one.

    Args:
        spans: what is to be read, without overlap.
        order: the shards of the set, shuffled.
        processes, lanes: how many of each, at least 1.
        window: samples of a window.
        turn: by how many places the parts of a small set, which is cut, are moved on from process to process; not where
            some process has no part.
    """
    rank = {shard: place for place, shard in enumerate(order)}
    ordered = sorted((span for span in spans if span.size > 0), key=lambda span: (rank[span.shard], span.start))
    if len(ordered) < processes * lanes:
        ordered = _cut(ordered, processes * lanes, window)
        turn = turn if len(ordered) >= processes else 0
    else:
        turn = 0  # the order of shards does as much
    places = [(process + turn) % processes for process in range(processes)]
    return [
        [tuple(ordered[place + processes * lane :: processes * lanes]) for lane in range(lanes)] for place in places
    ]


def _cut(spans: list[Span], pieces: int, window: int) -> list[Span]:
    """At least `pieces` spans where there are as many windows; cut at whole windows only, which are read at once."""
    longest = -(-sum(span.size for span in spans) // pieces // window) * window if spans else window
    longest = max(window, longest)
    return [Span(span.shard, a, b) for span in spans for a, b in _parts(span, longest, window)]


def _parts(span: Span, longest: int, window: int) -> Iterator[tuple[int, int]]:
    start = span.start
    while start < span.stop:
        stop = min((start // window * window) + longest, span.stop)
        yield start, stop
        start = stop


def subtract(spans: Iterable[Span], taken: Iterable[Span]) -> list[Span]:
    """What of `spans` is not in `taken`, in ascending order. Each has no overlap in itself."""
    left = []
    holes = {shard: sorted(group) for shard, group in groupby(sorted(taken), key=attrgetter("shard"))}
    for span in sorted(spans):
        start = span.start
        for hole in holes.get(span.shard, []):
            if hole.stop <= start or hole.start >= span.stop:
                continue
            if hole.start > start:
                left.append(Span(span.shard, start, hole.start))
            start = max(start, hole.stop)
        if start < span.stop:
            left.append(Span(span.shard, start, span.stop))
    return left


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same places in as few spans as possible, in ascending order."""
    whole: list[Span] = []
    for span in sorted(spans):
        if whole and whole[-1].shard == span.shard and whole[-1].stop >= span.start:
            whole[-1] = Span(span.shard, whole[-1].start, max(whole[-1].stop, span.stop))
        else:
            whole.append(span)
    return whole
