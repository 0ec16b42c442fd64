"""What tells that files are those of an earlier run: checksums of small ones, sizes and times of change of many.

Times of change cost nothing beside reading a data set, and nobody edits a file without changing them. A copied folder
has other times, unless they were copied too (`cp -p`, `rsync -t`): it counts as changed, and is measured anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from tokenizer.fingerprint import weights_digest
from tokenizer.text.protocol import TextTower


def checksum(path: Path | None) -> str | None:
    """SHA-256 of a file; None for none."""
    if path is None:
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_checksum(text: str) -> str:
    """SHA-256 of text, which may hold names that are not UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def state_checksum(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 over names, sizes in bytes and times of change of files; a missing one counts as that."""
    return text_checksum("\n".join(f"{name} {_state(path)}" for name, path in files))


def folder_facts(path: Path) -> dict[str, Any]:
    """ "source" and "state_sha256" of a file, or of all files below a folder."""
    inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {"source": str(path), "state_sha256": state_checksum((str(file), file) for file in inside)}


def code_checksums(made: object, module: Any) -> dict[str, str | None]:
    """SHA-256 of the source files that an object's module and class are written in, by name.

    What they import, and weights that they load, are not looked at: they are too many to know.
    """
    found = [getattr(module, "__file__", None)]
    with contextlib.suppress(TypeError):  # a class that was made in C, or at a prompt
        found.append(inspect.getsourcefile(type(made)))
    paths = sorted({Path(file) for file in found if file is not None})
    return {path.name: checksum(path) for path in paths if path.is_file()}


def tower_facts(tower: TextTower) -> dict[str, Any]:
    """Name of a text tower, and a digest of the weights of each network that it holds."""
    parts = {name: part for name, part in getattr(tower, "__dict__", {}).items() if isinstance(part, nn.Module)}
    return {"name": tower.name, "weights": {name: weights_digest(part.state_dict()) for name, part in parts.items()}}


def _state(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "missing"
    return f"{found.st_size} {found.st_mtime_ns}"
