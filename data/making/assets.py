"""3D assets as records of a shard: rendered once, kept as voxels and views."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.decode.assets import encode_asset_files
from data.making.captions import Captions
from data.making.media import key_of, record
from data.shards.manifest import Skipped
from data.shards.writer import Record
from tokenizer.assets.load import load_mesh
from tokenizer.assets.packing import pack
from tokenizer.assets.pipeline import VIEW_SAMPLES, VIEW_SIZE, VIEWS
from tokenizer.assets.raycast import render_views
from tokenizer.assets.rules import PackingRule
from tokenizer.assets.views import TRANSFORMS_FILE, Views
from tokenizer.cameras import sphere_cameras
from tokenizer.errors import InputError

UNSEEN_PHASE = 1.0
"""Turn of the unseen cameras against the seen ones, in radians."""


@dataclass(frozen=True, slots=True)
class AssetMaker:
    """One mesh, or folder of views, -> one record.

    captions: finds caption and label.
    rule, resolution: see `tokenizer.assets.packing`.
    unseen: views for losses alone; folders of views have none.
    views: that a mesh is seen from; a folder has its own.
    """

    captions: Captions
    rule: PackingRule = "surface"
    resolution: int = 64
    unseen: int = 8
    views: int = VIEWS

    def __call__(self, file: Path) -> Iterator[Record | Skipped]:
        """The record of a file, or why there is none."""
        shown = file.parent if file.name == TRANSFORMS_FILE else file
        name = shown.relative_to(self.captions.root).as_posix()
        try:
            facts = self.captions.facts(shown)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # remarks about odd meshes; what matters is an error
                seen, unseen, to_original = self._views(file)
            voxels = pack(seen, self.rule, self.resolution, torch.Generator().manual_seed(0))
            files, more = encode_asset_files(
                voxels.features,
                voxels.coordinates,
                self.resolution,
                self.rule,
                seen,
                unseen,
                to_original=to_original.tolist(),
            )
        except InputError as error:
            yield Skipped(name, str(error))
            return
        yield record(key_of(name) if name != "." else "asset", files, facts, file=name, **more)

    def _views(self, file: Path) -> tuple[Views, Views | None, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
        """Seen and unseen views, and the way back to the asset's own axes."""
        if file.name == TRANSFORMS_FILE:
            return Views.load(file.parent), None, np.eye(4)
        mesh = load_mesh(file).normalised()
        seen = render_views(mesh, sphere_cameras(self.views, mesh.radius), VIEW_SIZE, samples=VIEW_SAMPLES)
        unseen = None
        if self.unseen:
            cameras = sphere_cameras(self.unseen, mesh.radius, phase=UNSEEN_PHASE)
            unseen = render_views(mesh, cameras, VIEW_SIZE, samples=VIEW_SAMPLES)
        return seen, unseen, mesh.to_original.astype(np.float64)
