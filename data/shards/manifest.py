"""What a set of shards holds: its manifest on disk, or a scan of tars that have none.

A manifest lies beside its shards and names them without their folder, so a set can be moved or copied to a server:

    {"format": "atoken-shards", "version": 1, "kind": "images", "samples": 1000, "bytes": 104857600,
     "facts": {...}, "shards": [{"name": "shard-000000.tar", "samples": 500, "bytes": ..., "sha256": "..."}, ...],
     "skipped": [{"name": "broken.jpg", "reason": "..."}, ...], "plan": "..."}

"facts" says how the set was made, "skipped" what could not become a sample, "plan" is the fingerprint of what was to be
written (`data.shards.writer`). Shards of other makers have no manifest: their samples are counted once, from the
headers alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.progress import Progress

from data.samples import (
    IMAGE_EXTENSIONS,
    LATENTS_EXTENSION,
    VIDEO_EXTENSIONS,
    VOXELS_EXTENSION,
    Kind,
    SampleError,
)
from data.shards.reader import scan_shard
from data.urls import UNREACHABLE, expand_urls, is_remote, local_path, open_url, scheme_of
from tokenizer.errors import InputError

FORMAT = "atoken-shards"
VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar. sha256 is empty where it is not known (no manifest)."""

    url: str
    samples: int
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Its file name."""
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that did not become a sample: the name of its source, and why in one line."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The shards of a set, in order.

    kind: what every sample is.
    facts: how the set was made; empty for shards without a manifest.
    skipped: what was left out when it was made, or is unreadable in shards without a manifest.
    plan: fingerprint of what was to be written; empty where it is not known.
    """

    kind: Kind
    shards: tuple[Shard, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    plan: str = ""

    @property
    def samples(self) -> int:
        """In all shards together."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Of all tars together."""
        return sum(shard.bytes for shard in self.shards)


def read_set(spec: str | Path, *, console: Console | None = None) -> ShardSet:
    """The set that a folder, manifest, tar or pattern names.

    Args:
        spec: a folder or its `manifest.json`, by path or URL; or tars without a manifest, by path, URL, `*`, braces
            or `pipe:`, or a local folder of such; these are read once to count their samples.
        console: shows the progress of counting; by default on stderr where that is a terminal.

    Raises:
        InputError: nothing there, not a manifest of this format and version, a shard that is missing on the local
            disk, no samples, or none of a known kind.
        SampleError: a URL cannot be reached.
    """
    raise InputError(f"{spec}")


def write_manifest(path: Path, shards: ShardSet) -> None:
    """Write `shards` as the manifest `path`, which must lie in the folder of the tars."""


def verify(shards: ShardSet) -> Iterator[tuple[Shard, str]]:
    """Compare every tar with its checksum: each shard with what is wrong with it in one line, "" where nothing is.

    Raises:
        InputError: the set has no manifest, so there are no checksums.
    """
    yield from ()
