"""What an evaluation is run on: a folder of files, shards, a store of assets, or the packaged test pictures.

A source lists its samples by number, so that any process can take its share and a resumed run can go on. Shards are
opened by other rooms, which name a function in the entry point group "atoken.readers"; the tokenizer knows none of
them.

In a folder, NAME.txt beside a picture, clip or asset holds its captions, one a line, and the folder that a file lies in
is its class.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tokenizer.assets.load import is_asset
from tokenizer.assets.views import TRANSFORMS_FILE, Views
from tokenizer.errors import InputError
from tokenizer.evaluation.command.identity import checksum, state_checksum, text_checksum
from tokenizer.evaluation.command.names import printable, told_apart
from tokenizer.evaluation.command.presets import Kind
from tokenizer.evaluation.command.stores import open_store
from tokenizer.training.asset_store import StoredAsset
from tokenizer.voxels import AssetSize

CAPTIONS = ".txt"
READERS = "atoken.readers"
PACKAGED = "packaged"
"""What --data calls the test pictures that come with scientific packages (`tokenizer.evaluation.nano`)."""


class PackedAsset(Protocol):
    """An asset that was packed before: voxels instead of a mesh.

    features: [N, 768] floating in [0, 1]; coordinates: [N, 3] integer; rule: how they were packed; views: unseen ones
    to compare with, of any square size.
    """

    @property
    def features(self) -> Tensor: ...
    @property
    def coordinates(self) -> Tensor: ...
    @property
    def size(self) -> AssetSize: ...
    @property
    def rule(self) -> str: ...
    @property
    def views(self) -> Views: ...


class RawSample(Protocol):
    """A sample before it is decoded.

    id: the same in every run and process, and that of no other sample. kind: what it is.
    content: a path, the bytes of a file, or an asset.
    captions, label: of it, where it has any. fault: why it cannot be read, else None; then content is empty bytes.
    """

    @property
    def id(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def content(self) -> Path | bytes | PackedAsset | StoredAsset: ...
    @property
    def captions(self) -> tuple[str, ...]: ...
    @property
    def label(self) -> str | None: ...
    @property
    def fault(self) -> str | None: ...
    def digest(self) -> str:
        """SHA-256 of what is measured."""
        ...


class Source(Protocol):
    """Samples by number, 0 to `len` - 1."""

    def __len__(self) -> int: ...

    def facts(self) -> dict[str, Any]:
        """What identifies the data and its contents, for JSON: "source", "samples", and checksums. A run goes on, or is
        given back, only where they are those of the first run."""
        ...

    def read(self, numbers: Sequence[int]) -> Iterable[RawSample]:
        """The samples of ascending numbers, one for each of them."""
        ...


Opener = Callable[[str], Source | None]
"""Opens what --data names, or says None if that is nothing of its own."""


@dataclass(frozen=True, slots=True)
class FileSample:
    """A file as a `RawSample`."""

    id: str
    kind: Kind
    content: Path
    captions: tuple[str, ...] = ()
    label: str | None = None
    fault: str | None = None

    def digest(self) -> str:
        """Of the file; of the description of views for an asset given as these."""
        return str(checksum(self.content))


class FileSource:
    """Files by name.

    Args:
        files: (id, path), in order; ids that repeat are told apart.
        name: what --data said.
        captions: by id, or by the file's name or stem; they come before those in .txt files.
    """

    def __init__(
        self, files: Sequence[tuple[str, Path]], name: str, captions: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        names = told_apart(name for name, _ in files)
        self._files = [(name, path) for name, (_, path) in zip(names, files, strict=True)]
        self._name, self._captions = name, dict(captions or {})

    def __len__(self) -> int:
        return len(self._files)

    def facts(self) -> dict[str, Any]:
        """Names and sizes make the listing; contents have their checksums in samples.jsonl.

        "state_sha256" tells that something was changed since: it is over the times of change of all that is read, that
        is samples, captions beside them, and textures or pictures of assets. A copied folder has another one.
        """
        lines = "\n".join(f"{name} {_size(path)}" for name, path in self._files)
        return {
            "source": self._name,
            "samples": len(self._files),
            "listing_sha256": text_checksum(lines),
            "state_sha256": state_checksum(self._all_files()),
        }

    def _all_files(self) -> Iterator[tuple[str, Path]]:
        """Everything that samples are read from, by name."""
        listed = set()
        for name, path in self._files:
            yield name, path
            yield f"{name} captions", path.with_suffix(CAPTIONS)
            if is_asset_of_files(path) and path.parent not in listed:
                listed.add(path.parent)
                for beside in sorted(path.parent.rglob("*")):
                    if beside.is_file():
                        yield f"{name} {beside.relative_to(path.parent)}", beside

    def read(self, numbers: Sequence[int]) -> Iterator[FileSample]:
        """See `Source`."""
        for number in numbers:
            name, path = self._files[number]
            parents = Path(name).parts[:-1]
            label = parents[-1] if parents else None
            try:
                sample = FileSample(name, file_kind(path), path, self._words(name, path), label)
            except Exception as error:  # whatever is wrong with one file, the others can be measured
                sample = FileSample(name, "image", path, fault=fault_line(error))
            yield sample

    def _words(self, name: str, path: Path) -> tuple[str, ...]:
        for key in (name, path.name, path.stem):
            if key in self._captions:
                return tuple(self._captions[key])
        beside = path.with_suffix(CAPTIONS)
        if not beside.is_file():
            return ()
        lines = beside.read_text(encoding="utf-8", errors="replace").splitlines()
        return tuple(line.strip() for line in lines if line.strip())


def fault_line(error: Exception) -> str:
    """Why a sample is left out, in one line; what nobody foresaw has the name of its class before it."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(filter(None, [str(error.filename or ""), error.strerror]))
    words = " ".join(str(error).split())
    return words if isinstance(error, InputError | OSError) and words else f"{type(error).__name__}: {words}"


