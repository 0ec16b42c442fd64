"""What a set of shards holds: its manifest on disk, or a scan of tars that have none.

A manifest lies beside its shards and names them without their folder, so a set can be moved or copied to a server:

    {"format": "atoken-shards", "version": 1, "kind": "images", "samples": 1000, "bytes": 104857600,
     "facts": {...}, "shards": [{"name": "shard-000000.tar", "samples": 500, "bytes": ..., "sha256": "..."}, ...],
     "skipped": [{"name": "broken.jpg", "reason": "..."}, ...], "plan": "..."}

"facts" says how the set was made, "skipped" what could not become a sample, "plan" is the fingerprint of what was to be
written (`data.shards.writer`). Shards of other makers have no manifest: their samples are counted once, from the
headers alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.progress import Progress

from data.names import file_beside, file_inside, file_name, path_parts
from data.samples import IMAGE_EXTENSIONS, LATENTS_EXTENSION, VIDEO_EXTENSIONS, VOXELS_EXTENSION, Kind, SampleError
from data.shards.reader import scan_shard
from data.urls import expand_urls, is_remote, local_path, open_url, scheme_of
from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError

FORMAT = "atoken-shards"
VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar. sha256 is empty where it is not known (no manifest)."""

    url: str
    samples: int
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Its file name."""
        return file_name(self.url)


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that did not become a sample: the name of its source, and why in one line."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The shards of a set, in order.

    kind: what every sample is.
    facts: how the set was made; empty for shards without a manifest.
    skipped: what was left out when it was made, or is unreadable in shards without a manifest.
    plan: fingerprint of what was to be written; empty where it is not known.
    """

    kind: Kind
    shards: tuple[Shard, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    plan: str = ""

    @property
    def samples(self) -> int:
        """In all shards together."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Of all tars together."""
        return sum(shard.bytes for shard in self.shards)


class _Part(BaseModel):
    """Unknown keys are errors, and numbers are not read from text."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _ShardEntry(_Part):
    # A name leads to a file beside the manifest, never elsewhere.
    name: str = Field(pattern=r"^[^/\\]+\.tar$")
    samples: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^([0-9a-f]{64})?$")


class _SkippedEntry(_Part):
    name: str
    reason: str


class _Manifest(_Part):
    format: Literal["atoken-shards"]
    version: Literal[1]
    kind: Kind
    samples: int
    bytes: int
    facts: dict[str, Any] = {}
    shards: list[_ShardEntry]
    skipped: list[_SkippedEntry] = []
    plan: str = ""


def read_set(spec: str | Path, *, console: Console | None = None) -> ShardSet:
    """The set that a folder, manifest, tar or pattern names.

    Args:
        spec: a folder or its `manifest.json`, by path or URL; or tars without a manifest, by path, URL, `*`, braces
            or `pipe:`, or a local folder of such. These are read through once, to count their samples.
        console: shows the progress of counting; by default stderr.

    Raises:
        InputError: nothing there, not a manifest of this format and version, a shard that is missing on the local
            disk, an unfinished set, no samples, or none of a known kind.
        SampleError: a URL cannot be reached.
    """
    text = str(spec)
    if _is_manifest(text):
        return _from_manifest(text)
    if not is_remote(text) and local_path(text).is_dir():
        return _from_folder(local_path(text), console)
    if scheme_of(text) not in ("", "file", "pipe"):
        manifest = file_inside(text, MANIFEST)
        if not path_parts(text)[-1] or "." not in _last_part(text):
            return _from_manifest(manifest)
        if not _names_tars(text):
            with contextlib.suppress(SampleError):  # a dot may be that of a folder ("set-v1.0") or of a tar ("a.bin")
                return _from_manifest(manifest)
    return _from_tars(expand_urls(text), text, console)


def write_manifest(path: Path, shards: ShardSet) -> None:
    """Write `shards`, which lie in the folder of `path`, as their manifest; whole or not at all."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "kind": shards.kind,
        "samples": shards.samples,
        "bytes": shards.bytes,
        "facts": dict(shards.facts),
        "shards": [{"name": s.name, "samples": s.samples, "bytes": s.bytes, "sha256": s.sha256} for s in shards.shards],
        "skipped": [asdict(skipped) for skipped in shards.skipped],
        "plan": shards.plan,
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def verify(shards: ShardSet) -> Iterator[tuple[Shard, str]]:
    """Compare every tar with its checksum.

    Yields:
        Each shard, with what is wrong with it in one line; "" where nothing is.

    Raises:
        InputError: the set has no manifest, so there are no checksums.
    """
    if unknown := [shard.name for shard in shards.shards if not shard.sha256]:
        raise InputError(f"{unknown[0]}: no checksum is known; only sets with a {MANIFEST} can be verified")
    for shard in shards.shards:
        try:
            with open_url(shard.url) as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except SampleError as error:
            yield shard, str(error)
        else:
            yield shard, "" if digest == shard.sha256 else f"{shard.url}: not what was written (other checksum)"


def _is_manifest(text: str) -> bool:
    return scheme_of(text) != "pipe" and _last_part(text) == MANIFEST


def _names_tars(text: str) -> bool:
    """Whether a URL names tars beyond doubt: by its ending, or as a pattern."""
    return _last_part(text).endswith(".tar") or any(mark in urlsplit(text).path for mark in "*{[")


def _last_part(text: str) -> str:
    return next((part for part in reversed(path_parts(text)) if part), "")


def _from_folder(folder: Path, console: Console | None) -> ShardSet:
    if (folder / MANIFEST).exists():
        return _from_manifest(str(folder / MANIFEST))
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    if any(Path(tar).with_suffix(".json").exists() for tar in tars):
        raise InputError(f"{folder}: not finished ({MANIFEST} is missing); run the command that makes it again")
    if not tars:
        raise InputError(f"{folder}: holds neither {MANIFEST} nor tars; 'atoken shard' makes them of files")
    return _from_tars(tars, str(folder), console)


def _from_manifest(url: str) -> ShardSet:
    try:
        with open_url(url) as stream:
            document = json.load(stream)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{url}: not a manifest: not readable as JSON ({' '.join(str(error).split())})") from None
    manifest = _checked(document, url)
    shards = tuple(Shard(file_beside(url, s.name), s.samples, s.bytes, s.sha256) for s in manifest.shards)
    skipped = tuple(Skipped(s.name, s.reason) for s in manifest.skipped)
    found = ShardSet(manifest.kind, shards, manifest.facts, skipped, manifest.plan)
    if (found.samples, found.bytes) != (manifest.samples, manifest.bytes):
        raise InputError(f"{url}: its shards add up to {found.samples} samples, not to {manifest.samples} as it says")
    if not found.samples:
        raise InputError(f"{url}: no samples")
    if missing := [s.url for s in shards if not is_remote(s.url) and not local_path(s.url).is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{missing[0]}{more}: named in {MANIFEST}, but missing; copy or make the set again")
    return found


def _checked(document: Any, url: str) -> _Manifest:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError(f"{url}: not a manifest of shards: 'format' must be '{FORMAT}'")
    if document.get("version") != VERSION:
        raise InputError(f"{url}: version {document.get('version')!r}, this AToken reads version {VERSION}")
    try:
        return _Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{url}: {where}: {first['msg']}") from None


def _from_tars(urls: Sequence[str], spec: str, console: Console | None) -> ShardSet:
    """Count the samples of tars without a manifest; what is unreadable in them is `skipped`."""
    console = console or Console(stderr=True)
    shards, faults, extensions = [], [], Counter[frozenset[str]]()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for url in progress.track(urls, description="counting samples"):
            scan = scan_shard(url)
            extensions += scan.extensions
            faults += [Skipped(url, scan.fault)] if scan.fault else []
            shards.append(Shard(url, scan.samples, scan.bytes, ""))
    if not any(shard.samples for shard in shards):
        raise InputError(f"{spec}: no samples" + (f" ({faults[0].reason})" if faults else ""))
    return ShardSet(_kind(extensions, spec), tuple(shards), {}, tuple(faults))


def _kind(samples: Counter[frozenset[str]], spec: str) -> Kind:
    """What most samples are, told by their extensions."""
    kinds = Counter[Kind]()
    for extensions, count in samples.items():
        if kind := _kind_of(extensions):
            kinds[kind] += count
    if not kinds:
        found = ", ".join(sorted({extension for extensions in samples for extension in extensions})[:8])
        raise InputError(f"{spec}: neither pictures, videos, voxels nor latents among the samples, only .{found}")
    return kinds.most_common(1)[0][0]


def _kind_of(extensions: frozenset[str]) -> Kind | None:
    """A video may have a picture beside it, so the picture decides last."""
    if LATENTS_EXTENSION in extensions:
        return "latents"
    if VOXELS_EXTENSION in extensions:
        return "assets"
    if extensions & set(VIDEO_EXTENSIONS):
        return "videos"
    return "images" if extensions & set(IMAGE_EXTENSIONS) else None
