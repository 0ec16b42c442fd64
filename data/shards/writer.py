"""Sets of shards, written in parallel; the same bytes whatever the number of workers and however often it was killed.

While a set is being written, its folder holds

    unfinished.json         what is being written: the fingerprint ("plan") and facts, which a later run must share
    shard-000000.tar        whole as soon as it is there
    shard-000000.json       its sidecar, written after it: samples, bytes, checksum, what was skipped

and once all shards are there, `manifest.json` takes the place of the other JSON files. One process writes a set with
`write_set`. Several that share a folder call `begin_set`, then `write_shard` for their part of the names unless
`finished_shard` knows it, then `merge_set`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.samples import Kind
from data.shards import workers as processes
from data.shards.manifest import MANIFEST, Shard, ShardSet, Skipped, read_set, write_manifest
from data.shards.tarwriter import (
    Record,
    finished_shard,
    read_json,
    sidecar,
    sync_folder,
    to_json,
    write_json,
    write_shard,
)
from tokenizer.errors import InputError

__all__ = [
    "Record",
    "Skipped",
    "begin_set",
    "finished_shard",
    "merge_set",
    "plan_of",
    "shard_name",
    "write_set",
    "write_shard",
]

Job = TypeVar("Job")

UNFINISHED = "unfinished.json"

_FORMAT = "atoken-shards-plan"


def plan_of(kind: Kind, jobs: Iterable[object], facts: Mapping[str, Any], jobs_per_shard: int = 1) -> str:
    """Fingerprint of a set that is to be written: 64 hexadecimal digits that change with any argument.

    Args:
        jobs: each with a `repr` that says all there is to it (text, paths, numbers, dataclasses of such).

    Raises:
        InputError: facts that JSON cannot hold.
    """
    digest = hashlib.sha256(to_json({"kind": kind, "facts": facts, "jobs_per_shard": jobs_per_shard}, "facts").encode())
    for job in jobs:
        if type(job).__repr__ is object.__repr__:
            raise TypeError(f"{type(job).__name__} needs a __repr__ that tells one job from another")
        digest.update(f"\n{job!r}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def begin_set(out: Path, plan: str, facts: Mapping[str, Any]) -> ShardSet | None:
    """Make the folder `out` ready for the shards of a plan; several processes may call this at once.

    Returns:
        The set, where it is complete already; None where there is something left to write.

    Raises:
        InputError: `out` is a file, or holds anything of another plan, or tars that were not made here.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; name a folder")
    # In this order: others write the plan before tars, and the manifest before they remove the plan.
    has_tars = any(out.glob("*.tar"))
    begun = read_json(out / UNFINISHED, _FORMAT)
    if (out / MANIFEST).exists():
        return _complete(out, plan, facts)
    if begun is not None:
        _refuse_other(out, plan, facts, begun["plan"], begun["facts"])
    elif has_tars:
        raise InputError(f"{out}: holds tars that this command did not make; choose another folder")
    else:
        write_json(out / UNFINISHED, {"format": _FORMAT, "plan": plan, "facts": dict(facts)})
    return None


