"""Samples to look at: the best, the median and the worst of the first system, made once more and kept as pictures.

Pictures are lossless where they fit the page; larger ones show their centre. Clips become one player with all systems
side by side, in step. Assets show their views, one row for each system.
"""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from tokenizer.errors import InputError
from tokenizer.evaluation.accumulate import Records
from tokenizer.evaluation.command.measurement import Measurement, chosen_samples
from tokenizer.evaluation.command.presets import KINDS, Kind
from tokenizer.evaluation.command.results import COLUMNS
from tokenizer.evaluation.command.runner import Plan
from tokenizer.evaluation.command.samples import Frames, Sample, load_sample
from tokenizer.evaluation.command.systems import NotHandledError
from tokenizer.media import VideoWriter

LARGEST: Final = 512
"""Pixels a side of pictures on the page; of larger ones the centre is shown."""

WEBP_SIDE: Final = 16383
"""Pixels a side that the format of pictures on the page holds."""

CLIP_WIDTH: Final = 320
CLIP_FRAMES: Final = 96
_GAP: Final = 4
_RANKING: Final = ("psnr", "ssim", "lpips_vgg16", "lpips_alexnet")
"""Figures that tell the best sample from the worst; of these the run may have been asked for one alone."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture or player. data: of its file. figures: of the system for this sample; none for the original."""

    title: str
    media: str
    data: bytes
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        """The file as a data URI."""
        return f"data:{self.media};base64,{base64.b64encode(self.data).decode('ascii')}"


@dataclass(frozen=True, slots=True)
class Example:
    """A sample on the page. rank: "best", "median" or "worst". note: what of it is shown, if not all."""

    kind: Kind
    rank: str
    sample: str
    panels: Sequence[Panel]
    note: str = ""


def make_examples(
    plan: Plan, measurement: Measurement, on_example: Callable[[], object] = lambda: None
) -> list[Example]:
    """Examples of each kind, by the first of `_RANKING` that the first system has."""
    found = []
    for kind in KINDS:
        rows = [system.name for system in plan.systems if (kind, system.name) in measurement.records]
        if not rows:
            continue
        for rank, name in chosen_samples(_ranking(measurement.records[kind, rows[0]])).items():
            number = measurement.known[name].number
            sample = load_sample(next(iter(plan.source.read([number]))), plan.preset)
            copies = _copies(plan, sample)
            figures = {row: measurement.records[kind, row].samples().get(name, {}) for row in copies}
            found.append(_example(kind, rank, sample, copies, figures))
            on_example()
    return found


def _ranking(records: Records) -> dict[str, float]:
    """A figure of which more is better, by sample; empty where nothing tells how good the samples are."""
    ranked = ((records.values(name), COLUMNS[name].better) for name in _RANKING)
    values, better = next(((values, better) for values, better in ranked if values), ({}, 1))
    return {sample: better * value for sample, value in values.items()}


def _copies(plan: Plan, sample: Sample) -> dict[str, Frames]:
    """What each system makes of a sample."""
    copies: dict[str, Frames] = {}
    bits: dict[str, float] = {}
    for system in plan.systems:
        if not system.handles(sample):
            continue
        try:
            copy = system.reconstruct(sample, bits.get(system.budget_of or ""))
        except NotHandledError:
            continue
        copies[system.name], bits[system.name] = copy.frames, copy.bits
    return copies


def _example(
    kind: Kind, rank: str, sample: Sample, copies: Mapping[str, Frames], figures: Mapping[str, Mapping[str, float]]
) -> Example:
    everything = {"original": sample.frames, **copies}
    if kind == "video":
        return _player(rank, sample, everything, figures)
    panels, note = [], ""
    for title, frames in everything.items():
        shown = frames[: max(1, WEBP_SIDE // frames.shape[2])]
        if kind == "asset" and len(shown) < len(frames):
            note = f"the first {len(shown)} of {len(frames)} views"
        picture = np.concatenate(list(shown), axis=1) if kind == "asset" else frames[0]
        cut = picture if kind == "asset" else centre(picture, LARGEST)
        if cut.shape != picture.shape:
            note = f"the central {cut.shape[1]} x {cut.shape[0]} of {picture.shape[1]} x {picture.shape[0]} pixels"
        panels.append(Panel(title, "image/webp", _webp(cut), figures.get(title, {})))
    return Example(kind, rank, sample.id, panels, note)


def _player(
    rank: str, sample: Sample, everything: Mapping[str, Frames], figures: Mapping[str, Mapping[str, float]]
) -> Example:
    """All systems from left to right in one clip, scaled down to fit the page."""
    # Frames hours apart should still play.
    rate = min(max(sample.frame_rate or 25.0, 1.0), 120.0)
    columns = [_scaled(frames[:CLIP_FRAMES], CLIP_WIDTH) for frames in everything.values()]
    white = np.full((*columns[0].shape[:2], _GAP, 3), 255, np.uint8)
    clip = np.concatenate([part for column in columns for part in (white, column)][1:], axis=2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.webm"
        with VideoWriter(path, rate, *clip.shape[1:3]) as writer:
            writer.write(clip)
        data = path.read_bytes()
    told = [
        f"{name} ({figures[name]['psnr']:.2f} dB)" if "psnr" in figures.get(name, {}) else name for name in everything
    ]
    title = "from left to right: " + ", ".join(told)
    shown = f"the first {len(clip)} of {len(sample.frames)} frames" if len(clip) < len(sample.frames) else ""
    return Example("video", rank, sample.id, [Panel(title, "video/webm", data)], shown)


def centre(picture: Frames, side: int) -> Frames:
    """The central part [h, w, 3] of a picture [H, W, 3], at most `side` each way."""
    height, width = (min(length, side) for length in picture.shape[:2])
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def _scaled(frames: Frames, width: int) -> Frames:
    """Frames no wider than `width`."""
    if frames.shape[2] <= width:
        return frames
    height = max(1, round(frames.shape[1] * width / frames.shape[2]))
    resized = [np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)) for frame in frames]
    return np.stack(resized)


def _webp(picture: Frames) -> bytes:
    """Lossless, so that what is seen is what was measured."""
    if max(picture.shape[:2]) > WEBP_SIDE:
        raise InputError(f"a picture of more than {WEBP_SIDE} pixels a side does not fit the page")
    coded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(coded, "WEBP", lossless=True, method=3)
    return coded.getvalue()
