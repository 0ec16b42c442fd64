"""The folder of a recording: `README.json` and the tensors it names, with a memory of what was read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenizer.errors import InputError

_SUFFIX = ".safetensors"
_REFERENCE = re.compile(r"([A-Za-z_]\w*):([\w.]*\w)")


@dataclass
class RecordedFile:
    """One safetensors file of a recording.

    name: without the ending.
    note: what `README.json` says about it.
    listed: name -> (dtype, shape) as `README.json` lists them; None if the file is not listed at all.
    tensors: what is in the file.
    read: names of tensors that some computation took as its input.
    """

    name: str
    note: str
    listed: Mapping[str, tuple[str, tuple[int, ...]]] | None
    tensors: dict[str, Tensor]
    read: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str) -> Tensor:
        """A tensor to compute with.

        Raises:
            InputError: the file has no such tensor.
        """
        if name not in self.tensors:
            raise InputError(f"{self.name} has no tensor '{name}'")
        self.read.add(name)
        return self.tensors[name]


class Recording:
    """A folder in the layout of FORMAT 16.

    Args:
        folder: where `README.json` lies.

    Raises:
        InputError: not a recording: no folder, no readable `README.json`, or one without files and configurations.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.readme = _read_readme(folder)
        self.configs: Mapping[str, Mapping[str, Any]] = self.readme["configs"]
        self.listed: Mapping[str, Mapping[str, Any]] = self.readme["files"]
        self.files: dict[str, RecordedFile] = {}
        self.problems: dict[str, str] = {}
        listed = {name.removesuffix(_SUFFIX) for name in (*self.listed, *self.readme.get("sha256", {}))}
        present = {path.name.removesuffix(_SUFFIX) for path in folder.glob(f"*{_SUFFIX}")}
        for name in sorted(listed | present):
            self._open(name)

    def _open(self, name: str) -> None:
        path = self.folder / f"{name}{_SUFFIX}"
        if not path.is_file():
            self.problems[name] = "missing: README.json names it"
            return
        entry = self.listed.get(name, self.listed.get(path.name))
        if entry is None:
            self.problems[name] = "README.json does not describe this file"
        elif "sha256" in self.readme:
            self._verify(path)
        try:
            with safe_open(path, framework="pt") as content:
                tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            self.problems[name] = f"unreadable: {' '.join(str(error).split())}"
            return
        self.files[name] = RecordedFile(
            name=name,
            note=str((entry or {}).get("note", "")),
            listed=None if entry is None else _listed_tensors(entry),
            tensors=tensors,
        )

    def _verify(self, path: Path) -> None:
        expected = self.readme["sha256"].get(path.name)
        if expected is None:
            self.problems[path.stem] = "README.json has no sha256 for it"
        elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            self.problems[path.stem] = "its sha256 differs from README.json"

    @property
    def rounded_names(self) -> tuple[str, ...]:
        """Patterns of f64/ names that the conventions say were stored rounded to float32, without the prefix."""
        for line in self.readme.get("conventions", []):
            found = re.search(r"([\w./*]+) of these are rounded", str(line))
            if found:
                return tuple(found.group(1).split("/"))
        return ()

    def references(self, file: RecordedFile) -> list[tuple[RecordedFile, str]]:
        """Tensors of other files that a note refers to, as FILE:TENSOR, in order."""
        found = []
        for name, key in _REFERENCE.findall(file.note):
            if name in self.files and key in self.files[name]:
                found.append((self.files[name], key))
        return found

    def model_of(self, file: RecordedFile) -> str:
        """The configuration that a note names, as "model NAME".

        Raises:
            InputError: it names none, or one that `README.json` does not have.
        """
        found = re.search(r"\bmodel (\w+)", file.note)
        if found is None:
            raise InputError(f"the note of {file.name} in README.json does not say which model it is of")
        if found.group(1) not in self.configs:
            raise InputError(
                f"the note of {file.name} names model '{found.group(1)}', which README.json has no config of"
            )
        return found.group(1)

    def weights_of(self, model: str) -> RecordedFile:
        """The state file of a model; sod uses that of soc where `README.json` says that they are shared.

        Raises:
            InputError: the file is missing.
        """
        shared = model == "sod" and self.readme.get("sod_shares_soc_weights", False)
        for name in (f"state_{model}", *(["state_soc"] if shared else [])):
            if name in self.files:
                return self.files[name]
        raise InputError(f"the weights of model {model} are missing: state_{model}{_SUFFIX}")


def _read_readme(folder: Path) -> dict[str, Any]:
    path = folder / "README.json"
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder; give the folder of a recording")
    if not path.is_file():
        raise InputError(f"{folder}: not a recording, it has no README.json")
    try:
        readme = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(readme, dict) or not all(isinstance(readme.get(key), dict) for key in ("files", "configs")):
        raise InputError(f"{path}: not the README.json of a recording, it lacks 'files' or 'configs'")
    return readme


def _listed_tensors(entry: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(kind), tuple(shape)) for name, (kind, shape) in entry.get("tensors", {}).items()}
