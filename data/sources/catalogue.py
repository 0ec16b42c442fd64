"""The small open sets by name, and building them as sets of shards.

    from data.sources.catalogue import build
    build("emoji", Path("datasets/emoji"), seed=0, workers=2)

writes `OUT/train` and, where the set has samples for evaluation, `OUT/evaluation`, each with its own manifest, whose
facts name licence, source, citation, split rule and labels. A build that was stopped goes on where it was.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from data.shards.manifest import ShardSet
from data.shards.writer import write_set
from data.sources.camera_set import SET as CAMERA
from data.sources.clips import SET as CLIPS
from data.sources.emoji import SET as EMOJI
from data.sources.fashion import SET as FASHION
from data.sources.furniture_set import INTERIORS
from data.sources.furniture_set import SET as FURNITURE
from data.sources.games import SET as GAMES
from data.sources.packages import install_hint
from data.sources.photographs import SET as PHOTOGRAPHS
from data.sources.sets import OpenSet, Options
from data.sources.stamps import SET as STAMPS
from tokenizer.errors import InputError
from tokenizer.voxels import MAX_RESOLUTION

SETS: dict[str, OpenSet] = {
    one.name: one for one in (EMOJI, FURNITURE, INTERIORS, GAMES, PHOTOGRAPHS, CLIPS, CAMERA, FASHION, STAMPS)
}


@dataclass(frozen=True, slots=True)
class Row:
    """A set in a listing. installed: whether all it needs is there; if not, install is the command that brings it."""

    name: str
    kind: str
    size: str
    licence: str
    installed: bool
    install: str
    captions: str
    split: str


def find(name: str) -> OpenSet:
    """The set called `name`.

    Raises:
        InputError: there is none; names the nearest.
    """
    if name in SETS:
        return SETS[name]
    near = difflib.get_close_matches(name, SETS, 1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise InputError(f"no set is called '{name}'; {hint}known: {', '.join(SETS)}")


def describe() -> list[Row]:
    """Every set, as a listing shows it."""
    rows = []
    for name, one in SETS.items():
        missing = one.missing()
        install = install_hint(missing)
        rows.append(Row(name, one.kind, one.size, one.licence, not missing, install, one.captions, one.split))
    return rows


def build(
    name: str,
    out: Path,
    *,
    seed: int = 0,
    workers: int = 1,
    limit: int | None = None,
    source_path: Path | None = None,
    resolution: int = 32,
    max_side: int | None = None,
    console: Console | None = None,
) -> dict[str, ShardSet]:
    """Build a set, or what is missing of it.

    Args:
        name: one of `SETS`.
        out: folder for `train` and `evaluation`.
        seed: order of the samples, and game play.
        workers: processes.
        limit: only this many files, models, films or games of each split.
        source_path: where to take the files from instead of the installed package (emoji, furniture).
        resolution: voxels along an edge of an asset.
        max_side: pictures with a longer side are reduced to it (photographs, clips for training); None keeps all as
            found.
        console: where to show progress.

    Returns:
        The shards of each split.

    Raises:
        InputError: an unknown name, a missing package, a value out of range, or `out` holds something else.
    """
    chosen = find(name)
    _check(chosen, limit, source_path, resolution)
    plan = chosen.plan(Options(seed, limit, source_path, resolution, max_side))
    written: dict[str, ShardSet] = {}
    for split, jobs in plan.jobs.items():
        if jobs:
            written[split] = write_set(
                out / split,
                chosen.kind,
                jobs,
                plan.make,
                jobs_per_shard=plan.jobs_per_shard,
                workers=workers,
                facts=_facts(chosen, split, seed) | {"labels": list(plan.labels)} | dict(plan.facts),
                console=console,
            )
    return written


def _check(chosen: OpenSet, limit: int | None, source: Path | None, resolution: int) -> None:
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} leaves nothing to build: give 1 or more")
    if not 1 <= resolution <= MAX_RESOLUTION:
        raise InputError(f"a resolution of {resolution} voxels: it must lie in 1..{MAX_RESOLUTION}")
    if source is not None and not chosen.takes_source:
        raise InputError(f"the set '{chosen.name}' is made from installed packages only, not from {source}")
    if source is not None and not source.exists():
        raise InputError(f"{source}: is not there; give {chosen.takes_source}")


def _facts(chosen: OpenSet, split: str, seed: int) -> dict[str, Any]:
    return {
        "set": chosen.name,
        "split": split,
        "split_rule": chosen.split,
        "licence": chosen.licence,
        "citation": chosen.citation,
        "source": ", ".join(package.name for package in chosen.packages),
        "captions": chosen.captions,
        "seed": seed,
    }
