"""Sets of shards, written in parallel, the same bytes whatever the number of workers, and gone on with after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from data.samples import Kind
from data.shards.manifest import Shard, ShardSet, Skipped

Job = TypeVar("Job")


@dataclass(frozen=True, slots=True)
class Record:
    """A sample to write: its files by extension, and the facts that become KEY.json."""

    key: str
    files: Mapping[str, bytes]
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_shard(path: Path, records: Iterable[Record | Skipped], *, plan: str = "") -> tuple[Shard, list[Skipped]]:
    raise AssertionError


def finished_shard(path: Path, *, plan: str = "") -> tuple[Shard, list[Skipped]] | None:
    """What `write_shard` returned for `path` in an earlier run; None where it did not finish."""
    raise AssertionError


def write_set(
    out: Path,
    kind: Kind,
    jobs: Sequence[Job],
    make: Callable[[Job], Iterable[Record | Skipped]],
    *,
    jobs_per_shard: int,
    workers: int,
    facts: Mapping[str, Any],
    console: Console | None = None,
) -> ShardSet:
    raise AssertionError


def merge_set(
    out: Path, kind: Kind, expected_names: Sequence[str], facts: Mapping[str, Any], *, plan: str = ""
) -> ShardSet | None:
    raise AssertionError
