"""A small world for the loader: sets of tiny samples, a decoder that can misbehave, and what came out."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.batch import Batch
from data.loader import Feed, Loader
from data.mixture import Source, Task
from data.samples import Item, Raw, SampleError
from data.shards.manifest import ShardSet
from data.shards.writer import Record, write_set
from data.stream import Reading

IMAGE, VIDEO, UNDERSTOOD = Task.IMAGE_RECONSTRUCTION, Task.VIDEO_RECONSTRUCTION, Task.IMAGE_UNDERSTANDING
BUDGETS = {IMAGE: 25, VIDEO: 20, UNDERSTOOD: 30}


@dataclass(frozen=True)
class TinyDecoder:
    """Tokens as the facts say. Samples named in `trouble` are broken, kill their process or never end.

    once: folder where a killer leaves a mark, so that it kills only the first time.
    """

    source: str
    task: Task
    broken: tuple[str, ...] = ()
    killers: tuple[str, ...] = ()
    sleepers: tuple[str, ...] = ()
    once: str = ""

    def __call__(self, raw: Raw, epoch: int) -> Item:
        if raw.key in self.broken:
            raise SampleError("damaged picture", f"{raw.id}: is damaged")
        if raw.key in self.killers and not self._done(raw.key):
            os.kill(os.getpid(), signal.SIGKILL)
        if raw.key in self.sleepers:
            time.sleep(3600)
        facts = raw.facts()
        return Item(f"{raw.id}@{epoch}", self.source, self.task, int(facts["tokens"]), facts=facts)

    def _done(self, key: str) -> bool:
        if not self.once:
            return False
        mark = Path(self.once) / key
        if mark.exists():
            return True
        mark.touch()
        return False


def record(job: tuple[str, int]) -> Iterator[Record]:
    """A sample whose number of tokens depends on its number."""
    name, number = job
    yield Record(f"{name}{number:04d}", {"bin": b"x" * (number % 7)}, {"tokens": 1 + number * 7 % 10})


def tiny_set(folder: Path, name: str, count: int, per_shard: int) -> ShardSet:
    """A set of `count` samples called NAME0000, ..."""
    jobs = [(name, number) for number in range(count)]
    return write_set(folder / name, "images", jobs, record, jobs_per_shard=per_shard, workers=1, facts={})


def feed(shards: ShardSet, decoder: TinyDecoder, **reading: object) -> Feed:
    """The set as a source of the loader."""
    how = Reading(**{"lanes": 2, "window": 6, "chunk": 4, **reading})  # type: ignore[arg-type]
    return Feed(Source(name=decoder.source, task=decoder.task, samples=shards.samples), shards, decoder, how)


def ids(batches: list[Batch]) -> list[list[str]]:
    """Names of the samples of one step."""
    return [[item.id for item in batch.items] for batch in batches]


def steps(loader: Loader, count: int) -> list[list[list[str]]]:
    """The next `count` steps."""
    return [ids(next(loader)) for _ in range(count)]


def feeds(sets: dict[str, ShardSet], **reading: object) -> list[Feed]:
    """Two sources of pictures, one of video, and pictures with captions."""
    return [
        feed(sets["a"], TinyDecoder("a", IMAGE), **reading),
        feed(sets["b"], TinyDecoder("b", IMAGE), **reading),
        feed(sets["v"], TinyDecoder("v", VIDEO), **reading),
        feed(sets["a"], TinyDecoder("captions", UNDERSTOOD), **reading),
    ]


def load(sets: dict[str, ShardSet], chosen: list[Feed] | None = None, **options: Any) -> Loader:
    """A loader of `chosen`, by default all `feeds`."""
    given = {"ratios": {IMAGE: 2, VIDEO: 1}, "budgets": BUDGETS, "seed": 3, **options}
    return Loader(chosen or feeds(sets), **given)
