"""Clips of a virtual camera that moves over photographs, with cut-outs that move in front (`data.sources.camera`).

Films under a free licence are scarce in packages. Here motion is exact below a pixel, and every photograph and stamp
makes many clips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from data.shards.manifest import Skipped
from data.shards.writer import Record
from data.sources.camera import LAYERED, camera_clip
from data.sources.clips import encode_clip
from data.sources.packages import EVALUATION_ONLY, PICTURES, STAMPS, Package
from data.sources.photographs import caption
from data.sources.pictures import is_photograph, is_picture, largest_of_each, short_name
from data.sources.sets import OpenSet, Options, Plan, mixed, record, slug
from tokenizer.errors import InputError

CLIPS = 480
PER_SHARD = 24
_LARGEST, _SMALLEST = 1280, 256
_RATE = Fraction(25)


@dataclass(frozen=True, slots=True)
class _Job:
    """One clip: its number decides everything by chance, so that it does not depend on those before it."""

    number: int
    seed: int
    path: Path
    package: Package
    cutouts: tuple[Path, ...]


def _make(job: _Job) -> Iterator[Record | Skipped]:
    rng = np.random.default_rng([job.seed, 1, job.number])
    try:
        ground = _reduced(_opened(job.path).convert("RGB"))
        cutouts = [_opened(path).convert("RGBA") for path in job.cutouts]
    except (OSError, InputError) as error:
        yield Skipped(short_name(job.path), str(error))
        return
    frames = camera_clip(ground, cutouts, rng, still=0.5 if cutouts else 0.1)
    packages = [job.package, *([STAMPS] if cutouts else [])]
    facts = {
        "pictures": [short_name(path) for path in (job.path, *job.cutouts)],
        "fps": float(_RATE),
        "licence": " + ".join(package.licence for package in packages),
        "source": " + ".join(package.name for package in packages),
        "seed": job.seed,
    }
    told = caption(job.path)
    words = f"a camera moves over a photograph of {told}" if told else "a camera moves over a photograph"
    key = slug(f"{job.number:04d} {job.path.stem}")
    yield record(key, {"mp4": encode_clip(list(frames), _RATE)}, words, **facts)


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture.copy()


def _reduced(picture: Image.Image) -> Image.Image:
    """Short side at most `_LARGEST`."""
    short = min(_LARGEST, *picture.size)
    if short < _SMALLEST:
        raise InputError(f"smaller than {_SMALLEST} pixels")
    scale = short / min(picture.size)
    return picture.resize([round(side * scale) for side in picture.size], Image.Resampling.LANCZOS)


def _plan(options: Options) -> Plan:
    SET.require()
    grounds = []
    for package in PICTURES:
        kept, _ = largest_of_each([path for path in package.files() or [] if is_picture(path)])
        grounds += [(path, package) for path in kept if is_photograph(path) and path.name not in EVALUATION_ONLY]
    stamps = [p for p in STAMPS.files() or [] if p.suffix == ".png" and "/symbols/" not in p.as_posix()]
    jobs = []
    for number in range(CLIPS):
        rng = np.random.default_rng([options.seed, 2, number])
        layers = int(rng.integers(1, 3)) if stamps and rng.random() < LAYERED else 0
        cutouts = tuple(stamps[int(index)] for index in rng.integers(0, max(1, len(stamps)), layers))
        path, package = grounds[number % len(grounds)]
        jobs.append(_Job(number, options.seed, path, package, cutouts))
    return Plan({"train": mixed(jobs, options)}, _make, PER_SHARD)


SET = OpenSet(
    name="camera",
    kind="videos",
    size=f"{CLIPS} clips of 16 frames at 192 x 192, 200 MB",
    licence="those of the photographs and stamps, per clip; for training only, nothing is to be redistributed",
    citation="authors as named in the copyright files of mate-backgrounds, gnome-backgrounds, lomiri-wallpapers and "
    "tuxpaint-stamps-default; scikit-image",
    packages=(*PICTURES, STAMPS),
    captions="captions: what the photograph's file name says",
    split="all for training; the evaluation photographs are not used",
    plan=_plan,
)
