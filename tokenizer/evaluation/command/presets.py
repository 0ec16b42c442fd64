"""Protocols by name: how large pictures are, how much of a clip is seen, what is measured.

The paper states sizes and metrics (PAPER 6). Where it is silent, the choice is ours and says so in `protocol`, which is
written into every result.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenizer.errors import InputError

Kind = Literal["image", "video", "asset"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
Task = Literal["reconstruction", "zero-shot", "retrieval"]

Frame = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A protocol.

    name: what --preset takes.
    protocol: what is measured, in a sentence or two for people.
    kinds: of samples that it measures; others are left out.
    tasks: what is measured, as far as data and model allow it.
    side: short side in pixels that pictures and frames are resized to; None keeps their size.
    crop: cut the centre square out after resizing.
    video_width: width that frames are resized to, instead of `side`.
    resampling: "bicubic" or "lanczos", antialiased.
    frames: of a clip, at most so many, from its start.
    spread: of a clip, so many frames spread evenly over it are understood, each alone; their vectors are averaged.
    stride, context: frames of a tile and of what it sees before it, in decoding; where a model's tiles are shorter,
        its own tiles without context.
    views, view_size: views of an asset that the model has not seen, and their rows and columns, on black.
    """

    name: str
    protocol: str
    kinds: tuple[Kind, ...]
    tasks: tuple[Task, ...] = ("reconstruction",)
    side: int | None = None
    crop: bool = False
    video_width: int | None = None
    resampling: Literal["bicubic", "lanczos"] = "bicubic"
    frames: int | None = None
    spread: int = 16
    stride: int = 16
    context: int = 0
    views: int = 8
    view_size: int = 256

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def fit(self, frame: Frame, *, video: bool = False) -> Frame:
        """A picture or frame, uint8 [H, W, 3], as this protocol sees it."""
        height, width = frame.shape[:2]
        scale = 1.0 if self.side is None else self.side / min(height, width)
        if video and self.video_width is not None:
            scale = self.video_width / width
        size = max(1, round(height * scale)), max(1, round(width * scale))
        if size != (height, width):
            chosen = Image.Resampling.BICUBIC if self.resampling == "bicubic" else Image.Resampling.LANCZOS
            frame = np.array(Image.fromarray(frame).resize((size[1], size[0]), chosen))
        if self.crop and self.side is not None:
            top, left = ((length - self.side) // 2 for length in frame.shape[:2])
            frame = frame[top : top + self.side, left : left + self.side]
        return np.ascontiguousarray(frame)


_PRESETS: Final = (
    Preset(
        name="native",
        protocol="Pictures at their own size; of clips the first 64 frames at their own size, decoded in tiles of 16; "
        "of assets 8 unseen views of 256x256 on black.",
        kinds=KINDS,
        tasks=("reconstruction", "zero-shot", "retrieval"),
        frames=64,
    ),
    Preset(
        name="imagenet-256",
        protocol="Short side to 256 (bicubic, antialiased), centre crop 256x256 (PAPER 6). Zero-shot classes are the "
        "folders that the pictures lie in.",
        kinds=("image",),
        tasks=("reconstruction", "zero-shot"),
        side=256,
        crop=True,
    ),
    Preset(
        name="coco-256",
        protocol="Short side to 256 (bicubic, antialiased), centre crop 256x256; retrieval with all captions of a "
        "picture (PAPER 6).",
        kinds=("image",),
        tasks=("reconstruction", "retrieval"),
        side=256,
        crop=True,
    ),
    Preset(
        name="davis-1080p",
        protocol="Clips at their own size (1080p), decoded in tiles of 12 frames that see 4 frames before them "
        "(PAPER 5, 6). At most 128 frames a clip, which is more than any clip of DAVIS has.",
        kinds=("video",),
        frames=128,
        stride=12,
        context=4,
    ),
    Preset(
        name="tokenbench-720p",
        protocol="Clips at their own size (720p), decoded in tiles of 12 frames that see 4 frames before them "
        "(PAPER 5, 6). The first 96 frames of a clip; the paper does not say how many it took.",
        kinds=("video",),
        frames=96,
        stride=12,
        context=4,
    ),
    Preset(
        name="msrvtt-1ka",
        protocol="16 frames spread over the clip, short side to 224, centre crop 224x224, each encoded alone and "
        "padded with zeros in time; the mean of their vectors (PAPER 6, Table 7). The number of frames is ours.",
        kinds=("video",),
        tasks=("retrieval",),
        side=224,
        crop=True,
        frames=16,
    ),
    Preset(
        name="toys4k",
        protocol="Assets seen from 16 sides; figures are means over 8 other views of 256x256 on black (PAPER 6; the "
        "number of views is ours). Zero-shot classes are the folders that the assets lie in.",
        kinds=("asset",),
        tasks=("reconstruction", "zero-shot"),
    ),
    Preset(
        name="nano",
        protocol="The protocol of the bundled models' cards: short side of pictures to 256 (Lanczos), of clips the "
        "first 32 frames, resized to 256 wide.",
        kinds=KINDS,
        side=256,
        video_width=256,
        resampling="lanczos",
        frames=32,
    ),
)
PRESETS: Final = {preset.name: preset for preset in _PRESETS}


def find_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        InputError: unknown.
    """
    if name not in PRESETS:
        raise InputError(f"--preset {name}: there is none of that name; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
