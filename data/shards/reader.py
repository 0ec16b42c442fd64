"""Samples from a tar, as a stream: files that follow each other and share a name up to its first dot.

What is read here is whatever a disk or a network gave, so everything that can be wrong with a tar ends in a
`SampleError` after the whole samples before it. Two causes concern one sample only, which can be passed by reading on
from the next number: see `SINGLE`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field

from data.samples import Raw, SampleError
from data.shards.tar import DAMAGED, TRUNCATED, TarFiles
from data.urls import open_url

REPEATED = "repeated file"
TOO_LARGE = "file too large"
SINGLE = frozenset({REPEATED, TOO_LARGE})
"""Causes of a `SampleError` behind which the tar can be read on, with `start` one further."""

LARGEST_FILE = 4 * 1024**3
"""Bytes of the largest file that is read into memory."""


def read_shard(url: str, start: int = 0, samples: int | None = None) -> Generator[Raw, None, None]:
    """The samples of one tar, in order.

    Args:
        url: anything that `open_url` opens.
        start: number of the first sample wanted; those before it are not read where the stream can seek.
        samples: how many the tar holds, from the manifest.

    Yields:
        Samples; closing the generator closes the tar. The last one before a truncation is only given where it is sure
        to be whole: if anything of the next one, or the end of the tar, was seen.

    Raises:
        SampleError: "truncated shard": the tar ends early, or before `samples`; "damaged shard": a damaged header, not
            a tar, or more samples than `samples`; "unreachable shard" as from `open_url`; "repeated file": two files
            of a sample have the same extension; "file too large": over `LARGEST_FILE`.
        InputError: as from `open_url`.
    """
    index, key = -1, None
    files: dict[str, bytes] = {}
    with open_url(url) as stream:
        tar = TarFiles(stream, url)
        for name, size in tar:
            if (parts := split_name(name)) is None:
                continue
            if parts[0] != key:
                if index >= start:
                    yield Raw(url, index, key or "", files)
                index, key, files = index + 1, parts[0], {}
            if index < start:
                continue
            extension = parts[1]
            if extension in files:
                raise SampleError(REPEATED, f"{url}: sample {index} has '{name}' twice")
            if size > LARGEST_FILE:
                raise SampleError(TOO_LARGE, f"{url}: '{name}' has {size} bytes, at most {LARGEST_FILE} are read")
            files[extension] = tar.read()
    if index >= start:
        yield Raw(url, index, key or "", files)
    _compare(url, index + 1, samples)


def _compare(url: str, found: int, expected: int | None) -> None:
    if expected is None or found == expected:
        return
    message = f"{url}: holds {found} samples, its manifest says {expected}"
    raise SampleError(TRUNCATED if found < expected else DAMAGED, message)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension, in lower case, of a file in a tar; None for one that belongs to no sample (".x", "x").

    The base name is divided at its first dot; folders stay part of the key: "./train/07.views.webp" is
    ("train/07", "views.webp").
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot and extension else None


@dataclass(slots=True)
class Scan:
    """What a tar holds, by its headers.

    samples: how many can be read.
    bytes: length of the tar, up to the fault where it is a stream.
    extensions: how many samples have which extensions.
    fault: why the rest cannot be read, in one line; empty where all can.
    """

    samples: int = 0
    bytes: int = 0
    extensions: Counter[frozenset[str]] = field(default_factory=Counter)
    fault: str = ""


def scan_shard(url: str) -> Scan:
    """Count the samples of a tar, as `read_shard` gives them, without reading contents where the stream can seek.

    Raises:
        SampleError: "unreachable shard". Other faults are part of the result.
        InputError: as from `open_url`.
    """
    scan, key = Scan(), None
    extensions: set[str] = set()
    with open_url(url) as stream:
        tar = TarFiles(stream, url)
        try:
            for name, _ in tar:
                if (parts := split_name(name)) is None:
                    continue
                if parts[0] != key:
                    if key is not None:
                        scan.extensions[frozenset(extensions)] += 1
                    key, extensions = parts[0], set()
                extensions.add(parts[1])
            if key is not None:
                scan.extensions[frozenset(extensions)] += 1
        except SampleError as error:
            if error.cause not in (TRUNCATED, DAMAGED):
                raise
            scan.fault = str(error)
        scan.bytes = tar.length
    scan.samples = scan.extensions.total()
    return scan
