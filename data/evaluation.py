"""Shards for `atoken evaluate`, which finds this reader through the entry point group "atoken.readers".

Samples are given as they lie in the tars; what a protocol makes of pictures and clips is the evaluation's business. The
number of a sample counts through the shards in their order, so that any process can read any part of a set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data.decode.assets import asset_size, decode_views, decode_voxels
from data.samples import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, VOXELS_EXTENSION, Raw, SampleError
from data.shards.manifest import MANIFEST, Shard, ShardSet, read_set
from data.shards.reader import SINGLE, read_shard
from data.urls import is_remote
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

    id: "shard-000012.tar/KEY.jpg". content: bytes of the picture or clip, or an asset; empty where there is a fault.
    captions: lines of KEY.txt. label: "label" of KEY.json. fault: why it cannot be read.
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
        kinds: dict[str, MediaKind] = {"images": "image", "videos": "video", "assets": "asset"}
        self.kind = kinds[shards.kind]

    def __len__(self) -> int:
        return self._set.samples

    def facts(self) -> dict[str, Any]:
        """Source, number of samples, and one checksum over names, sizes and checksums of the shards."""
        lines = "\n".join(f"{shard.name} {shard.samples} {shard.bytes} {shard.sha256}" for shard in self._set.shards)
        return {
            "source": self._name,
            "samples": len(self),
            "listing_sha256": hashlib.sha256(lines.encode()).hexdigest(),
        }

    def read(self, numbers: Sequence[int]) -> Iterator[ShardSample]:
        """The samples of ascending numbers, one for each; what cannot be read comes as a fault."""
        first = 0
        wanted = iter(numbers)
        number = next(wanted, None)
        for shard in self._set.shards:
            inside = []
            while number is not None and number < first + shard.samples:
                inside.append(number - first)
                number = next(wanted, None)
            if inside:
                yield from self._of_shard(shard, inside)
            first += shard.samples

    def _of_shard(self, shard: Shard, wanted: list[int]) -> Iterator[ShardSample]:
        """Samples by their places in a tar, ascending."""
        left = list(wanted)
        while left:
            fault = "the shard ends before it"
            stream = read_shard(shard.url, start=left[0], samples=shard.samples)
            try:
                for raw in stream:
                    if left and raw.index == left[0]:
                        left.pop(0)
                        yield self._sample(raw)
                    if not left:
                        return
            except SampleError as error:
                fault, single = str(error), error.cause in SINGLE
            else:
                single = False
            finally:
                stream.close()
            # Behind a fault of one sample the tar can be read on; behind any other nothing can.
            for place in [left.pop(0)] if single else left:
                yield ShardSample(f"{shard.name}/{place:06d}", self.kind, fault=fault)
            if not single:
                return

    def _sample(self, raw: Raw) -> ShardSample:
        try:
            facts, caption = raw.facts(), raw.caption()
            name, content, digest = self._content(raw, facts)
        except InputError as error:
            return ShardSample(raw.id, self.kind, fault=str(error))
        label = facts.get("label")
        captions = tuple(line.strip() for line in (caption or "").splitlines() if line.strip())
        return ShardSample(name, self.kind, content, captions, None if label is None else str(label), sha256=digest)

    def _content(self, raw: Raw, facts: dict[str, Any]) -> tuple[str, bytes | PackedAsset, str]:
        """Id, content and checksum."""
        if self.kind == "asset":
            if VOXELS_EXTENSION not in raw.files:
                raise SampleError("no such content", f"{raw.id}: has no {VOXELS_EXTENSION}")
            digest = hashlib.sha256(raw.files[VOXELS_EXTENSION]).hexdigest()
            return raw.id, _asset(raw, facts), digest
        known = IMAGE_EXTENSIONS if self.kind == "image" else VIDEO_EXTENSIONS
        for extension in known:
            if extension in raw.files:
                data = raw.files[extension]
                return f"{raw.id}.{extension}", data, hashlib.sha256(data).hexdigest()
        held = ", ".join(sorted(raw.files)) or "nothing"
        raise SampleError("no such content", f"{raw.id}: needs one of {', '.join(known)}; it holds {held}")


def open_shards(spec: str) -> ShardSource | None:
    """The shards that `spec` names: a folder of them, a manifest, tars by pattern or URL; None if it is none of these.

    Raises:
        InputError: shards that cannot be used.
    """
    return ShardSource(read_set(spec), spec) if _names_shards(spec) else None


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
