"""Raw samples to items: the part of loading that a worker process spends its time in.

A decoder is a pure function of sample, epoch and seed. Chance comes from `data.resolution.draws` alone, so that the
same item comes out of any number of workers and after any resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from data.decode import temporal, variation
from data.decode.assets import decode_views, decode_voxels
from data.decode.images import read_picture
from data.decode.teacher import read_teacher
from data.decode.temporal import Range
from data.decode.videos import read_clip
from data.mixture import Task
from data.resolution import ResolutionSampler, Rule, Size, View, draws, token_count
from data.samples import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    VOXELS_EXTENSION,
    Item,
    Kind,
    Raw,
    SampleError,
    Seen,
)
from data.text import clean_caption
from tokenizer.errors import InputError, require_package
from tokenizer.patches import PATCH_SIZE, PatchSize
from tokenizer.text.zero_shot import ASSET_PROMPTS, IMAGE_PROMPTS, VIDEO_PROMPTS

KINDS: Mapping[Task, Kind] = {
    Task.IMAGE_UNDERSTANDING: "images",
    Task.IMAGE_RECONSTRUCTION: "images",
    Task.VIDEO_UNDERSTANDING: "videos",
    Task.VIDEO_RECONSTRUCTION: "videos",
    Task.ASSET_UNDERSTANDING: "assets",
    Task.ASSET_RECONSTRUCTION: "assets",
}
"""What the samples of a task are."""

_EXTENSIONS: Mapping[Kind, Sequence[str]] = {
    "images": IMAGE_EXTENSIONS,
    "videos": VIDEO_EXTENSIONS,
    "assets": (VOXELS_EXTENSION,),
}

_PROMPTS: Mapping[Kind, Sequence[str]] = {"images": IMAGE_PROMPTS, "videos": VIDEO_PROMPTS, "assets": ASSET_PROMPTS}


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSettings:
    """How samples are read. The defaults are the paper's where it says something (PAPER 3), for every task.

    training: draw anew in each epoch. Otherwise every picture is seen whole, as large as `max_side` lets it be and
        never enlarged but to `min_side`, cut in the centre to whole patches; clips from their start, moments in the
        middle of their seconds, of assets first the views that their voxels were not made from.
    min_side, max_side, max_upscale: as for `ResolutionSampler`.
    rule: as for `ResolutionSampler`; "auto" is "whole" for understanding, since captions speak of whole pictures, and
        "released" for reconstruction.
    random_crop: in training, draw where to cut instead of the centre.
    frames, strides: of clips that are reconstructed, see `data.decode.temporal`.
    fps, max_frames: of clips that are understood.
    max_voxels: of an asset that is understood, how many are kept in training, drawn anew in each epoch; a category is
        seen in a part of them too, and a small model learns from more assets in the same time. None: all.
    min_voxels: with it, how many are kept is drawn too, from here to `max_voxels`, small numbers more often; a model
        that has seen one number alone has seen no asset as it is.
    turned: in training, see an asset that is understood mirrored and turned by quarters about its vertical axis, one
        of the eight ways an epoch. Its voxels change places; what each shows stays as it is.
    stretched: in training, see it in other proportions: each axis by a factor of up to 1 + `stretched`, or down to the
        reciprocal of that. recoloured: in which share of the epochs it is seen in other colours.
    views: of an asset that is reconstructed, how many a loss compares with; all where it has fewer.
    label_share: in training, in which share of the epochs a sample's label is its caption; classes are then texts that
        a model has been compared with, as in data sets that have labels alone. prompted: in which share of these it
        stands in a prompt ("a photo of a {}"), one of those that zero-shot classification asks with.
    require_caption: leave out samples without one. None: for understanding.
    patch_size: frames, rows and columns of a token.

    Raises:
        InputError: numbers that make no sense, or frames that are no whole patches.
    """

    training: bool = True
    min_side: int = 64
    max_side: int = 512
    rule: Rule | Literal["auto"] = "auto"
    random_crop: bool = True
    max_upscale: float = 2.0
    frames: Range = temporal.FRAMES
    strides: tuple[Range, ...] = temporal.STRIDES
    fps: float = temporal.FPS
    max_frames: int = temporal.MAX_FRAMES
    max_voxels: int | None = None
    min_voxels: int | None = None
    turned: bool = False
    stretched: float = 0.0
    recoloured: float = 0.0
    views: int = 4
    label_share: float = 0.0
    prompted: float = 0.0
    require_caption: bool | None = None
    patch_size: PatchSize = PATCH_SIZE

    def __post_init__(self) -> None:
        steps = self.patch_size[0]
        counts = {"frames": self.frames[0], "the longest run of frames": self.frames[1], "max_frames": self.max_frames}
        for name, count in counts.items():
            if count < steps or count % steps:
                raise InputError(f"{name} must be a multiple of the {steps} frames of a patch, got {count}")
        if self.frames[0] > self.frames[1]:
            raise InputError(f"frames must name the fewest and the most, got {self.frames}")
        if not self.strides or any(not 1 <= low <= high for low, high in self.strides):
            raise InputError(f"strides must be ranges of whole numbers from 1, got {self.strides}")
        if not self.fps > 0 or self.views < 0:
            raise InputError(f"fps must be above 0 and views at least 0, got {self.fps} and {self.views}")
        if self.max_voxels is not None and self.max_voxels < 1:
            raise InputError(f"max_voxels must be at least 1, or left out, got {self.max_voxels}")
        if self.min_voxels is not None and not 1 <= self.min_voxels <= (self.max_voxels or 0):
            raise InputError(
                f"min_voxels must lie in 1..max_voxels, got {self.min_voxels} and max_voxels {self.max_voxels}"
            )
        for name, share in {"label_share": self.label_share, "prompted": self.prompted}.items():
            if not 0 <= share <= 1:
                raise InputError(f"{name} must lie in 0..1, got {share}")
        if wrong := variation.check(self.stretched, self.recoloured):
            raise InputError(wrong)
        _sampler(self, "whole" if self.rule == "auto" else self.rule)  # which checks sides, rule and patch size


class Decoder:
    """Makes an item of a raw sample. Picklable, and holds nothing open.

    Args:
        source: name of the samples' source in the mixture.
        task: what the items are used for.
        kind: what the samples are; must be that of the task.
        settings: how they are read.
        seed: of the run.

    Raises:
        InputError: a kind that does not fit the task, or a missing package: that is no fault of any sample.
    """

    def __init__(
        self, source: str, task: Task, kind: Kind, settings: DecodeSettings | None = None, seed: int = 0
    ) -> None:
        if kind != KINDS[task]:
            raise InputError(f"source '{source}': {task} needs {KINDS[task]}, but its samples are {kind}")
        require_package("ftfy", "cleaning captions", "data")
        if kind == "videos":
            require_package("decord", "reading videos", "data")
        self.source, self.task, self.kind, self.seed = source, task, kind, seed
        self.settings = settings or DecodeSettings()
        understanding = task.endswith("understanding")
        rule = self.settings.rule
        self._understanding = understanding
        self._sampler = _sampler(self.settings, ("whole" if understanding else "released") if rule == "auto" else rule)
        required = self.settings.require_caption
        self._needs_caption = understanding if required is None else required

    def __call__(self, raw: Raw, epoch: int) -> Item:
        """The item of a sample in an epoch (from 0).

        Raises:
            SampleError: whatever is wrong with the sample. Its cause is one of "damaged picture", "damaged video",
                "damaged asset", "damaged facts", "damaged caption", "damaged teacher", "no caption", "too small", "no
                such content".
        """
        extension = self._content(raw)
        common = self._common(raw, epoch)
        if self.kind == "assets":
            return self._asset(raw, epoch, common)
        data, patch = raw.files[extension], self.settings.patch_size

        def view(size: Size) -> View:
            return self._view(size, epoch, raw.id)

        if self.kind == "images":
            pixels = read_picture(data, raw.id, view)
            tokens = token_count((pixels.shape[0], pixels.shape[1]), 1, patch)
        else:
            pixels = read_clip(data, raw.id, view, lambda times: self._frames(times, epoch, raw.id))
            tokens = token_count((pixels.shape[1], pixels.shape[2]), len(pixels), patch)
        return Item(tokens=tokens, pixels=torch.from_numpy(pixels), **common)

    def _content(self, raw: Raw) -> str:
        known = _EXTENSIONS[self.kind]
        for extension in known:
            if extension in raw.files:
                return extension
        held = ", ".join(sorted(raw.files)) or "nothing"
        raise SampleError("no such content", f"{raw.id}: needs one of {', '.join(known)}; it holds {held}")

    def _common(self, raw: Raw, epoch: int) -> dict[str, Any]:
        """What items have in common, whatever they show."""
        try:
            facts = raw.facts()
        except InputError as error:
            raise SampleError("damaged facts", str(error)) from None
        try:
            caption = raw.caption()
        except InputError as error:
            raise SampleError("damaged caption", str(error)) from None
        if self._asks_label(epoch, raw.id) and (label := raw.label()) is not None:
            caption = self._asked(label.lower(), epoch, raw.id)
        caption = clean_caption(caption) if caption else None
        if self._needs_caption and not caption:
            raise SampleError("no caption", f"{raw.id}: has no caption, and {self.task} needs one")
        words = {"id": raw.id, "source": self.source, "task": self.task, "caption": caption or None, "facts": facts}
        return {**words, "teacher": read_teacher(raw.files, raw.id) if self._understanding else None}

    def _asks_label(self, epoch: int, name: str) -> bool:
        """Whether the label is to be the caption of a sample in this epoch."""
        share = self.settings.label_share if self.settings.training else 0.0
        return share > 0 and draws("caption", self.seed, epoch, name, 1)[0] < share

    def _asked(self, label: str, epoch: int, name: str) -> str:
        """A label as it is, or in a prompt."""
        chosen, lot = draws("prompt", self.seed, epoch, name, 2)
        prompts = _PROMPTS[self.kind]
        return prompts[int(lot * len(prompts))].replace("{}", label) if chosen < self.settings.prompted else label

    def _view(self, size: Size, epoch: int, name: str) -> View:
        try:
            if not self.settings.training:
                return _largest_view(size, self._sampler, name)
            return self._sampler.draw(size, seed=self.seed, epoch=epoch, sample=name)
        except InputError as error:
            raise SampleError("too small", str(error)) from None

    def _frames(self, times: Any, epoch: int, name: str) -> list[int]:
        settings, multiple = self.settings, self.settings.patch_size[0]
        drawn = draws("frames", self.seed, epoch, name, temporal.DRAWS) if settings.training else None
        if self._understanding:
            return temporal.understanding_frames(
                times,
                0.5 if drawn is None else drawn[0],
                fps=settings.fps,
                max_frames=settings.max_frames,
                multiple=multiple,
            )
        return temporal.reconstruction_frames(
            len(times), drawn, frames=settings.frames, strides=settings.strides, multiple=multiple
        )

    def _asset(self, raw: Raw, epoch: int, common: dict[str, Any]) -> Item:
        stored = decode_voxels(raw.files, common["facts"], raw.id)
        _, rows, columns = self.settings.patch_size
        if stored.features.shape[1] != rows * columns * 3:
            raise SampleError(
                "damaged asset",
                f"{raw.id}: patches of {stored.features.shape[1]} numbers; {rows} x {columns} pixels have "
                f"{rows * columns * 3}",
            )
        features, coordinates = stored.features, stored.coordinates
        if self._understanding:
            features, coordinates = self._varied(features, coordinates, epoch, raw.id)
        views: Seen | None = None
        if not self._understanding and self.settings.views:
            views = decode_views(raw.files, stored, self._chosen_views(stored.seen.tolist(), epoch, raw.id), raw.id)
        return Item(
            tokens=len(features),
            features=features,
            coordinates=coordinates,
            views=views,
            **common,
        )

    def _kept_voxels(self, count: int, epoch: int, name: str) -> torch.Tensor | slice:
        """Which voxels to keep, in their order."""
        limit = self.settings.max_voxels
        if not self.settings.training or limit is None or count <= limit:
            return slice(None)
        u, v = draws("voxels", self.seed, epoch, name, 2)
        least = limit if self.settings.min_voxels is None else self.settings.min_voxels
        generator = torch.Generator().manual_seed(int(u * 2**53))
        return torch.randperm(count, generator=generator)[: round(least * (limit / least) ** v)].sort().values

    def _varied(
        self, features: torch.Tensor, coordinates: torch.Tensor, epoch: int, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is left of an asset that is understood, as it is seen in this epoch."""
        settings, drawn_by = self.settings, (self.seed, epoch, name)
        rows = None
        if settings.training and settings.stretched:
            rows, coordinates = variation.stretch(coordinates, settings.stretched, *drawn_by)
        kept = self._kept_voxels(len(coordinates), epoch, name)
        # Patches are large: only those that stay are copied.
        features, coordinates = features[kept if rows is None else rows[kept]], coordinates[kept]
        if settings.training and settings.turned:
            coordinates = variation.turn(coordinates, *drawn_by)
        if settings.training and settings.recoloured:
            features = variation.recolour(features, settings.recoloured, *drawn_by)
        return features, coordinates

    def _chosen_views(self, seen: Sequence[bool], epoch: int, name: str) -> list[int]:
        """Different views, seen or not: by lot in training, else the unseen ones first."""
        order = sorted(range(len(seen)), key=lambda number: (seen[number], number))
        count = min(self.settings.views, len(order))
        if self.settings.training:
            for place in range(count):
                (u,) = draws(f"view {place}", self.seed, epoch, name, 1)
                other = place + int(u * (len(order) - place))
                order[place], order[other] = order[other], order[place]
        return order[:count]


def _sampler(settings: DecodeSettings, rule: Rule) -> ResolutionSampler:
    return ResolutionSampler(
        min_side=settings.min_side,
        max_side=settings.max_side,
        rule=rule,
        random_crop=settings.random_crop,
        max_upscale=settings.max_upscale,
        patch_size=settings.patch_size,
    )


def _largest_view(size: Size, sampler: ResolutionSampler, name: str) -> View:
    """The whole picture, as large as the bounds allow, cut in the centre to whole patches."""
    needed = sampler.min_side / min(size)
    if needed > sampler.max_upscale:
        raise InputError(
            f"{name}: {size[0]} x {size[1]} pixels would have to grow by {needed:.3g}; the limit is "
            f"{sampler.max_upscale:g}"
        )
    factor = max(needed, min(1.0, sampler.max_side / max(size)))
    _, *patch = sampler.patch_size
    resized = [max(sampler.min_side, round(side * factor)) for side in size]
    kept = [min(side, sampler.max_side) // step * step for side, step in zip(resized, patch, strict=True)]
    corner = [(whole - part) // 2 for whole, part in zip(resized, kept, strict=True)]
    return View(resized=(resized[0], resized[1]), corner=(corner[0], corner[1]), size=(kept[0], kept[1]))
