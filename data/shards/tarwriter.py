"""One shard and its sidecar: a tar that depends on its samples alone, and what a later run needs to trust it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data.shards.manifest import Shard, Skipped
from data.shards.tar import BLOCK
from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError

_FORMAT = "atoken-shard"
_EXTENSION = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

KEYS = "keys are relative paths whose last part has no dot, without control characters"


@dataclass(frozen=True, slots=True)
class Record:
    """A sample to write.

    key: what its files are called up to the first dot; may have folders ("train/000017").
    files: contents by extension, in lower case ("jpg", "voxels.safetensors"); not "json".
    facts: become KEY.json.
    """

    key: str
    files: Mapping[str, bytes]
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_shard(path: Path, records: Iterable[Record | Skipped], *, plan: str = "") -> tuple[Shard, list[Skipped]]:
    """Write one tar, and its sidecar after it; each appears whole or not at all.

    The bytes depend on the records alone: no times, no owners, the files of a sample sorted, KEY.json last.

    Args:
        path: ends in .tar; replaced where it exists.
        records: samples in order, and what could not become one.
        plan: fingerprint of what is being written, for `finished_shard`.

    Raises:
        InputError: a key or extension that readers would take for another, a key that is there twice, or facts that
            JSON cannot hold.
    """
    if path.suffix != ".tar":
        raise InputError(f"{path}: a shard is called NAME.tar")
    sidecar(path).unlink(missing_ok=True)  # it would vouch for the new tar
    skipped: list[Skipped] = []
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        tar = _TarWriter(file)
        for record in records:
            if isinstance(record, Skipped):
                skipped.append(record)
            else:
                tar.add(record)
        tar.finish()
    shard = Shard(str(path), len(tar.keys), tar.bytes, tar.sha256)
    facts = {"format": _FORMAT, "plan": plan, "samples": shard.samples, "bytes": shard.bytes}
    write_json(sidecar(path), {**facts, "sha256": shard.sha256, "skipped": [asdict(entry) for entry in skipped]})
    sync_folder(path.parent)
    return shard, skipped


def finished_shard(path: Path, *, plan: str = "") -> tuple[Shard, list[Skipped]] | None:
    """What `write_shard` returned for `path` in an earlier run; None where it was not finished.

    Raises:
        InputError: it was written under another plan.
    """
    side = read_json(sidecar(path), _FORMAT)
    if side is None or not path.is_file() or path.stat().st_size != side["bytes"]:
        return None
    if side["plan"] != plan:
        raise InputError(f"{path}: made with other arguments; remove the folder or choose another one")
    shard = Shard(str(path), side["samples"], side["bytes"], side["sha256"])
    return shard, [Skipped(**entry) for entry in side["skipped"]]


def sidecar(path: Path) -> Path:
    """Where what is known about the tar `path` lies until its set is complete."""
    return path.with_suffix(".json")


def to_json(value: Mapping[str, Any], what: str) -> str:
    """One line of ASCII, keys sorted; `what` names it in the `InputError` for values that JSON does not have."""
    try:
        return json.dumps(dict(value), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{what}: facts that JSON cannot hold ({' '.join(str(error).split())})") from None


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a file that is whole or not there, also after a power cut."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(to_json(document, path.name) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path, kind: str) -> dict[str, Any] | None:
    """None where it is missing; a file of something else is not to be overwritten.

    Raises:
        InputError: not what this module wrote.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("format") != kind:
        raise InputError(f"{path}: not written by this command; remove it or choose another folder")
    return document


def sync_folder(folder: Path) -> None:
    """Make renames last through a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _TarWriter:
    """Appends samples to a tar and keeps count, length and checksum of what it wrote."""

    def __init__(self, file: BinaryIO) -> None:
        self.keys: set[str] = set()
        self.bytes = 0
        self._file, self._digest = file, hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def add(self, record: Record) -> None:
        _check_key(record.key, self.keys)
        self.keys.add(record.key)
        for extension in sorted(record.files):
            if not is_extension(extension) or extension == "json":
                raise InputError(f"sample '{record.key}': '{extension}' cannot be the extension of a file in a shard")
            self._add_file(f"{record.key}.{extension}", record.files[extension])
        self._add_file(f"{record.key}.json", to_json(record.facts, f"sample '{record.key}'").encode())

    def finish(self) -> None:
        self._write(bytes(2 * BLOCK))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _add_file(self, name: str, contents: bytes) -> None:
        entry = tarfile.TarInfo(name)  # of time 0, owner 0 and mode 644
        entry.size = len(contents)
        self._write(entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        self._write(contents)
        self._write(bytes(-len(contents) % BLOCK))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


def is_key(key: str) -> bool:
    """Whether readers and those who unpack a shard would take files of this key for what they are (see `KEYS`)."""
    parts = key.split("/")
    return not (any(part in ("", ".", "..") for part in parts) or "." in parts[-1] or _CONTROL.search(key))


def is_extension(extension: str) -> bool:
    """Whether a file of a sample may be called so behind its key."""
    return _EXTENSION.fullmatch(extension) is not None


def _check_key(key: str, others: set[str]) -> None:
    if not is_key(key):
        raise InputError(f"sample {key!r}: {KEYS}")
    if key in others:
        raise InputError(f"sample '{key}': there is another one of this key in its shard")
