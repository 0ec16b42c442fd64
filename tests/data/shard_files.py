"""Small shards for tests, and jobs that processes of their own can find by name."""

from __future__ import annotations

import io
import os
import random
import signal
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data.samples import Raw, SampleError
from data.shards.reader import read_shard
from data.shards.writer import Record, Skipped, write_set

FACTS = {"seed": 7, "sizes": [1, 2]}


def contents(job: int) -> dict[str, bytes]:
    return {"jpg": random.Random(job).randbytes(300 * job), "txt": f"caption {job}".encode()}


def make(job: int) -> Iterator[Record | Skipped]:
    """Job 5 becomes nothing, the others one or two samples."""
    if job == 5:
        yield Skipped("five.jpg", "not a picture")
        return
    yield Record(f"train/{job:04d}", contents(job), {"label": f"größe {job}"})
    if job % 3 == 0:
        yield Record(f"extra/{job:04d}", {"png": b"twice"}, {})


def make_slowly(job: int) -> Iterator[Record | Skipped]:
    for record in make(job):
        yield record
        time.sleep(0.04)


def make_and_die(job: int) -> Iterator[Record | Skipped]:
    yield from make(job)
    if job == 6:
        os.kill(os.getpid(), signal.SIGKILL)


def make_and_fail(job: int) -> Iterator[Record | Skipped]:
    yield from make(job)
    if job == 6:
        raise RuntimeError("the camera is on fire")


def write_slowly(out: Path, workers: int) -> None:
    """What the process does that tests kill."""
    write_set(out, "images", range(12), make_slowly, jobs_per_shard=3, workers=workers, facts=FACTS)


def tar_of(members: Sequence[tuple[str, bytes]] | Mapping[str, bytes], how: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar by the standard library, not by the code under test."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=how) as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def read_until_fault(url: str, samples: int | None = None) -> tuple[list[Raw], SampleError | None]:
    """Everything that can be read of a tar, and why it ended early."""
    found: list[Raw] = []
    stream = read_shard(url, samples=samples)
    while True:
        try:
            found.append(next(stream))
        except StopIteration:
            return found, None
        except SampleError as error:
            return found, error


def folder_of(path: Path) -> dict[str, bytes]:
    """Everything in a folder, hidden files too."""
    return {entry.name: entry.read_bytes() for entry in sorted(path.iterdir())}
