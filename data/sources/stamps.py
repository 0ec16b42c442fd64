"""Stamps of Tux Paint: captioned cut-outs with transparency, many of them photographs. For training only.

Nothing of them is to be redistributed, so all are for training and no evaluation split exists.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from data.shards.manifest import Skipped
from data.shards.writer import Record
from data.sources.packages import STAMPS
from data.sources.sets import OpenSet, Options, Plan, mixed, record, slug

PER_SHARD = 64
MIN_SIDE = 16
_FOLDER = "stamps"


@dataclass(frozen=True, slots=True)
class _Job:
    path: Path

    @property
    def inside(self) -> Path:
        """The path below the folder of all stamps: "animals/birds/blackbird.png"."""
        parts = self.path.parts
        start = max((number for number, part in enumerate(parts) if part == _FOLDER), default=len(parts) - 3)
        return Path(*parts[start + 1 :])

    @property
    def label(self) -> str:
        return self.inside.parts[0].replace("_", " ")


def read_caption(path: Path) -> str | None:
    """The first line of a stamp's text, its English description; the others are translations ("fr.utf8=...")."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return lines[0].strip() or None if lines else None


def _make(job: _Job) -> Iterator[Record | Skipped]:
    name = job.inside.as_posix()
    try:
        contents = job.path.read_bytes()
        with Image.open(io.BytesIO(contents)) as picture:
            picture.load()
            if min(picture.size) < MIN_SIDE:
                yield Skipped(name, f"smaller than {MIN_SIDE} pixels")
                return
    except UnidentifiedImageError:
        yield Skipped(name, "Pillow does not know what it is")
        return
    except OSError as error:
        yield Skipped(name, f"cannot be read: {error}")
        return
    facts = {"label": job.label, "file": name, "licence": STAMPS.licence, "source": STAMPS.name}
    text = read_caption(job.path.with_suffix(".txt"))
    yield record(slug(str(job.inside.with_suffix(""))), {"png": contents}, text, **facts)


def _plan(options: Options) -> Plan:
    SET.require()
    # A drawing in SVG lies beside many pictures; only finished pictures are taken.
    entries = [_Job(path) for path in STAMPS.files() or [] if path.suffix == ".png"]
    labels = sorted({job.label for job in entries})
    return Plan({"train": mixed(entries, options)}, _make, PER_SHARD, labels)


SET = OpenSet(
    name="stamps",
    kind="images",
    size="793 cut-outs, 25 MB",
    licence=f"{STAMPS.licence}; for training only, nothing is to be redistributed",
    citation="Tux Paint stamps by their authors, see the copyright file of tuxpaint-stamps-default",
    packages=(STAMPS,),
    captions="captions: the English description of each stamp; labels: its topic",
    split="all for training",
    plan=_plan,
)
