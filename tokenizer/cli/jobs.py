"""From arguments to jobs: files, folders and globs -> pairs of a source and where its result goes.

A single file, or folder of views, goes to exactly the path that `--out` names, if that has an ending. Everything else
goes below the folder `--out`, keeping the tree below each folder given, and below the fixed part of each glob.
"""

from __future__ import annotations

import glob
import os
import stat
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

    def target_with(self, ending: str) -> Path:
        """The result, with `ending` if it needs one."""
        return self.target.with_name(self.target.name + ending) if self.needs_ending else self.target


def plan_jobs(
    arguments: Sequence[str],
    out: Path,
    find: Callable[[Path], list[Path]],
    *,
    exact: bool,
    results: Callable[[Job], Sequence[Path]] = lambda _: (),
) -> list[Job]:
    """Decide what is read and where the results go.

    Args:
        arguments: files, folders, and globs that the shell left alone.
        out: the path given with --out.
        find: all files of interest below a folder.
        exact: whether `out` names the result of a single file itself, not a folder.
        results: every file that a job will write, as far as it can be known beforehand.

    Raises:
        InputError: nothing matches, an input is a pipe or device, `out` is one file for several inputs, two results
            would be the same file, or a result would replace the source of another.
    """
    sources = _expand(arguments, find)
    for source, _ in sources:
        refuse_stream(source)
    folder = Path(arguments[0]).is_dir() and not (len(sources) == 1 and sources[0][0].parent == Path(arguments[0])
                                                  and _is_views(sources[0][0]))  # fmt: skip
    single = len(arguments) == 1 and not folder and len(sources) == 1
    if single and exact:
        jobs = [Job(sources[0][0], out, needs_ending=False)]
    else:
        if out.is_file() or exact:
            many = f"{len(sources)} inputs" if len(sources) > 1 else "a folder of inputs" if folder else "its input"
            raise InputError(f"--out {out}: is one file for {many}; name a folder")
        jobs = [Job(source, out / _result_name(source, place), needs_ending=True) for source, place in sources]
    _refuse_collisions(jobs, results)
    return jobs


def refuse_stream(path: Path) -> None:
    """Raise `InputError` for a pipe or a device: files are read more than once, and from any place."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # reported when it is its turn
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a pipe or a device; save what comes from it to a file and give that")


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


def _is_views(file: Path) -> bool:
    from tokenizer.assets.views import TRANSFORMS_FILE

    return file.name == TRANSFORMS_FILE


def _result_name(source: Path, place: Path) -> Path:
    """The result below --out, without its ending. Views are named after their folder."""
    if not _is_views(source):
        return place.with_suffix("")
    return place.parent if place.parent.name else Path(source.resolve().parent.name or place.stem)


def _refuse_collisions(jobs: list[Job], results: Callable[[Job], Sequence[Path]]) -> None:
    sources = {os.path.realpath(job.source): job for job in jobs}
    by_target: dict[Path, Job] = {}
    for job in jobs:
        for target in dict.fromkeys((job.target, *results(job))):
            first = by_target.setdefault(target, job)
            if first is not job:
                raise InputError(
                    f"{first.source} and {job.source} would both become {target}; give them to separate commands"
                )
            other = sources.get(os.path.realpath(target), job)
            if os.path.realpath(other.source) != os.path.realpath(job.source):
                raise InputError(
                    f"{target}: the result of {job.source} would replace the input {other.source}; choose another --out"
                )
