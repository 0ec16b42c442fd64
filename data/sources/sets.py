"""What a small open set is: where its files come from, under which licence, and how they become shards.

Each set is described by one `OpenSet` in a module of its own; `data.sources.catalogue` lists and builds them. A set has
a fixed split: which samples are for training and which for evaluation depends on the set alone, never on the seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from data.samples import Kind
from data.shards.manifest import Skipped
from data.shards.writer import Record
from data.sources.packages import Package, install_hint, missing_packages
from tokenizer.errors import InputError

Split = Literal["train", "evaluation"]
Make = Callable[[Any], Iterable[Record | Skipped]]
_Entry = TypeVar("_Entry")


@dataclass(frozen=True, slots=True)
class Options:
    """How a set is built.

    seed: order of the samples, and what is drawn at random (game play); the split does not depend on it.
    limit: only this many files, models, films or games of each split.
    source: file or folder to take instead of the installed package, where a set knows one.
    resolution: voxels along an edge of an asset.
    max_side: pictures with a longer side are reduced to it; None keeps all as found.
    """

    seed: int = 0
    limit: int | None = None
    source: Path | None = None
    resolution: int = 32
    max_side: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be made.

    jobs: of each split that has any; picklable.
    make: a job -> its samples, in another process.
    jobs_per_shard: how many jobs make one tar.
    labels: every label of the set in a fixed order, so that a label's number means the same in both splits.
    facts: what further belongs into the manifests.
    """

    jobs: Mapping[Split, Sequence[Any]]
    make: Make
    jobs_per_shard: int
    labels: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenSet:
    """A small open set.

    name: as the command line takes it.
    kind: of its samples.
    size: how many samples and bytes, in a phrase.
    licence: of the files.
    citation: whom to name, and where they are from.
    packages: what must be installed.
    captions: what captions and labels are, in a phrase.
    split: the rule, in a phrase.
    plan: looks at the installed files.
    takes_source: what `Options.source` may be, in a phrase; "" for a set that takes none.
    """

    name: str
    kind: Kind
    size: str
    licence: str
    citation: str
    packages: tuple[Package, ...]
    captions: str
    split: str
    plan: Callable[[Options], Plan]
    takes_source: str = ""

    def missing(self) -> list[Package]:
        """The packages that are not installed."""
        return missing_packages(self.packages)

    def require(self) -> None:
        """Raise `InputError` with the commands that bring what is missing."""
        if missing := self.missing():
            names = ", ".join(package.name for package in missing)
            other = f"; or give {self.takes_source} as source (--from)" if self.takes_source else ""
            raise InputError(f"the set '{self.name}' needs {names}: {install_hint(missing)}{other}")


def mixed(entries: Sequence[_Entry], options: Options) -> list[_Entry]:
    """The first `limit` of the entries in an order drawn from the seed, so that every shard is a fair sample."""
    order = np.random.default_rng(options.seed).permutation(len(entries))
    return [entries[int(index)] for index in order[: options.limit]]


def pieces(entries: Sequence[_Entry], length: int) -> list[tuple[_Entry, ...]]:
    """Neighbours together, `length` at a time; the last piece may be shorter."""
    return [tuple(entries[start : start + length]) for start in range(0, len(entries), length)]


def slug(text: str) -> str:
    """Letters, digits and hyphens: a key that no tar, shell or file system trips over."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def record(key: str, files: Mapping[str, bytes], caption: str | None, **facts: Any) -> Record:
    """A sample with its caption (none where it is empty) and those of the facts that are known."""
    text = {"txt": caption.encode()} if caption else {}
    return Record(key, {**files, **text}, {name: value for name, value in facts.items() if value not in (None, "")})
