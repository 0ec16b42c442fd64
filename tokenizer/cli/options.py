"""Options that commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "atoken-nano"


class Dtype(StrEnum):
    """Values of --dtype."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class ImageFormat(StrEnum):
    """Values of --image-format."""

    png = "png"
    jpg = "jpg"
    webp = "webp"


class VideoFormat(StrEnum):
    """Values of --video-format."""

    mp4 = "mp4"
    webm = "webm"
    gif = "gif"
    npy = "npy"
    frames = "frames"


class Packing(StrEnum):
    """Values of --packing."""

    auto = "auto"
    surface = "surface"
    average = "average"
    visible = "visible"
    released = "released"


Inputs = Annotated[list[str], typer.Argument(help="Files, folders and globs.", metavar="INPUT", show_default=False)]
Model = Annotated[str, typer.Option(help="Bundled model, model folder, or released .pt or .safetensors file.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes CUDA where there is one.")]
Precision = Annotated[Dtype, typer.Option("--dtype", help="auto is bf16 on CUDA and fp32 elsewhere.")]
Discrete = Annotated[bool, typer.Option("--discrete", help="Codebook indices instead of continuous latents.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Images = Annotated[ImageFormat, typer.Option(help="Of pictures whose name --out leaves open.")]
Videos = Annotated[VideoFormat | None, typer.Option(help="Of videos whose name --out leaves open; mp4.")]
Splats = Annotated[
    Path | None, typer.Option("--gaussians", help="Gaussian decoder for 3D, if not the model's own: folder or file.")
]
Packed = Annotated[
    Packing, typer.Option("--packing", help="How views of 3D assets become voxels; auto fits the model.")
]
