"""What travels through the loader: a sample as it lies in a shard and as it is trained on, and why one was left out.

A shard is a WebDataset tar. Files that share a name up to its first dot are one sample:

    images      KEY.jpg / .png / .webp (as found, native resolution)      KEY.txt caption       KEY.json facts
    videos      KEY.mp4 / .webm / ... (as found)                          KEY.txt caption       KEY.json facts
    assets      KEY.voxels.safetensors, KEY.views.webp                    KEY.txt caption       KEY.json facts
    latents     KEY.latents.safetensors                                   KEY.txt caption       KEY.json facts

Any of them may have KEY.teacher.npy besides: what an image network sees in it (`data.making.teach`).

Only the picture, video, voxels or latents must be there. Among the facts, "label" is a class name, "licence" and
"source" say where a sample comes from.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from data.mixture import Task
from data.names import file_name
from tokenizer.cameras import Cameras
from tokenizer.errors import InputError

if TYPE_CHECKING:
    from data.latents.format import LatentItem

Kind = Literal["images", "videos", "assets", "latents"]
"""What the samples of a set of shards are."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "m4v", "avi", "mpg", "mpeg", "ts", "gif")
VOXELS_EXTENSION = "voxels.safetensors"
VIEWS_EXTENSION = "views.webp"
LATENTS_EXTENSION = "latents.safetensors"
TEACHER_EXTENSION = "teacher.npy"

DEEPEST_FACTS = 64
"""Objects and lists that may lie within each other in KEY.json. Python reads some hundreds, but sends fewer to another
process, and how many depends on who asks: so a limit far below that, which is the same for every reader."""

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Raw:
    """A sample as it lies in a shard.

    shard: URL of its tar.
    index: its number in the tar, from 0.
    key: what the names of its files share.
    files: contents by extension (all after the first dot, in lower case).
    """

    shard: str
    index: int
    key: str
    files: Mapping[str, bytes]

    @property
    def id(self) -> str:
        """Unique in a set of shards, and the same in every epoch: "shard-000012.tar/KEY"."""
        return f"{file_name(self.shard)}/{self.key}"

    def facts(self) -> dict[str, Any]:
        """KEY.json, or nothing where it is missing. NaN, Infinity and numbers beyond a float's range become None, since
        JSON has no way to write them again.

        Raises:
            InputError: not an object in JSON, or one of more than `DEEPEST_FACTS` levels.
        """
        if "json" not in self.files:
            return {}
        try:
            facts = loads(self.files["json"])
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.id}.json: not readable as JSON ({' '.join(str(error).split())})") from None
        if not isinstance(facts, dict):
            raise InputError(f"{self.id}.json: must hold an object, not a {type(facts).__name__}")
        # Few samples have enough brackets to be worth a look at how they lie.
        brackets = self.files["json"].count(b"{") + self.files["json"].count(b"[")
        if brackets > DEEPEST_FACTS and is_deeper(facts, DEEPEST_FACTS):
            raise InputError(f"{self.id}.json: lists or objects within each other, more than {DEEPEST_FACTS} deep")
        return facts

    def caption(self) -> str | None:
        """KEY.txt as it is, else "caption" of KEY.json, halves of characters (lone surrogates) in it replaced; None
        without either or where it is blank.

        Raises:
            InputError: not UTF-8, or a caption in JSON that is not text.
        """
        if "txt" in self.files:
            try:
                text = self.files["txt"].decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{self.id}.txt: not UTF-8 ({error.reason} at byte {error.start})") from None
        else:
            text = self.facts().get("caption") or ""
            if not isinstance(text, str):
                raise InputError(f"{self.id}.json: 'caption' must be text, not {type(text).__name__}")
            text = whole_characters(text)
        return text if text.strip() else None

    def label(self) -> str | None:
        """Name of its class: "label" of KEY.json, else what KEY.cls says, as sets of other makers have it.

        Raises:
            InputError: as `facts`.
        """
        label = self.facts().get("label")
        if label is None and "cls" in self.files:
            label = self.files["cls"].decode("utf-8", errors="replace").strip()
        return None if label is None or label == "" else whole_characters(str(label))


def loads(text: str | bytes) -> Any:
    """JSON in which NaN, Infinity and numbers beyond a float's range are None."""
    return json.loads(text, parse_constant=lambda _: None, parse_float=_finite)


def whole_characters(text: str) -> str:
    """With halves of characters (lone surrogates), which UTF-8 cannot hold, replaced."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def is_deeper(value: object, levels: int) -> bool:
    """Whether lists and objects lie within each other in more than `levels` levels."""
    inside: list[Any] = [value]
    for _ in range(levels + 1):
        inside = [part for part in inside if isinstance(part, list | dict)]
        if not inside:
            return False
        inside = [part for whole in inside for part in (whole.values() if isinstance(whole, dict) else whole)]
    return True


@dataclass(frozen=True, slots=True)
class Seen:
    """Views of an asset that a loss compares with.

    pictures: uint8 [V, H, W, 4], straight alpha. cameras: V of them.
    """

    pictures: Tensor
    cameras: Cameras


@dataclass(frozen=True, slots=True)
class Item:
    """A sample ready to become tokens. Either `pixels`, or `features` and `coordinates`, or `latents` are there.

    id: as `Raw.id`.
    source: name of the source in the mixture.
    task: what it is used for.
    tokens: how many it will become.
    pixels: uint8 [H, W, 3] or [T, H, W, 3], RGB, whole patches.
    features: uint8 [N, 768], patches of voxels, 0..255 for the colours 0..1.
    coordinates: int16 [N, 3], x, y, z of the voxels.
    latents: of a tokenised set, whose samples are tokens already.
    views: of an asset that is reconstructed.
    teacher: float32 [D], what an image network sees in a sample that is understood; None where nobody asked it.
    caption: cleaned; None where the sample has none.
    facts: KEY.json.
    """

    id: str
    source: str
    task: Task
    tokens: int
    pixels: Tensor | None = None
    features: Tensor | None = None
    coordinates: Tensor | None = None
    latents: LatentItem | None = None
    views: Seen | None = None
    teacher: Tensor | None = None
    caption: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class SampleError(InputError):
    """A sample or shard cannot be read: left out and counted, where it is one of many.

    cause: one of a few phrases, under which it is counted ("damaged picture", "truncated shard").
    """

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return SampleError, (self.cause, str(self))  # exceptions travel between processes by their first argument only


@dataclass(frozen=True, slots=True)
class Fault:
    """Why one sample, or the rest of a shard, was left out.

    cause: as `SampleError.cause`.
    shard: URL of the tar.
    index: number of the sample in the tar; of the first one where it concerns several; -1 where its key alone is
        known.
    detail: one line for people: what, where.
    key: of the sample, where it is known.
    samples: how many are lost.
    """

    cause: str
    shard: str
    index: int
    detail: str
    key: str = ""
    samples: int = 1
