"""One run in a folder at a time: two would write the same files, and remove each other's checkpoints.

A process that was killed lets go by itself. One that goes on unnoticed, after its launcher was killed, does not.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizer.errors import InputError

LOCK = ".lock"
"""File in a run's folder that its first process holds. It stays; what counts is who holds it."""

_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Inside, no other run can come in here; where the file system knows no locks, one can.

    Raises:
        InputError: another run is in there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            # Of the process, not of the open file: children that outlive it hold nothing.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                file.seek(0)
                raise InputError(
                    f"{folder}: another run is writing here ({file.read().strip() or 'unknown'}); wait for it, stop "
                    "it, or choose another folder"
                ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
