"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_LEFTOVER = re.compile(r"\..*\.[0-9a-f]{8}\.part(\.[^.]*)?(\.old)?")

_KEPT_OF_NAME = 40
"""Characters of the target's name in the temporary one, which must stay below the 255 bytes of most file systems."""


def temporary_beside(target: Path) -> Path:
    """A hidden name in the folder of `target`, with its ending, that nothing else uses."""
    return target.with_name(f".{target.stem[:_KEPT_OF_NAME]}.{uuid.uuid4().hex[:8]}.part{target.suffix}")


def remove_leftovers(folder: Path, mark: str) -> None:
    """Remove what killed processes left half written in a folder and those below it.

    Args:
        folder: where nobody else may write.
        mark: name of a file; folders below that hold it are somebody else's, and left alone with all that is in them.
    """
    for place, folders, files in os.walk(folder):
        if mark in files and Path(place) != folder:
            folders.clear()
            continue
        for name in filter(_LEFTOVER.fullmatch, [*folders, *files]):
            path = Path(place, name)
            if name in files or path.is_symlink():
                path.unlink(missing_ok=True)
            else:
                shutil.rmtree(path, ignore_errors=True)
        folders[:] = [name for name in folders if not _LEFTOVER.fullmatch(name)]


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` on success, remove it on any failure.

    The temporary name keeps the ending of `path`, because writers choose their format by it. The temporary path may
    become a file or a folder; an existing folder at `path` is replaced only after the new one is complete.

    Args:
        path: where the result shall appear. Missing parent folders are made. A link stays, and what it points to is
            replaced.

    Yields:
        The path to write to.

    Raises:
        OSError: as the writing raised it, naming `path`.
    """
    target = Path(os.path.realpath(path)) if Path(path).is_symlink() else Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    try:
        yield temporary
        if target.is_dir() and temporary.is_dir():
            # A folder cannot be renamed onto a full one: the old one steps aside and goes when the new one is there.
            old = temporary.with_name(temporary.name + ".old")
            target.rename(old)
            try:
                temporary.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.replace(target)
    except OSError as error:
        # Users know the file they asked for, not the temporary one; and a full disk comes without any name.
        unnamed = error.filename is None and error.errno in _NO_ROOM
        if unnamed or temporary.name in str(error.filename):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    finally:
        # After a successful rename nothing is left to remove; after a failure nothing half-written may stay.
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
