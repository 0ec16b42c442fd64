"""Shards of pictures, videos or assets to shards of latents, by one process or many, in one run or several.

Shard i of the result holds the latents of shard i of the set, and carries its name. Processes share nothing but the
folder: under torchrun each takes every WORLD_SIZE-th shard from its RANK on, no collective is needed, and whoever
finishes the last shard writes the manifest. A shard appears whole or not at all, and one that is there is not written
again: what it was made from (model, settings, checksums of the set) is in its sidecar, and anything else is refused.

Device, budget and workers are no part of that: they may change between two runs, and with them at most the last bits.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from data.decode.decoder import Decoder, DecodeSettings
from data.faults import Quarantine
from data.fetch import Fetcher
from data.latents.encode import ShardEncoder, Untouched
from data.latents.process import Bar, device_of_process, ends_on_sigterm, place
from data.latents.report import QUARANTINE, Report
from data.latents.statistics import Moments
from data.mixture import Task
from data.samples import Fault, Kind, SampleError
from data.shards.manifest import MANIFEST, Shard, ShardSet, Skipped, read_set
from data.shards.tarwriter import Record, finished_shard, write_shard
from data.shards.writer import begin_set, merge_set, plan_of, shard_name
from data.stream import Chunk, Reading
from data.tap import make_fetcher
from data.window import Job, Outcome
from tokenizer import AToken
from tokenizer.atomic import atomic_path
from tokenizer.cli.models import load_model
from tokenizer.errors import InputError
from tokenizer.patches import PatchSize

_TASKS: dict[Kind, Task] = {
    "images": Task.IMAGE_RECONSTRUCTION,
    "videos": Task.VIDEO_RECONSTRUCTION,
    "assets": Task.ASSET_RECONSTRUCTION,
}
_WINDOWS: dict[Kind, int] = {"images": 32, "videos": 4, "assets": 8}
"""Samples that a worker reads at once and holds in memory."""

_SET = "set"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What `atoken tokenize` may be told.

    model: bundled name, folder or released checkpoint.
    device: "auto" takes CUDA where there is one, and under torchrun the one of this process.
    dtype: auto (bf16 on CUDA, fp32 elsewhere), fp32, bf16 or fp16.
    discrete: codebook indices instead of latents.
    max_side: larger pictures and frames are reduced to it, in pixels.
    frames: of a video, from its start, at most; a multiple of those of a patch (4).
    budget: tokens encoded together, at most; a larger sample is encoded alone.
    workers: processes that read and decode; 0 does it in this one.
    """

    model: str = "atoken-nano"
    device: str = "auto"
    dtype: str = "auto"
    discrete: bool = False
    max_side: int = 256
    frames: int = 32
    budget: int = 8192
    workers: int = 0


def tokenize_shards(shards: str, out: Path, settings: Settings, *, console: Console | None = None) -> Report:
    """Write the latents of a set of shards, or what earlier runs left to write.

    Args:
        shards: a folder, manifest, tar or pattern, as `read_set` takes it.
        out: folder for the result, shared by all processes.
        console: for progress; by default stderr.

    Raises:
        InputError: nothing to read, latents already, no such model or device, `out` holds something else, a batch that
            does not fit the memory, or shards that cannot be reached now (those that can are written before).
    """
    console = console or Console(stderr=True)
    rank, world = place()
    found = read_set(shards, console=console)
    if found.kind == "latents":
        raise InputError(f"{shards}: holds latents already; tokenise the shards that they were made from")
    model = load_model(settings.model, device_of_process(settings.device), settings.dtype, discrete=settings.discrete)
    run = _Run(found, out, settings, model.eval())
    todo = [] if begin_set(out, run.plan, run.facts) else run.todo(rank, world)
    started = time.monotonic()
    with ends_on_sigterm(), Bar(console, run.samples(todo), shown=rank == 0) as bar:
        unreachable = run.write(todo, bar)
    seconds = time.monotonic() - started
    if unreachable:
        raise InputError(
            f"{len(unreachable)} of {len(todo)} shards could not be read and are not written ({unreachable[0]}); "
            "run the command again when they are there"
        )
    complete = run.merge()  # also for a set that is complete: the run before may have been killed while it tidied up
    return Report(
        out=str(out),
        model=model.config.name,
        fingerprint=run.fingerprint,
        complete=complete is not None,
        shards=len(complete.shards) if complete else len(found.shards),
        samples=complete.samples if complete else found.samples,
        written=len(todo),
        encoded_samples=run.quarantine.good,
        encoded_tokens=run.tokens,
        seconds=seconds,
        causes=dict(run.quarantine.causes),
    )


