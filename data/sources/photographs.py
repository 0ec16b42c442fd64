"""Photographs and wallpapers from Debian packages, and the pictures that scikit-image and scikit-learn ship.

The bytes are stored as found, at native resolution; `Options.max_side` reduces the largest ones. The well-known test
pictures (astronaut, coffee, cat, rocket, china, flower) are the evaluation split and nothing else is.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from data.samples import IMAGE_EXTENSIONS
from data.shards.manifest import Skipped
from data.shards.writer import Record
from data.sources.packages import EVALUATION_ONLY, PICTURES, SKLEARN, Package
from data.sources.pictures import SIZE_SUFFIX, is_photograph, is_picture, largest_of_each, short_name
from data.sources.sets import OpenSet, Options, Plan, Split, mixed, record, slug
from tokenizer.errors import InputError

LABELS = ("photograph", "picture")
MIN_SIDE = 64
PER_SHARD = 8
_QUALITY = 95

PACKAGES = (*PICTURES, SKLEARN)

# Names that say nothing about what can be seen, or not in English words.
_UNTOLD = frozenset(
    {"adwaita-d", "adwaita-l", "aitzgorri", "analogpattern", "free", "greentock", "ihc", "life", "logo", "Picture_0B",
     "MATE-Stripes-Dark", "MATE-Stripes-Light", "Picture_1A", "symbolic-d", "symbolic-l", "umang", "vnc-d", "vnc-l",
     "Ubuntu-Mate-Cold-no-logo", "Ubuntu-Mate-Dark-no-logo", "Ubuntu-Mate-Radioactive-no-logo",
     "Ubuntu-Mate-Warm-no-logo"}
)  # fmt: skip
_TOLD = {
    "camera": "a cameraman",
    "cat": "a cat",
    "chelsea": "a cat",
    "china": "a chinese temple",
    "Fossa": "coloured shapes",
    "horse": "silhouette of a horse",
    "Kleiber": "a nuthatch on a tree",
    "moon": "surface of the moon",
    "motorcycle_left": "a motorcycle",
    "motorcycle_right": "a motorcycle",
    "page": "a page of a book",
    "picosdeeuropa": "the mountains picos de europa",
    "retina": "a retina",
    "seeding": "dandelions",
    "TwoWings": "seeds of a dandelion",
}


def caption(path: Path) -> str | None:
    """What a file's name says: "FreshFlower.jpg" -> "fresh flower"; None where it says nothing."""
    stem = SIZE_SUFFIX.sub("", path.stem)
    stem = stem.split("_by_")[0]  # wallpapers name their photographer
    if stem in _UNTOLD:
        return None
    if stem in _TOLD:
        return _TOLD[stem]
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", re.sub(r"-[dl]$", "", stem))  # -d, -l: for dark and light desktops
    return re.sub(r"[-_\s]+", " ", words).strip().lower()


@dataclass(frozen=True, slots=True)
class _Job:
    path: Path
    package: Package
    max_side: int | None


def _make(job: _Job) -> Iterator[Record | Skipped]:
    try:
        files, size = _read(job.path, job.max_side)
    except InputError as error:
        yield Skipped(short_name(job.path), str(error))
        return
    kind = "photograph" if job.path.name in EVALUATION_ONLY or is_photograph(job.path) else "picture"
    facts = {
        "label": kind,
        "file": short_name(job.path),
        "original_size": size,
        "licence": job.package.licence,
        "source": job.package.name,
    }
    yield record(slug(f"{job.package.name} {job.path.stem}"), files, caption(job.path), **facts)


def _read(path: Path, max_side: int | None) -> tuple[dict[str, bytes], tuple[int, int]]:
    """Its bytes by extension, and (width, height) as found."""
    extension = path.suffix.lower().lstrip(".")
    if extension not in IMAGE_EXTENSIONS:
        raise InputError(f"files of the kind .{extension} are not stored")
    try:
        with Image.open(path) as picture:
            size = picture.size
            if min(size) < MIN_SIDE:
                raise InputError(f"smaller than {MIN_SIDE} pixels")
            if max_side is None or max(size) <= max_side:
                return {extension: path.read_bytes()}, size
            scale = max_side / max(size)
            smaller = picture.resize([max(1, round(side * scale)) for side in size], Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            smaller.save(buffer, picture.format, **({} if picture.format == "PNG" else {"quality": _QUALITY}))
    except UnidentifiedImageError:
        raise InputError("Pillow does not know what it is") from None
    except OSError as error:
        raise InputError(f"cannot be read: {error}") from None
    return {extension: buffer.getvalue()}, size


def _plan(options: Options) -> Plan:
    SET.require()
    if options.max_side is not None and options.max_side < MIN_SIDE:
        raise InputError(f"pictures cannot be reduced to {options.max_side} pixels: at least {MIN_SIDE} are needed")
    found: dict[Split, list[_Job]] = {"train": [], "evaluation": []}
    for package in PACKAGES:
        kept, _ = largest_of_each([path for path in package.files() or [] if is_picture(path)])
        for path in kept:
            split: Split = "evaluation" if path.name in EVALUATION_ONLY else "train"
            found[split].append(_Job(path, package, options.max_side))
    jobs = {split: mixed(entries, options) for split, entries in found.items()}
    return Plan(jobs, _make, PER_SHARD, LABELS)


SET = OpenSet(
    name="photographs",
    kind="images",
    size="91 pictures up to 6028 x 3391, 100 MB",
    licence="free licences, per file: see the facts of each sample and the packages' copyright files",
    citation="authors as named in the copyright files of mate-backgrounds, gnome-backgrounds and lomiri-wallpapers; "
    "scikit-image and scikit-learn",
    packages=PACKAGES,
    captions="captions: what the file names say; labels: photograph or picture",
    split="astronaut, coffee, chelsea, rocket, china and flower are for evaluation, all others for training",
    plan=_plan,
)
