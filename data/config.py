"""Settings of a loader, as they stand in the YAML of a run under `data:`.

data:
  ratios: {image_reconstruction: 2, video_understanding: 1, video_reconstruction: 6}
  budgets: {image_understanding: 65536, image_reconstruction: 65536, video_understanding: 32768, ...}
  batches: {image_understanding: 8192}
  workers: 8
  sources:
    - {name: photographs, task: image_reconstruction, shards: sets/photographs/train}
    - {name: emoji, task: image_understanding, shards: sets/emoji/train, weight: 1/2, decode: {max_side: 64}}
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from data.batch import Batch
from data.decode.decoder import Decoder, DecodeSettings
from data.faults import Quarantine
from data.loader import Feed, Loader
from data.mixture import EVERY_STEP, Source, Task
from data.packing import Oversized
from data.shards.manifest import read_set
from data.stream import Reading
from data.tap import read_items
from data.urls import expand_urls, local_path, scheme_of
from tokenizer.config import parse_config
from tokenizer.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One source.

    name: unique.
    task: what its samples are used for. A set that serves two tasks is two sources.
    shards: folder with a manifest, its URL, or tars by path, URL, glob or braces.
    weight: multiplies the size; a whole number or a fraction such as 1/2.
    decode, reading: see there; lanes, window and chunk are smaller by default where samples are large.
    """

    name: str
    task: Task
    shards: str
    weight: int | str = 1
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    reading: Reading | None = None

    def __post_init__(self) -> None:
        self.exact_weight()

    def exact_weight(self) -> Fraction:
        """The weight as a fraction.

        Raises:
            InputError: not a positive whole number or fraction.
        """
        try:
            weight = Fraction(str(self.weight))
        except (ValueError, ZeroDivisionError):
            weight = Fraction(0)
        if weight <= 0:
            raise InputError(f"source {self.name}: weight must be positive, like 2 or 1/2, got {self.weight}")
        return weight


READINGS = {
    "images": Reading(),
    "videos": Reading(window=16, chunk=1),
    "assets": Reading(window=32, chunk=4),
    "latents": Reading(window=512, chunk=32),
}
"""How sources are read where nothing is said: windows of about 100 MB, chunks of about one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Everything that a loader needs but the seed and the place among the processes of a run.

    sources, ratios, budgets, every_step, workers, look_ahead, ahead, oversized, timeout: as for `Loader`.
    batches: samples of a step in all processes together, by task; each time that batches are taken from the loader
        (`accumulation`) there are as many. They are packed into as many batches under the task's budget as they need.
        A task that is not named has one batch in each process, filled up to its budget.
    max_broken: share of broken samples that stops the run; what is too large for its budget is not broken.
    """

    sources: tuple[SourceConfig, ...]
    ratios: dict[Task, int]
    budgets: dict[Task, int]
    batches: dict[Task, int] = field(default_factory=dict)
    every_step: tuple[Task, ...] = EVERY_STEP
    workers: int = 0
    look_ahead: dict[Task, int] = field(default_factory=dict)
    ahead: int = 32
    oversized: Oversized = "skip"
    timeout: float = 300.0
    max_broken: float = 0.05

    def __post_init__(self) -> None:
        if not self.sources:
            raise InputError("a loader needs at least one source")


_MAKING = "scripts/install_data.sh and then scripts/build_nano_data.sh make the sets of nano, atoken shard makes others"


def open_feed(config: SourceConfig, seed: int) -> Feed:
    """Read the manifest of a source.

    Raises:
        InputError: no such set, or samples that do not fit the task.
    """
    local = scheme_of(config.shards) in ("", "file")
    if local and expand_urls(config.shards) == [config.shards] and not local_path(config.shards).exists():
        raise InputError(f"source '{config.name}': {config.shards}: no shards here; {_MAKING}")
    shards = read_set(config.shards)
    decode = Decoder(config.name, config.task, shards.kind, config.decode, seed)
    source = Source(name=config.name, task=config.task, samples=shards.samples, weight=config.exact_weight())
    return Feed(source, shards, decode, config.reading or READINGS[shards.kind])


def open_loader(
    config: DataConfig,
    *,
    seed: int,
    rank: int = 0,
    world: int = 1,
    quarantine_file: Path | None = None,
    feeds: Sequence[Feed] | None = None,
) -> Loader:
    """The loader of one process.

    Args:
        seed: of the run.
        rank, world: which process this is, of how many.
        quarantine_file: where broken samples are named.
        feeds: opened sources, instead of those of the configuration.

    Raises:
        InputError: a source that cannot be opened, or anything that `Loader` refuses.
    """
    return Loader(
        feeds or [open_feed(source, seed) for source in config.sources],
        ratios=config.ratios,
        budgets=config.budgets,
        batches=config.batches,
        seed=seed,
        every_step=config.every_step,
        workers=config.workers,
        rank=rank,
        world=world,
        look_ahead=config.look_ahead,
        ahead=config.ahead,
        oversized=config.oversized,
        quarantine=Quarantine(config.max_broken, quarantine_file),
        timeout=config.timeout,
    )


def open_training_loader(
    settings: Mapping[str, Any], *, seed: int, rank: int, world: int, quarantine_file: Path | None
) -> Loader:
    """The loader of one process of a training run, as the entry point "atoken.loaders" wants it.

    Args:
        settings: of `DataConfig`, as they stand in YAML under `data:`.

    Raises:
        InputError: as `open_loader`, or settings that are unknown or missing.
    """
    config = parse_config(DataConfig, settings, "data")
    return open_loader(config, seed=seed, rank=rank, world=world, quarantine_file=quarantine_file)


def open_held_out(sources: Sequence[Mapping[str, Any]], *, budget: int, limit: int) -> dict[str, list[Batch]]:
    """Batches of held-out sources by name, as the entry point "atoken.held_out" wants them.

    Samples come in the order of the set and are read as for measuring, not for training: whole pictures, no chance.
    Broken ones, and ones above the budget, are left out.

    Args:
        sources: of `SourceConfig` each, as in YAML.
        budget: tokens of a batch.
        limit: samples of each source.

    Raises:
        InputError: as `open_feed`, or a source of which nothing can be used.
    """
    found = {}
    for number, settings in enumerate(sources):
        config = parse_config(SourceConfig, settings, f"validation.sources {number}")
        feed = open_feed(replace(config, decode=replace(config.decode, training=False)), seed=0)
        quarantine = Quarantine(max_share=1.0)
        items = itertools.islice(read_items(feed.shards, feed.decode, quarantine=quarantine), limit)
        batches: list[Batch] = []
        tokens = budget + 1
        for item in items:
            if item.tokens > budget:
                continue
            if tokens + item.tokens > budget:
                batches.append(Batch(config.task, []))
                tokens = 0
            batches[-1].items.append(item)
            tokens += item.tokens
        if not batches:
            why = f"; {quarantine.bad} are broken, the last: {quarantine.last}" if quarantine.bad else ""
            raise InputError(
                f"held-out source {config.name}: none of its samples can be used with {budget} tokens{why}"
            )
        found[config.name] = batches
    return found
