"""Shards for `atoken evaluate`, which finds this reader through the entry point group "atoken.readers".

Samples are given as they lie in the tars; what a protocol makes of pictures and clips is the evaluation's business. The
number of a sample counts through the shards in their order, so that any process can read any part of a set.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data.decode.assets import asset_size, decode_views, decode_voxels
from data.names import file_name, path_parts
from data.samples import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, VOXELS_EXTENSION, Raw, SampleError
from data.shards.manifest import MANIFEST, Shard, ShardSet, read_set
from data.shards.reader import SINGLE, read_shard, split_name
from data.shards.tar import TarFiles
from data.urls import is_remote, local_path, open_url
from tokenizer.assets.views import EMPTY, Views
from tokenizer.errors import InputError
from tokenizer.voxels import AssetSize

MediaKind = Literal["image", "video", "asset"]


@dataclass(frozen=True, slots=True)
class PackedAsset:
    """An asset of a shard. features: float32 [N, 768] in [0, 1]; coordinates: int32 [N, 3]; rule: how they were packed;
    views: those that the voxels were not made from, without depth."""

    features: Tensor
    coordinates: Tensor
    size: AssetSize
    rule: str
    views: Views


@dataclass(frozen=True, slots=True)
class ShardSample:
    """A sample of a shard, before its picture or clip is decoded.

    id: "shard-000012.tar/KEY.jpg", see `ShardSource`.
    content: bytes of the picture or clip, or an asset; empty where there is a fault.
    captions: lines of KEY.txt. label: of KEY.json or KEY.cls. fault: why it cannot be read.
    """

    id: str
    kind: MediaKind
    content: bytes | PackedAsset = b""
    captions: tuple[str, ...] = ()
    label: str | None = None
    fault: str | None = None
    sha256: str = ""

    def digest(self) -> str:
        """SHA-256 of the picture, clip or voxels."""
        return self.sha256


class ShardSource:
    """A set of shards by the numbers of its samples.

    Samples are called by shard and key: "shard-000012.tar/KEY.jpg". Of shards of one name as many folders are told as
    tell them apart ("train/000000.tar/KEY.jpg"), and a key that a tar had before has the place of the sample in the tar
    behind it ("000000.tar/KEY.7.jpg"; no key has a dot there). So each id is that of one sample.

    Args:
        shards: images, videos or assets.
        name: what was asked for.

    Raises:
        InputError: shards of latents, which nothing can be compared with.
    """

    def __init__(self, shards: ShardSet, name: str) -> None:
        if shards.kind == "latents":
            raise InputError(f"{name}: holds latents; evaluation needs the pictures, clips or assets themselves")
        self._set, self._name = shards, name
        self._labels = shortest_names([shard.url for shard in shards.shards])
        kinds: dict[str, MediaKind] = {"images": "image", "videos": "video", "assets": "asset"}
        self.kind = kinds[shards.kind]

    def __len__(self) -> int:
        return self._set.samples

    def facts(self) -> dict[str, Any]:
        """Source, number of samples, and one checksum over names, sizes and checksums of the shards.

        Shards without a manifest have no checksums: their times of change are taken instead, so that a copied set
        counts as another one. Of remote ones nothing but the size is known.
        """
        lines = "\n".join(
            f"{shard.name} {shard.samples} {shard.bytes} {shard.sha256 or _changed(shard)}"
            for shard in self._set.shards
        )
        return {
            "source": self._name,
            "samples": len(self),
            "listing_sha256": hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest(),
        }

    def read(self, numbers: Sequence[int]) -> Iterator[ShardSample]:
        """The samples of ascending numbers, one for each; what cannot be read comes as a fault."""
        first = 0
        wanted = iter(numbers)
        number = next(wanted, None)
        for shard, label in zip(self._set.shards, self._labels, strict=True):
            inside = []
            while number is not None and number < first + shard.samples:
                inside.append(number - first)
                number = next(wanted, None)
            if inside:
                yield from self._of_shard(shard, label, inside)
            first += shard.samples

    def _of_shard(self, shard: Shard, label: str, wanted: list[int]) -> Iterator[ShardSample]:
        """Samples by their places in a tar, ascending."""
        left, names = list(wanted), _Names(shard.url, label)
        while left:
            fault = "the shard ends before it"
            stream = read_shard(shard.url, start=left[0], samples=shard.samples)
            try:
                names.pass_over(left[0])
                for raw in stream:
                    name = names.of(raw)
                    if left and raw.index == left[0]:
                        left.pop(0)
                        yield self._sample(raw, name)
                    if not left:
                        return
            except SampleError as error:
                fault, single = str(error), error.cause in SINGLE
            else:
                single = False
            finally:
                stream.close()
            if single and names.next < left[0]:
                continue  # what is broken lies between samples that were asked for
            # Behind a fault of one sample the tar can be read on; behind any other nothing can.
            for place in [left.pop(0)] if single else left:
                yield ShardSample(f"{label} (sample {place})", self.kind, fault=fault)
            if not single:
                return

    def _sample(self, raw: Raw, name: str) -> ShardSample:
        try:
            caption, label = raw.caption(), raw.label()
            ending, content, digest = self._content(raw)
        except InputError as error:
            return ShardSample(name, self.kind, fault=str(error))
        except Exception as error:  # one odd file must not end a run
            detail = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return ShardSample(name, self.kind, fault=detail)
        captions = tuple(line.strip() for line in (caption or "").splitlines() if line.strip())
        return ShardSample(name + ending, self.kind, content, captions, label, sha256=digest)

    def _content(self, raw: Raw) -> tuple[str, bytes | PackedAsset, str]:
        """What comes behind the name, content and checksum."""
        if self.kind == "asset":
            if VOXELS_EXTENSION not in raw.files:
                raise SampleError("no such content", f"{raw.id}: has no {VOXELS_EXTENSION}")
            digest = hashlib.sha256(raw.files[VOXELS_EXTENSION]).hexdigest()
            return "", _asset(raw, raw.facts()), digest
        known = IMAGE_EXTENSIONS if self.kind == "image" else VIDEO_EXTENSIONS
        for extension in known:
            if extension in raw.files:
                data = raw.files[extension]
                return f".{extension}", data, hashlib.sha256(data).hexdigest()
        held = ", ".join(sorted(raw.files)) or "nothing"
        raise SampleError("no such content", f"{raw.id}: needs one of {', '.join(known)}; it holds {held}")


class _Names:
    """What the samples of a tar are called; they pass in the order of the tar.

    Args:
        url: of the tar.
        label: what it is called.

    Attributes:
        next: number of the first sample that has not passed.
    """

    def __init__(self, url: str, label: str) -> None:
        self._url, self._label = url, label
        self._keys: set[str] = set()
        self.next = 0

    def pass_over(self, stop: int) -> None:
        """Learn the keys of the samples before number `stop` from the headers alone.

        Raises:
            SampleError: the tar is damaged, or cannot be reached.
        """
        if self.next >= stop:
            return
        index, last = -1, None
        with open_url(self._url) as stream:
            for name, _ in TarFiles(stream, self._url):
                if (parts := split_name(name)) is None or parts[0] == last:
                    continue
                index, last = index + 1, parts[0]
                if index >= stop:
                    break
                self._keys.add(last)
        self.next = stop

    def of(self, raw: Raw) -> str:
        """Label and key, and the place in the tar where the key was there before."""
        repeated = raw.key in self._keys
        self._keys.add(raw.key)
        self.next = raw.index + 1
        return f"{self._label}/{raw.key}" + (f".{raw.index}" if repeated else "")


def shortest_names(urls: Sequence[str]) -> list[str]:
    """What shards are called: their file names, of equal ones with as many folders before them as tell them apart, and
    of the same shard given again with "#2" behind it."""
    parts = [[*path_parts(url)[:-1], file_name(url)] for url in urls]
    taken = [1] * len(urls)
    names = [place[-1] for place in parts]
    while True:
        counts = Counter(names)
        longer = [n for n, name in enumerate(names) if counts[name] > 1 and taken[n] < len(parts[n])]
        if not longer:
            break
        for n in longer:
            taken[n] += 1
            names[n] = "/".join(parts[n][-taken[n] :])
    times: Counter[str] = Counter()
    for n, name in enumerate(names):
        times[name] += 1
        names[n] = name if times[name] == 1 else f"{name}#{times[name]}"
    return names


def open_shards(spec: str) -> ShardSource | None:
    """The shards that `spec` names: a folder of them, a manifest, tars by pattern or URL; None if it is none of these.

    Raises:
        InputError: shards that cannot be used.
    """
    return ShardSource(read_set(spec), spec) if _names_shards(spec) else None


def _changed(shard: Shard) -> str:
    """When a local tar was changed, in nanoseconds; "" for a remote one."""
    path = None if is_remote(shard.url) else local_path(shard.url)
    return str(path.stat().st_mtime_ns) if path is not None and path.is_file() else ""


def _names_shards(spec: str) -> bool:
    if is_remote(spec) or spec.startswith("pipe:") or spec.endswith(".tar"):
        return True
    path = Path(spec)
    if path.name == MANIFEST:
        return True
    # A manifest alone may be that of something else, such as a store of furniture.
    return path.is_dir() and any(path.glob("*.tar"))


def _asset(raw: Raw, facts: dict[str, Any]) -> PackedAsset:
    stored = decode_voxels(raw.files, facts, raw.id)
    seen = stored.seen.tolist()
    chosen = [number for number, was_seen in enumerate(seen) if not was_seen] or list(range(len(seen)))
    pictures = decode_views(raw.files, stored, chosen, raw.id)
    colours = pictures.pictures.numpy()
    depth = torch.full(colours.shape[:3], EMPTY)
    return PackedAsset(
        features=stored.features.float() / 255,
        coordinates=stored.coordinates.int(),
        size=asset_size(facts, raw.id),
        rule=str(facts.get("rule", "released")),
        views=Views(np.ascontiguousarray(colours), depth, pictures.cameras),
    )
