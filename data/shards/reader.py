"""Samples from a tar, as a stream."""

from __future__ import annotations

from collections.abc import Iterator

from data.samples import Raw


def read_shard(url: str, start: int = 0, samples: int | None = None) -> Iterator[Raw]:
    """The samples of one tar, in order."""
    yield from ()


def scan_shard(url: str) -> Iterator[tuple[str, frozenset[str]]]:
    """Key and extensions of every sample, without reading contents."""
    yield from ()
