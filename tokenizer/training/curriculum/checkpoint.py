"""Checkpoints of a run: folders that are whole or not there, found again by themselves, a few of them kept.

    out/checkpoints/step-001000/
        weights.pt     parameters, their averages and the optimizer's moments, by parameter name: any engine reads them
        loop.json      steps done, settings, counts of bad steps, the best so far, loader states of all processes
        shards/        in place of some of the above, of engines that write in all processes (`ShardedEngine`)
        manifest.json  sizes and CRC-32s of the others

A folder is written under a hidden name and renamed, so a killed run leaves no half of one. What a disk has spoilt later
is noticed by the checksums: the checkpoint before is taken then, and one line says so. The spoilt ones keep their
contents under other names (step-001000.damaged). What only cannot be read now, for want of rights or of a file server,
is not spoilt: the run ends and leaves everything as it is.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError
from tokenizer.tensorio import write_pt

CHECKPOINTS = "checkpoints"
"""Folder in that of a run."""

WEIGHTS, LOOP, MANIFEST = "weights.pt", "loop.json", "manifest.json"

DAMAGED = ".damaged"
"""What the names of spoilt checkpoints get."""

SHARDS = "shards"
"""Folder in that of a checkpoint."""

_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True)
class Weights:
    """What another run may start from.

    settings: of the run, as `config_to_dict` gave them. average: averaged weights. alignment: settings of the text
    alignment, where there is one.
    """

    settings: dict[str, Any]
    average: dict[str, Tensor]
    alignment: dict[str, Any] | None


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the checkpoints.
        keep_last: how many of the newest stay; the best stays beside them.
        say: shows a line.
    """

    def __init__(self, folder: Path, keep_last: int, say: Callable[[str], None]) -> None:
        self.folder, self.keep_last, self._say = folder, keep_last, say

    def pending(self, step: int) -> Path:
        """Where all processes put the shards of the checkpoint of `step` steps, before `save`."""
        return self.folder / f"step-{step:06d}.{SHARDS}"

    def save(self, step: int, tensors: Mapping[str, Any], loop: Mapping[str, Any], best: int | None) -> None:
        """Write the checkpoint of `step` steps, and remove those that are kept no longer.

        Args:
            tensors: of the engine (`Engine.state_dict`).
            loop: plain values for JSON.
            best: steps of the best one.

        Shards that are pending move in.
        """
        with atomic_path(self.folder / f"step-{step:06d}") as new:
            new.mkdir()
            write_pt(dict(tensors), new / WEIGHTS)
            (new / LOOP).write_text(json.dumps(loop, allow_nan=False), encoding="utf-8")
            if self.pending(step).is_dir():
                self.pending(step).rename(new / SHARDS)
            files = {str(path.relative_to(new)): _measure(path) for path in sorted(new.rglob("*")) if path.is_file()}
            (new / MANIFEST).write_text(json.dumps({"step": step, "files": files}), encoding="utf-8")
        self._prune({step, best})

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole, or none; newer ones are damaged, and set aside.

        Raises:
            InputError: as `newest_good`.
        """
        newest = newest_good(self.folder, self._say)
        for _, path in _newest_first(self.folder):
            if path == newest:
                break
            aside = path.with_name(path.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        return newest

    def clean(self) -> None:
        """Remove what a killed run left half written."""
        patterns = (".step-*.part", ".step-*.part.old", f"step-*.{SHARDS}", f".step-*.{SHARDS}.old")
        for path in chain.from_iterable(self.folder.glob(pattern) for pattern in patterns):
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self, kept: Container[int | None]) -> None:
        """Remove all but the last ones and those of `kept` steps."""
        for place, (step, path) in enumerate(_newest_first(self.folder)):
            if place >= self.keep_last and step not in kept:
                shutil.rmtree(path, ignore_errors=True)


def newest_good(folder: Path, say: Callable[[str], None] | None = None) -> Path | None:
    """The newest whole checkpoint in `folder`, or none where there are no checkpoints.

    Args:
        say: hears of damaged ones that were passed over.

    Raises:
        InputError: one that cannot be read, or damaged ones and no other.
    """
    damage: list[str] = []
    for _, path in _newest_first(folder):
        reason = damage_of(path)
        if reason is None:
            if damage and say is not None:
                say(f"{'; '.join(damage)}; going on from {path.name}")
            return path
        damage.append(f"{path} is damaged ({reason})")
    if damage:
        raise InputError(f"{'; '.join(damage)}; no whole checkpoint is left: remove {folder} to start anew")
    return None


def step_of(checkpoint: Path) -> int:
    """How many steps a checkpoint is of, by its name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole.

    Raises:
        InputError: it cannot be read now.
    """
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name in dict.fromkeys((WEIGHTS, LOOP, *files)):
            if _measure(path / name) != files[name]:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except OSError as error:
        raise _unreadable(error, path) from None
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is unreadable"
    return None


def read_loop(path: Path) -> dict[str, Any]:
    """The plain values of a whole checkpoint."""
    values: dict[str, Any] = json.loads((path / LOOP).read_text(encoding="utf-8"))
    return values


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a whole checkpoint, mapped from the file.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        state: dict[str, Any] = torch.load(path / WEIGHTS, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load has no common error type for damaged files
        raise InputError(
            f"{path / WEIGHTS}: is as it was written, but cannot be read here ({type(error).__name__}); see that there "
            "is memory, and a version of torch no older than that which wrote it"
        ) from None
    return state


def read_weights(path: Path) -> Weights:
    """What another run may start from, of a whole checkpoint."""
    loop, tensors = read_loop(path), read_tensors(path)
    average = {name: tensor.clone() for name, tensor in {**tensors["buffers"], **tensors["average"]}.items()}
    return Weights(settings=loop["settings"], average=average, alignment=loop["alignment"])


def _newest_first(folder: Path) -> Iterator[tuple[int, Path]]:
    """Steps and paths of the checkpoints in `folder`.

    Raises:
        InputError: the folder cannot be read now. `glob` would find nothing in it, and a run begin anew.
    """
    try:
        found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    except FileNotFoundError:
        found = []
    except OSError as error:
        raise _unreadable(error, folder) from None
    return iter(sorted(found, reverse=True))


def _unreadable(error: OSError, path: Path) -> InputError:
    return InputError(f"{error.filename or path}: cannot be read: {error.strerror}; mend that and start again")


def _measure(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file."""
    crc = size = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return {"bytes": size, "crc32": crc}