def merge_set(
    out: Path, kind: Kind, expected_names: Sequence[str], facts: Mapping[str, Any], *, plan: str = ""
) -> ShardSet | None:
    """Write the manifest once every expected shard is there; several processes may call this at once.

    Sidecars, shards without samples and what killed runs left half-written are removed.

    Args:
        expected_names: of the tars in `out`, in order.
        plan: what they were written under.

    Returns:
        The set; None while shards are missing.

    Raises:
        InputError: no shard has samples.
    """
    made = [entry for name in expected_names if (entry := finished_shard(out / name, plan=plan))]
    if (out / MANIFEST).exists():
        merged = _complete(out, plan, facts)  # another process was first, and may have removed sidecars already
    elif len(made) < len(expected_names):
        return None
    else:
        merged = _merged(out, kind, made, facts, plan)
        write_manifest(out / MANIFEST, merged)
    _tidy(out, expected_names, merged)
    return merged


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
    """Write a set of shards, or what an earlier run of the same arguments left to write.

    Args:
        out: the folder; made where it is missing.
        jobs: what samples are made from, in order; see `plan_of` for what they must be. Shard i holds those of
            jobs[i * jobs_per_shard : (i + 1) * jobs_per_shard].
        make: the samples of a job, in order, and what could not become one. With several workers it must be a function
            of a module, or another object that pickle takes. An exception ends the run.
        workers: processes.
        facts: how the set is made; part of the manifest.
        console: for progress and remarks; by default stderr.

    Raises:
        InputError: as `begin_set` and `write_shard`; nothing to do; no sample at all; a worker died.
    """
    if not jobs or jobs_per_shard < 1 or workers < 1:
        raise InputError(
            f"{out}: needs at least one job, job per shard and worker, got {len(jobs)}, {jobs_per_shard}, {workers}"
        )
    console = console or Console(stderr=True)
    plan = plan_of(kind, jobs, facts, jobs_per_shard)
    parts = [jobs[first : first + jobs_per_shard] for first in range(0, len(jobs), jobs_per_shard)]
    names = [shard_name(number) for number in range(len(parts))]
    if complete := begin_set(out, plan, facts):
        _tidy(out, names, complete)
        console.print(f"{out}: complete already, nothing to do", highlight=False, markup=False, soft_wrap=True)
        return complete
    todo = [number for number, name in enumerate(names) if finished_shard(out / name, plan=plan) is None]
    task = functools.partial(_write_part, out, parts, make, plan)
    try:
        with _progress(console) as progress:
            done = len(jobs) - sum(len(parts[number]) for number in todo)
            bar = progress.add_task(f"shards of {kind}", total=len(jobs), completed=done)
            for number, _ in processes.run(task, todo, workers, lambda number: str(out / names[number])):
                progress.advance(bar, len(parts[number]))
    except BaseException:
        _sweep(out, names)
        raise
    merged = merge_set(out, kind, names, facts, plan=plan)
    if merged is None:
        raise InputError(f"{out}: shards vanished while others were written; run the command again")
    return merged


def shard_name(number: int) -> str:
    """ "shard-000012.tar"."""
    return f"shard-{number:06d}.tar"


def _write_part(
    out: Path,
    parts: Sequence[Sequence[Job]],
    make: Callable[[Job], Iterable[Record | Skipped]],
    plan: str,
    number: int,
) -> tuple[Shard, list[Skipped]]:
    records = (record for job in parts[number] for record in make(job))
    return write_shard(out / shard_name(number), records, plan=plan)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _merged(
    out: Path, kind: Kind, made: Sequence[tuple[Shard, list[Skipped]]], facts: Mapping[str, Any], plan: str
) -> ShardSet:
    skipped = tuple(entry for _, entries in made for entry in entries)
    shards = tuple(shard for shard, _ in made if shard.samples)
    if not shards:
        reason = f" ({skipped[0].name}: {skipped[0].reason})" if skipped else ""
        raise InputError(f"{out}: nothing became a sample, {len(skipped)} were skipped{reason}")
    return ShardSet(kind, shards, dict(facts), skipped, plan)


def _complete(out: Path, plan: str, facts: Mapping[str, Any]) -> ShardSet:
    found = read_set(out)
    _refuse_other(out, plan, facts, found.plan, found.facts)
    return found


def _tidy(out: Path, names: Iterable[str], merged: ShardSet) -> None:
    """Remove what only an unfinished set needs; a run killed in the middle of this leaves some to the next."""
    kept = {shard.name for shard in merged.shards}
    for name in names:
        sidecar(out / name).unlink(missing_ok=True)
        if name not in kept:
            (out / name).unlink(missing_ok=True)
    _sweep(out, names)
    (out / UNFINISHED).unlink(missing_ok=True)
    sync_folder(out)


def _refuse_other(
    out: Path, plan: str, facts: Mapping[str, Any], found_plan: str, found_facts: Mapping[str, Any]
) -> None:
    if plan == found_plan:
        return
    # Facts as JSON gives them back: lists for tuples.
    wanted = json.loads(to_json(facts, "facts"))
    for name in sorted({*wanted, *found_facts}):
        if wanted.get(name) != found_facts.get(name):
            what = f"{name}: {found_facts.get(name)!r} there, {wanted.get(name)!r} now"
            break
    else:
        what = "the sources, their order or the size of shards changed"
    raise InputError(f"{out}: holds a set made with other arguments ({what}); remove it or choose another folder")


def _sweep(out: Path, names: Iterable[str]) -> None:
    """Remove what killed runs left half-written of these shards."""
    stems = {Path(name).stem for name in names}
    for path in out.glob(".*.part.*"):
        if path.name[1:].split(".")[0] in stems:
            path.unlink(missing_ok=True)
