"""Emoji: 3,786 captioned pictures of 64 x 64 in ten categories, from the npm package `emoji-datasource-google`.

Variants of one emoji (skin tone, gender, direction) look alike, so all of them are on the same side of the split.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.shards.manifest import Skipped
from data.shards.writer import Record
from data.sources.packages import EMOJI, install_hint
from data.sources.sets import OpenSet, Options, Plan, Split, mixed, pieces, record
from tokenizer.errors import InputError

PER_SHARD = 256
EVALUATION_SHARE = 10
"""One family in so many is for evaluation."""

PICTURES = "img/google/64"
_TABLE, _ABOUT = "emoji.json", "package.json"
_ARCHIVES = (".tgz", ".tar.gz")
_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
# Joiner, presentation, female and male sign, arrow: what turns an emoji into another variant of itself.
_VARIANT = {*_TONES, "200D", "FE0F", "2640", "2642", "27A1"}
_PEOPLE = {"1F468", "1F469", "1F9D1"}  # man, woman, person


@dataclass(frozen=True, slots=True)
class Emoji:
    """One picture: the file it is, its code points in hexadecimal, and what it shows."""

    file: str
    code: str
    caption: str
    category: str

    @property
    def split(self) -> Split:
        digest = hashlib.sha256(family(self.code).encode()).digest()
        return "evaluation" if int.from_bytes(digest[:8]) % EVALUATION_SHARE == 0 else "train"


def family(code: str) -> str:
    """What the variants of an emoji have in common: "1F469-1F3FB-200D-2695-FE0F" -> "1F9D1-2695"."""
    points = [point for point in code.upper().split("-") if point not in _VARIANT]
    if len(points) > 1:  # a man or woman with a profession, and not the faces of a man and a woman
        points = ["1F9D1" if point in _PEOPLE else point for point in points]
    return "-".join(points) or code


def read_table(table: bytes) -> list[Emoji]:
    """The emoji of `emoji.json` that have a picture, skin tones included.

    Raises:
        InputError: not the table of this package.
    """
    try:
        return [emoji for entry in json.loads(table) if entry["has_img_google"] for emoji in _variants(entry)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{_TABLE} of {EMOJI.name} cannot be read ({error!r}): install the package again") from None


def _variants(entry: dict[str, Any]) -> Iterator[Emoji]:
    caption = entry["name"].lower()
    yield Emoji(entry["image"], entry["unified"], caption, entry["category"])
    for tones, variant in entry.get("skin_variations", {}).items():
        if variant["has_img_google"]:
            words = " and ".join(dict.fromkeys(_TONES[tone] for tone in tones.split("-")))
            yield Emoji(variant["image"], variant["unified"], f"{caption}, {words}", entry["category"])


def find(source: Path | None) -> Path:
    """The unpacked package, or the archive that `npm pack` wrote.

    Args:
        source: either of them, or a folder that holds the package; None for the installed one.

    Raises:
        InputError: not there.
    """
    if source is None:
        tables = [path for path in EMOJI.files() or [] if path.name == _TABLE]
        if not tables:
            SET.require()
            raise InputError(f"{EMOJI.name} is installed without {_TABLE}: {install_hint([EMOJI])}")
        return min(tables, key=lambda path: len(path.parts)).parent
    if source.is_file() and source.name.endswith(_ARCHIVES):
        return source
    for folder in (source, source / "package", source / "node_modules" / EMOJI.name, source / EMOJI.name):
        if (folder / _TABLE).is_file():
            return folder
    raise InputError(f"{source}: neither the .tgz of npm pack {EMOJI.name} nor a folder with its {_TABLE}")


def read(root: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Contents of files of the package by their names in it; those that are not there are left out.

    Raises:
        InputError: a damaged archive.
    """
    if root.is_dir():
        return {name: (root / name).read_bytes() for name in names if (root / name).is_file()}
    wanted = {f"package/{name}": name for name in names}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(root, "r:gz") as archive:
            for member in archive:
                if member.isfile() and member.name in wanted and (file := archive.extractfile(member)):
                    found[wanted[member.name]] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{root}: a damaged archive ({error}); fetch it again: npm pack {EMOJI.name}") from None
    return found


@dataclass(frozen=True, slots=True)
class _Job:
    root: Path
    source: str
    emoji: tuple[Emoji, ...]


def _make(job: _Job) -> Iterator[Record | Skipped]:
    contents = read(job.root, [f"{PICTURES}/{emoji.file}" for emoji in job.emoji])
    for emoji in job.emoji:
        picture = contents.get(f"{PICTURES}/{emoji.file}")
        if picture is None:
            yield Skipped(emoji.file, "not in the package")
            continue
        facts = {"label": emoji.category, "code": emoji.code, "licence": EMOJI.licence, "source": job.source}
        # The category besides, as the captions of furniture have it: what texts are near to is what they say.
        caption = f"{emoji.caption}, {emoji.category.lower()}"
        yield record(Path(emoji.file).stem, {"png": picture}, caption, **facts)


def _plan(options: Options) -> Plan:
    root = find(options.source)
    contents = read(root, [_TABLE, _ABOUT])
    if _TABLE not in contents:
        raise InputError(f"{root}: holds no {_TABLE}; fetch it again: npm pack {EMOJI.name}")
    emoji = read_table(contents[_TABLE])
    source = f"{EMOJI.name} {_version(contents.get(_ABOUT, b''))}".strip()
    jobs: dict[Split, list[_Job]] = {}
    for split in ("train", "evaluation"):
        chosen = mixed([one for one in emoji if one.split == split], options)
        jobs[split] = [_Job(root, source, piece) for piece in pieces(chosen, PER_SHARD)]
    return Plan(jobs, _make, 1, sorted({one.category for one in emoji}), {"source": source})


def _version(about: bytes) -> str:
    try:
        return str(json.loads(about)["version"])
    except (ValueError, KeyError, TypeError):
        return ""


SET = OpenSet(
    name="emoji",
    kind="images",
    size="3,786 pictures of 64 x 64, 25 MB",
    licence=EMOJI.licence,
    citation="Noto Emoji by Google (Apache-2.0), in emoji-datasource-google by Cal Henderson (MIT)",
    packages=(EMOJI,),
    captions="captions: the emoji's name, skin tone and category; labels: 10 categories",
    split="one family of variants in ten, by a hash of its code points, is for evaluation",
    plan=_plan,
    takes_source="the .tgz of `npm pack emoji-datasource-google@16.0.0` or its unpacked folder",
)
