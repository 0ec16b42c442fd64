"""From arguments to jobs: files, folders and globs -> pairs of a source and where its result goes.

A single file goes to exactly the path that `--out` names, if that has an ending. Everything else goes below the folder
`--out`, keeping the tree below each folder given, and below the fixed part of each glob.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizer.errors import InputError


@dataclass(frozen=True)
class Job:
    """One file to work on.

    source: the file; not checked, because a broken one must not stop the others.
    target: path of the result. Where it `needs_ending`, the ending follows from what the source holds.
    """

    source: Path
    target: Path
    needs_ending: bool


def plan_jobs(arguments: Sequence[str], out: Path, find: Callable[[Path], list[Path]], *, exact: bool) -> list[Job]:
    """Decide what is read and where the results go.

    Args:
        arguments: files, folders, and globs that the shell left alone.
        out: the path given with --out.
        find: all files of interest below a folder.
        exact: whether `out` names the result of a single file itself, not a folder.

    Raises:
        InputError: nothing matches, `out` is one file for several inputs, two results would be the same file, or a
            result would replace its source.
    """
    sources = _expand(arguments, find)
    single = len(arguments) == 1 and not Path(arguments[0]).is_dir() and len(sources) == 1
    if single and exact:
        jobs = [Job(sources[0][0], out, needs_ending=False)]
    else:
        if out.is_file() or exact:
            raise InputError(f"--out {out}: is one file for {len(sources)} inputs; name a folder")
        jobs = [Job(source, out / relative.with_suffix(""), needs_ending=True) for source, relative in sources]
    _refuse_collisions(jobs)
    return jobs


def refuse_own_source(job: Job, target: Path) -> None:
    """Raise `InputError` if `target` is the file that the job reads."""
    if target.exists() and job.source.exists() and target.samefile(job.source):
        raise InputError(f"{target}: the result would replace its own source; choose another --out")


def _expand(arguments: Sequence[str], find: Callable[[Path], list[Path]]) -> list[tuple[Path, Path]]:
    """(file, path of the result relative to --out) for all arguments."""
    files: list[tuple[Path, Path]] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            # Several folders keep their names, so that their files do not mix.
            base = path if len(arguments) == 1 else path.resolve().parent
            root = path if len(arguments) == 1 else path.resolve()
            files += [(file, file.relative_to(base)) for file in find(root)]
        elif glob.has_magic(argument) and not path.exists():
            files += _matches(argument)
        else:
            files.append((path, Path(path.name)))
    return list(dict.fromkeys(files))


def _matches(pattern: str) -> list[tuple[Path, Path]]:
    parts = Path(pattern).parts
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:fixed])
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if Path(match).is_file()]  # noqa: PTH207
    if not matches:
        raise InputError(f"{pattern}: no file matches")
    return [(match, match.relative_to(base)) for match in matches]


def _refuse_collisions(jobs: list[Job]) -> None:
    by_target: dict[Path, Job] = {}
    for job in jobs:
        first = by_target.setdefault(job.target, job)
        if first is not job:
            raise InputError(
                f"{first.source} and {job.source} would both become {job.target}; give them to separate commands"
            )
