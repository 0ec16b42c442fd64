"""Rendered assets from a store (`python -m data.sources.furniture`): its evaluation split, as an evaluation reads it.

A store holds the views that a model sees, with depth, and others to compare with, so nothing has to be rendered.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer.config import read_mapping
from tokenizer.errors import InputError
from tokenizer.evaluation.command.identity import checksum, state_checksum, text_checksum
from tokenizer.evaluation.command.names import told_apart
from tokenizer.evaluation.command.presets import Kind
from tokenizer.training.asset_store import StoredAsset, read_store

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class StoreSample:
    """An asset of a store as a `RawSample`. Its name is its caption, its category its class."""

    id: str
    content: StoredAsset
    captions: tuple[str, ...]
    label: str | None
    kind: Kind = "asset"
    fault: str | None = None

    def digest(self) -> str:
        """Of the file."""
        return str(checksum(self.content.file))


class StoreSource:
    """The evaluation split of a store.

    Args:
        folder: with manifest.json.

    Raises:
        InputError: no store, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._assets = folder, read_store(folder, "evaluation")
        self._names = told_apart(os.path.relpath(asset.file, folder) for asset in self._assets)

    def __len__(self) -> int:
        return len(self._assets)

    def facts(self) -> dict[str, Any]:
        """See `Source`. "state_sha256" is over sizes and times of change; a copied store has another one."""
        words = [f"{asset.name} {asset.category}" for asset in self._assets]
        lines = "\n".join(f"{name} {said}" for name, said in zip(self._names, words, strict=True))
        files = [asset.file for asset in self._assets]
        return {
            "source": str(self._folder),
            "split": "evaluation",
            "samples": len(self),
            "listing_sha256": text_checksum(lines),
            "state_sha256": state_checksum(zip(self._names, files, strict=True)),
        }

    def read(self, numbers: Sequence[int]) -> Iterator[StoreSample]:
        """See `Source`."""
        for number in numbers:
            asset = self._assets[number]
            yield StoreSample(self._names[number], asset, (asset.name,), asset.category or None)


def open_store(folder: Path) -> StoreSource | None:
    """The store in a folder; None if there is none."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        is_store = "models" in read_mapping(folder / MANIFEST)
    except InputError:
        return None
    return StoreSource(folder) if is_store else None
