"""The training store on disk: numpy arrays and one manifest that says where each came from.

Layout: `images/NNNN.npy` uint8 [H, W, 3], `clips/NNNN.npy` uint8 [T, H, W, 3], and `manifest.json`:

    {"format": 1, "seed": 0, "arguments": {...}, "arrays": [...], "skipped": [...], "missing_packages": [...]}

Every entry of `arrays` has `path` (inside the store), `kind`, `source` (package), `file` (one name, or a list where
several were combined), `licence`, `split` (always "train") and `size` (the array's shape without the channels).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
Pixels = NDArray[np.uint8]


@dataclass
class StoreWriter:
    """Writes arrays into a folder and collects the manifest.

    Attributes:
        root: the folder, which must not hold a store yet.
        arrays: manifest entries of what was written.
        skipped: files left out, each with the reason.
    """

    root: Path
    arrays: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    num_bytes: int = 0
    _count: dict[str, int] = field(default_factory=lambda: {"images": 0, "clips": 0})

    def add(self, pixels: Pixels, kind: str, source: str, file: str | list[str], licence: str, **extra: Any) -> None:
        """Store one array: [H, W, 3] as an image, [T, H, W, 3] as a clip.

        Args:
            pixels: uint8, RGB.
            kind: "photograph", "picture", "stamp", "film", "game" or "camera_motion".
            source: name of the package the pixels come from (several joined by " + ").
            file: the file or files, relative to the package.
            licence: licence of the pixels.
            extra: further manifest fields, e.g. the frame stride.
        """
        assert pixels.dtype == np.uint8, pixels.dtype
        assert pixels.shape[-1] == 3, pixels.shape
        folder = "images" if pixels.ndim == 3 else "clips"
        path = f"{folder}/{self._count[folder]:04d}.npy"
        self._count[folder] += 1
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        np.save(self.root / path, np.ascontiguousarray(pixels))
        self.num_bytes += pixels.nbytes
        entry = {"path": path, "kind": kind, "source": source, "file": file, "licence": licence, "split": "train"}
        self.arrays.append({**entry, "size": list(pixels.shape[:-1]), **extra})

    def skip(self, source: str, file: str, reason: str) -> None:
        """Note that `file` of package `source` was left out, and why."""
        self.skipped.append({"source": source, "file": file, "reason": reason})

    def finish(self, **header: Any) -> None:
        """Write manifest.json; `header` joins its top level."""
        manifest = {"format": FORMAT, **header, "arrays": self.arrays, "skipped": self.skipped}
        (self.root / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