def is_asset_of_files(path: Path) -> bool:
    """Whether an asset keeps a part of itself in other files of its folder: textures, or the pictures of its views."""
    return path.name == TRANSFORMS_FILE or path.suffix.lower() in (".obj", ".gltf")


def file_kind(path: Path) -> Kind:
    """What a file is, as far as its name and header tell; a broken one is what its ending says."""
    from tokenizer.media import media_kind

    if is_asset(path) or path.name == TRANSFORMS_FILE:
        return "asset"
    try:
        return media_kind(path)
    except InputError:
        return "image"


def open_source(spec: str, captions: Mapping[str, Sequence[str]] | None = None) -> Source:
    """What --data names: "packaged", shards (a reader of another room knows), a folder or a file.

    Raises:
        InputError: nothing there, nothing that can be measured, or captions for what has its own.
    """
    if spec == PACKAGED:
        from tokenizer.evaluation.nano import packaged_files

        return FileSource([(path.name, path) for path in packaged_files()], spec, captions)
    for entry in importlib.metadata.entry_points(group=READERS):
        opener: Opener = entry.load()
        found = opener(spec)
        if found is not None:
            return _with_own_words(found, spec, captions)
    path = Path(spec)
    if (store := open_store(path)) is not None:
        return _with_own_words(store, spec, captions)
    if path.is_dir():
        from tokenizer.cli.inputs import find_inputs

        return FileSource([(file.relative_to(path).as_posix(), file) for file in find_inputs(path)], spec, captions)
    if path.is_file():
        return FileSource([(path.name, path)], spec, captions)
    raise InputError(f"--data {spec}: no such folder or file; give a folder, shards, or '{PACKAGED}'")


def _with_own_words(source: Source, spec: str, captions: Mapping[str, Sequence[str]] | None) -> Source:
    """`source`; raises `InputError` if captions were given, which would be passed over."""
    if captions:
        raise InputError(f"--captions: {spec} holds the captions of its samples; they are of files and folders alone")
    return source


def read_captions(path: Path | None) -> dict[str, list[str]]:
    """A JSON file: {name of a file, with or without its ending: a caption or a list of them}.

    Raises:
        InputError: not such a file.
    """
    if path is None:
        return {}
    entries = _json_object(path, "captions")
    found = {name: [words] if isinstance(words, str) else words for name, words in entries.items()}
    for name, words in found.items():
        if (
            not isinstance(words, list)
            or not words
            or not all(isinstance(line, str) and line.strip() for line in words)
        ):
            raise InputError(f"{path}: captions of '{name}' must be text or a list of texts, got {words!r:.60}")
    return found


def read_labels(path: Path | None) -> dict[str, str] | None:
    """A JSON file: {class of a sample (its folder): name of the class in words}; the order of its classes is kept.

    Raises:
        InputError: not such a file.
    """
    if path is None:
        return None
    entries = _json_object(path, "labels")
    for label, name in entries.items():
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{path}: the name of class '{label}' must be text, got {name!r:.60}")
    return {printable(label): name for label, name in entries.items()}


def _size(path: Path) -> int:
    """Bytes of a file; 0 for one that is gone, which is left out when it is its turn."""
    return path.stat().st_size if path.is_file() else 0


def _json_object(path: Path, what: str) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--{what} {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"--{what} {path}: not readable as JSON ({' '.join(str(error).split())})") from None
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"--{what} {path}: must hold a JSON object of names and texts")
    return {name: printable(entry) for name, entry in entries.items()}
