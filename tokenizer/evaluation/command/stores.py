"""Rendered assets from a store (`python -m data.sources.furniture`): its evaluation split, as an evaluation reads it.

A store holds the views that a model sees, with depth, and others to compare with, so nothing has to be rendered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer.config import read_mapping
from tokenizer.errors import InputError
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
        with self.content.file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class StoreSource:
    """The evaluation split of a store.

    Args:
        folder: with manifest.json.

    Raises:
        InputError: no store, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._assets = folder, read_store(folder, "evaluation")

    def __len__(self) -> int:
        return len(self._assets)

    def facts(self) -> dict[str, Any]:
        """See `Source`."""
        lines = "\n".join(f"{asset.file.name} {asset.name}" for asset in self._assets)
        listing = hashlib.sha256(lines.encode()).hexdigest()
        return {"source": str(self._folder), "split": "evaluation", "samples": len(self), "listing_sha256": listing}

    def read(self, numbers: Sequence[int]) -> Iterator[StoreSample]:
        """See `Source`."""
        for asset in (self._assets[number] for number in numbers):
            yield StoreSample(asset.file.name, asset, (asset.name,), asset.category or None)


def open_store(folder: Path) -> StoreSource | None:
    """The store in a folder; None if there is none."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        is_store = "models" in read_mapping(folder / MANIFEST)
    except InputError:
        return None
    return StoreSource(folder) if is_store else None
