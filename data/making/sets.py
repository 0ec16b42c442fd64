"""A folder of files -> a set of shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from data.making.captions import Captions
from data.making.media import key_of
from data.samples import Kind
from data.shards.manifest import ShardSet, Skipped
from data.shards.writer import Record, write_set
from tokenizer.assets.load import ASSET_ENDINGS
from tokenizer.assets.views import TRANSFORMS_FILE
from tokenizer.errors import InputError
from tokenizer.media import IMAGE_ENDINGS, VIDEO_ENDINGS

Make = Callable[[Path], Iterable[Record | Skipped]]

ENDINGS: dict[Kind, tuple[str, ...]] = {
    "images": IMAGE_ENDINGS,
    "videos": (*VIDEO_ENDINGS, ".gif"),
    "assets": (*ASSET_ENDINGS, TRANSFORMS_FILE),
}


def find_files(source: Path, kind: Kind) -> list[Path]:
    """All files of a kind below a folder, sorted; hidden files and folders are left out. A folder of views is found by
    its transforms.json.

    Raises:
        InputError: no folder, or nothing of the kind in it.
    """
    if not source.is_dir():
        raise InputError(f"{source}: is not a folder; shards are made from a folder of files")
    found = [
        path
        for path in sorted(source.rglob("*"))
        if path.name.lower().endswith(ENDINGS[kind])
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
    ]
    if not found:
        raise InputError(f"{source}: no {kind} in it ({', '.join(ENDINGS[kind])})")
    return found


def make_set(
    source: Path,
    out: Path,
    kind: Kind,
    make: Make,
    *,
    samples_per_shard: int,
    workers: int,
    facts: dict[str, Any],
    console: Console | None = None,
) -> ShardSet:
    """Shards of everything of a kind below a folder.

    Args:
        source: the folder.
        out: folder for the shards; an unfinished run of the same arguments is gone on with.
        make: a file -> its records; picklable.
        samples_per_shard: files whose records share a shard.
        workers: processes.
        facts: about the set, for its manifest: its licence, and whatever else changes what `make` gives.

    Raises:
        InputError: nothing to do, two files of one key, or `out` holds something else.
    """
    if out.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{out}: lies inside {source}, whose files it would hold; choose a folder outside")
    files = find_files(source, kind)
    _check_keys(source, files)
    return write_set(
        out,
        kind,
        files,
        make,
        jobs_per_shard=samples_per_shard,
        workers=workers,
        facts=facts,
        console=console,
    )


def _check_keys(source: Path, files: Iterable[Path]) -> None:
    """Told before anything is written, and with both names; a shard refuses a second sample of a key."""
    known: dict[str, str] = {}
    for file in files:
        name = (file.parent if file.name == TRANSFORMS_FILE else file).relative_to(source).as_posix()
        if (other := known.setdefault(key_of(name), name)) != name:
            raise InputError(
                f"{source}: {other} and {name} would both be the sample '{key_of(name)}'; rename or move one of them"
            )


def captions_for(source: Path, table: Path | None, *, labels_by_folder: bool) -> Captions:
    """See `data.making.captions`.

    Raises:
        InputError: as there, or a table that was asked for and names no file of the folder.
    """
    found = Captions.of(source, table, "folder" if labels_by_folder else "none")
    if table is not None and source.is_dir() and not any((source / name).exists() for name in found.table):
        named = f"names no file below {source}: '{next(iter(found.table))}' is not there" if found.table else "is empty"
        raise InputError(f"{table}: {named}; file names are relative to the folder")
    return found
