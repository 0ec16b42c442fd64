"""Which files of a package are pictures, which of them are photographs, and which show the same thing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

# Scenes in front of a lens; everything else is drawn, printed or computed.
_PHOTOGRAPHS = re.compile(
    r"nature/.*\.jpg|backgrounds/(?!analogpattern|umang|Fossa|Infinite|Painting).*_by_.*\.jpg"
    r"|data/(brick|camera|coins|grass|gravel|hubble_deep_field|ihc|moon|motorcycle_left|motorcycle_right|retina)\..*"
)
_ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".jxl", ".svg", ".gif", ".tif", ".bmp"})
SIZE_SUFFIX = re.compile(r"_\d+x\d+$")
"""How wallpapers name their resolution, at the end of the name without its ending."""


def short_name(path: Path) -> str:
    """The file and its folder: "nature/Dune.jpg"."""
    return "/".join(path.parts[-2:])


def is_picture(path: Path) -> bool:
    """Whether the ending is that of a picture, readable here or not."""
    return path.suffix.lower() in _ENDINGS


def is_photograph(path: Path) -> bool:
    """Whether a file of the packages for training is known to show a scene in front of a lens."""
    return _PHOTOGRAPHS.fullmatch(short_name(path)) is not None


def largest_of_each(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Keep one resolution (the largest file) of each picture; returns (kept, left out)."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(SIZE_SUFFIX.sub("", str(path.with_suffix(""))), []).append(path)
    kept = [max(group, key=lambda path: path.stat().st_size) for group in groups.values()]
    return kept, [path for path in paths if path not in kept]
