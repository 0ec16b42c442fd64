"""A raw sample becomes what is measured: frames for pictures and clips, views for assets."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tokenizer.assets.views import TRANSFORMS_FILE, Views
from tokenizer.errors import InputError
from tokenizer.evaluation.command.datasets import PackedAsset, RawSample
from tokenizer.evaluation.command.presets import Kind, Preset
from tokenizer.media import VideoReader, load_image
from tokenizer.training.asset_store import StoredAsset

if TYPE_CHECKING:
    from tokenizer.assets.mesh import Mesh

Frames = NDArray[np.uint8]

PHASE = 1.0
"""The turn of the cameras that assets are measured from: others than the model has seen."""


@dataclass(frozen=True, slots=True)
class Asset:
    """An asset to encode: seen views with depth, or voxels. wanted: views to draw, whose pictures are the frames."""

    source: Views | PackedAsset
    wanted: Views


@dataclass(frozen=True, slots=True)
class Sample:
    """What is measured.

    id, kind, captions, label: as of the `RawSample`.
    sha256: of its content.
    frames: uint8 [T, H, W, 3]; T = 1 for a picture; of an asset its unseen views on black.
    frame_rate: frames a second, 0 where there are none.
    understood: frames [S, H, W, 3] that are understood, each alone; empty where nothing is.
    asset: of an asset.
    """

    id: str
    kind: Kind
    sha256: str
    frames: Frames
    frame_rate: float = 0.0
    understood: Frames | None = None
    captions: tuple[str, ...] = ()
    label: str | None = None
    asset: Asset | None = None


def load_sample(raw: RawSample, preset: Preset) -> Sample:
    """Decode a sample as a preset wants it.

    Raises:
        InputError: it is broken, or its kind is not measured by the preset.
    """
    if raw.fault is not None:
        raise InputError(raw.fault)
    if raw.kind not in preset.kinds:
        raise InputError(f"{raw.id}: is of kind '{raw.kind}'; preset {preset.name} measures {', '.join(preset.kinds)}")
    captions, digest = tuple(raw.captions), raw.digest()
    if raw.kind == "asset":
        asset = _load_asset(raw, preset)
        pictures = (asset.wanted.composited() * 255).round().byte().numpy()
        return Sample(raw.id, "asset", digest, pictures, captions=captions, label=raw.label, asset=asset)
    content = raw.content
    if not isinstance(content, (bytes, Path)):
        raise InputError(f"{raw.id}: is a {raw.kind} and holds an asset")
    if raw.kind == "image":
        frame = preset.fit(load_image(content))[None]
        return Sample(raw.id, "image", digest, frame, understood=frame, captions=captions, label=raw.label)
    if isinstance(content, Path):
        frames, understood, rate = _load_clip(content, preset)
    else:
        frames, understood, rate = _clip_of_bytes(content, raw.id, preset)
    return Sample(raw.id, "video", digest, frames, rate, understood, captions, raw.label)


def _clip_of_bytes(content: bytes, name: str, preset: Preset) -> tuple[Frames, Frames | None, float]:
    """As `_load_clip`; errors name the sample, not the temporary file."""
    with tempfile.NamedTemporaryFile(suffix=Path(name).suffix) as file:
        file.write(content)
        file.flush()
        try:
            return _load_clip(Path(file.name), preset)
        except InputError as error:
            raise InputError(str(error).replace(file.name, name)) from None


def _load_clip(path: Path, preset: Preset) -> tuple[Frames, Frames | None, float]:
    """Frames that are reconstructed, frames that are understood, frames a second."""
    reader = VideoReader(path)
    count = reader.num_frames
    first = range(min(count, preset.frames or count)) if "reconstruction" in preset.tasks else range(0)
    spread: Sequence[int] = []
    if {"zero-shot", "retrieval"} & set(preset.tasks):
        # The middles of equal parts, so that neither title nor end of a clip counts more than the rest.
        spread = sorted({int((number + 0.5) * count / preset.spread) for number in range(preset.spread)})
    wanted, kept = set(first) | set(spread), {}
    for number, frame in enumerate(reader.frames()):
        if number in wanted:
            kept[number] = preset.fit(frame, video=True)
        if number >= max(wanted):
            break
    understood = np.stack([kept[number] for number in spread if number in kept]) if spread else None
    reconstructed = [kept[number] for number in first if number in kept]
    frames = np.stack(reconstructed) if reconstructed else understood
    assert frames is not None, "a clip has a frame"
    return frames, understood, float(reader.fps)


def _load_asset(raw: RawSample, preset: Preset) -> Asset:
    from tokenizer.assets.load import load_mesh
    from tokenizer.assets.pipeline import is_views

    content = raw.content
    if isinstance(content, bytes):
        raise InputError(f"{raw.id}: meshes are read from files of their own, not from shards")
    if isinstance(content, StoredAsset):
        return Asset(content.views("seen"), _some(content.views("unseen"), preset.views))
    if not isinstance(content, Path):
        return Asset(content, _some(content.views, preset.views))
    if is_views(content):
        # Nothing but these views is known of it, so they are what is drawn too.
        views = Views.load(content.parent if content.name == TRANSFORMS_FILE else content)
        return Asset(views, _some(views, preset.views))
    return _rendered(load_mesh(content), preset)


def _rendered(mesh: Mesh, preset: Preset) -> Asset:
    from tokenizer.assets.pipeline import asset_views
    from tokenizer.assets.raycast import render_views
    from tokenizer.cameras import sphere_cameras

    seen, _ = asset_views(mesh)
    mesh = mesh.normalised()
    cameras = sphere_cameras(preset.views, mesh.radius, phase=PHASE)
    return Asset(seen, render_views(mesh, cameras, preset.view_size))


def _some(views: Views, count: int) -> Views:
    return Views(views.colours[:count], views.depth[:count], views.cameras[:count])