class _Run:
    """One process at work on one set."""

    def __init__(self, found: ShardSet, out: Path, settings: Settings, model: AToken) -> None:
        self.found, self.out, self.settings, self.model = found, out, settings, model
        self.names = _output_names(found.shards)
        self.fingerprint = model.fingerprint
        self.facts: dict[str, Any] = {
            "model": model.config.name,
            "latent_space": self.fingerprint,
            "latents": "indices" if settings.discrete else "float16 mean and logvar",
            "computed_in": str(model.dtype).removeprefix("torch."),
            "settings": {"max_side": settings.max_side, "frames": settings.frames},
            "inputs": _digest(found.shards),
            "kind": found.kind,
            "source": dict(found.facts),
        }
        self.plan = plan_of("latents", (), self.facts)
        self.quarantine = Quarantine(max_share=1.0, file=out / QUARANTINE)
        self.tokens = 0

    def todo(self, rank: int, world: int) -> list[int]:
        """Numbers of the shards that this process has to write."""
        return [number for number in range(rank, len(self.names), world) if not self._is_finished(number)]

    def samples(self, numbers: Sequence[int]) -> int:
        """In these shards."""
        return sum(self.found.shards[number].samples for number in numbers)

    def write(self, numbers: Sequence[int], bar: Bar) -> list[str]:
        """Write shards.

        Returns:
            Why some could not be reached, one line each.
        """
        if not numbers:
            return []
        reading = Reading(lanes=max(1, self.settings.workers), window=_WINDOWS[self.found.kind], shuffle=False)
        task = _TASKS[self.found.kind]
        decoder = Decoder(_SET, task, self.found.kind, _decode_settings(self.settings, self.model.config.patch_size))
        job = Job(self.found.shards, reading, Untouched(decoder), 0)
        unreachable = []
        with contextlib.closing(make_fetcher({_SET: job}, self.settings.workers, timeout=300.0)) as fetcher:
            outcomes = _outcomes(fetcher, self.found.shards, numbers, reading)
            by_shard = itertools.groupby(outcomes, key=lambda pair: pair[0])
            for number in numbers:
                # Shards without samples give no group.
                group = next(by_shard)[1] if self.found.shards[number].samples else iter(())
                encoder = ShardEncoder(
                    self.model,
                    self.fingerprint,
                    task,
                    self.settings.discrete,
                    self.settings.budget,
                    on_fault=functools.partial(self._left_out, bar),
                    on_batch=functools.partial(self._encoded, bar),
                )
                try:
                    self._write_one(number, encoder, (outcome for _, outcome in group))
                except SampleError as error:
                    unreachable.append(str(error))
        return unreachable

    def _write_one(self, number: int, encoder: ShardEncoder, outcomes: Iterator[Outcome]) -> None:
        path = self.out / self.names[number]

        def records() -> Iterator[Record | Skipped]:
            yield from encoder.records(outcomes)
            # Before the tar gets its name, so that no finished shard is without moments.
            _write_moments(_moments_file(path), encoder.moments)

        write_shard(path, records(), plan=self.plan)
        self.tokens += encoder.tokens

    def merge(self) -> ShardSet | None:
        """Write the manifest, with the moments of all latents; None while shards are missing."""
        files = [_moments_file(self.out / name) for name in self.names]
        facts = self.facts
        try:
            moments = [moments for file in files if (moments := _read_moments(file)) is not None]
        except _UnfinishedError:
            # Either shards are missing, or another process has written the manifest and tidied up already.
            if not (self.out / MANIFEST).exists():
                return None
        else:
            total = functools.reduce(Moments.__add__, moments) if moments else None
            facts = facts | {"statistics": total.as_facts() if total else None}
        merged = merge_set(self.out, "latents", self.names, facts, plan=self.plan)
        if merged is not None:
            for file in files:
                file.unlink(missing_ok=True)
        return merged

    def _is_finished(self, number: int) -> bool:
        path = self.out / self.names[number]
        if finished_shard(path, plan=self.plan) is None:
            return False
        try:
            _read_moments(_moments_file(path))
        except _UnfinishedError:
            return False
        return True

    def _left_out(self, bar: Bar, fault: Fault) -> None:
        self.quarantine.add(fault)
        bar.advance(fault.samples, 0)

    def _encoded(self, bar: Bar, samples: int, tokens: int) -> None:
        self.quarantine.good += samples
        bar.advance(samples, tokens)


def _outcomes(
    fetcher: Fetcher, shards: Sequence[Shard], numbers: Sequence[int], reading: Reading
) -> Iterator[tuple[int, Outcome]]:
    """The samples of some shards in order, each with the number of its shard; windows go to the workers in turn."""
    turns = itertools.count()
    chunks = (
        Chunk(_SET, 0, next(turns) % reading.lanes, number, start, min(start + reading.window, shards[number].samples))
        for number in numbers
        for start in range(0, shards[number].samples, reading.window)
    )
    submitted: deque[Chunk] = deque()
    while True:
        for chunk in itertools.islice(chunks, 2 * reading.lanes - len(submitted)):
            fetcher.submit(chunk)
            submitted.append(chunk)
        if not submitted:
            return
        chunk = submitted.popleft()
        for _ in range(chunk.size):
            yield chunk.shard, fetcher.next(_SET)


def _output_names(shards: Sequence[Shard]) -> list[str]:
    """Those of the shards; numbers where these are no names of tars, or not different."""
    names = [shard.name for shard in shards]
    if len(set(names)) == len(names) and all(name.endswith(".tar") and "?" not in name for name in names):
        return names
    return [shard_name(number) for number in range(len(names))]


def _digest(shards: Sequence[Shard]) -> str:
    """Of what is tokenised, wherever it lies: names, sizes and, where they are known, checksums of the shards."""
    told = [[shard.name, shard.samples, shard.bytes, shard.sha256] for shard in shards]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _decode_settings(settings: Settings, patch_size: PatchSize) -> DecodeSettings:
    """Everything is seen whole, and enlarged only where it is less than a patch. Latents keep no views of assets."""
    return DecodeSettings(
        training=False,
        min_side=max(patch_size[1:]),
        max_side=settings.max_side,
        frames=(patch_size[0], settings.frames),
        views=0,
        patch_size=patch_size,
    )


def _moments_file(tar: Path) -> Path:
    return tar.with_suffix(".moments.json")


def _write_moments(path: Path, moments: Moments | None) -> None:
    # As lasting as the tar and its sidecar: a name without its contents, after a power cut, would look finished.
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(moments.as_json() if moments else None) + "\n")
        file.flush()
        os.fsync(file.fileno())


class _UnfinishedError(Exception):
    """A shard has no moments that can be read, so it is to be written."""


def _read_moments(path: Path) -> Moments | None:
    """None for a shard without latents, or of indices.

    Raises:
        _UnfinishedError: missing, or not what `_write_moments` wrote.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return None if values is None else Moments.from_json(values)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise _UnfinishedError(f"{path}: {error}") from None
