"""One 3D asset through the model: encode, decode, reconstruct. The commands come here from `tokenizer.cli.codec`."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tokenizer.api import AToken, VisualEncoding
from tokenizer.assets.load import load_mesh
from tokenizer.assets.mesh import Mesh
from tokenizer.assets.pipeline import VIEWS, is_views
from tokenizer.assets.raycast import render_views
from tokenizer.assets.rules import PackingRule
from tokenizer.assets.views import TRANSFORMS_FILE, Views
from tokenizer.cameras import Cameras, sphere_cameras, turntable_cameras
from tokenizer.cli.inputs import find_inputs, is_asset_input
from tokenizer.cli.jobs import Job, refuse_own_source
from tokenizer.cli.outcome import Result
from tokenizer.cli.progress import ProgressBars
from tokenizer.errors import InputError
from tokenizer.evaluation.metrics import ReconstructionMeter
from tokenizer.gaussians import Gaussians
from tokenizer.gaussians.ply import write_ply
from tokenizer.gaussians.rasterize import rasterize
from tokenizer.media import VideoWriter, save_image
from tokenizer.tokenfile import TokenFile, TokenReader
from tokenizer.voxels import AssetSize

__all__ = ["AssetCodec", "asset_files", "find_inputs", "is_asset_input"]

PLY = ".ply"
ENDINGS = {"gaussians": PLY, "sheet": "-sheet.png", "turntable": "-turntable.mp4"}
"""What a reconstruction is written to, after its name."""
SIZE = 256
SHEET_VIEWS, SHEET_PHASE = 8, 1.0
"""Views that reconstructions are measured on, and the turn of their cameras: others than the model has seen."""
TURN_FRAMES, FRAME_RATE = 24, Fraction(12)
VIEWS_RADIUS = 0.75
"""Of the sphere that a turntable of views shows; there is no mesh to ask for its own."""
PAPER = 1.0
"""Ground of pictures for people. Figures are measured on black."""

Pixels = NDArray[np.uint8]


def asset_files(job: Job) -> dict[str, Path]:
    """What a reconstruction is written to, by what it is."""
    base = job.target if job.needs_ending else job.target.with_suffix("")
    return {what: base.with_name(base.name + ending) for what, ending in ENDINGS.items()}


class AssetCodec:
    """Applies a model to files of assets.

    Args:
        model: with a Gaussian decoder for everything but `encode`.
        packing: how views become voxels; by default what fits the model.
        original: decode to the axes and units of the asset's file.
    """

    def __init__(self, model: AToken, packing: PackingRule | None = None, *, original: bool = False) -> None:
        self.model, self.packing, self.original = model, packing, original

    def encode(self, job: Job, target: Path, progress: ProgressBars) -> Result:
        """A mesh or views -> a token file."""
        encoding = self._encode(job.source, _source(job.source), progress)
        encoding.save(target)
        return {
            "out": str(target),
            "kind": "asset",
            "tokens": encoding.tokens.num_tokens,
            "bytes": target.stat().st_size,
        }

    def decode(self, job: Job, reader: TokenReader) -> Result:
        """A token file -> a .ply file of Gaussians."""
        target = job.target_with(PLY)
        if target.suffix.lower() != PLY:
            raise InputError(f"{target}: 3D assets are decoded to {PLY} files of Gaussians")
        gaussians = self.model.decode_asset(TokenFile.load(job.source), original=self.original)
        write_ply(gaussians, target)
        return {"out": str(target), "kind": "asset", "tokens": reader.num_tokens, "gaussians": len(gaussians)}

    def reconstruct(self, job: Job, progress: ProgressBars) -> Result:
        """A mesh or views -> Gaussians, a contact sheet and a turntable clip (`ENDINGS`), and the figures.

        Originals stand above or to the left of reconstructions. Figures are of views that the model has not seen,
        where they can be had: views alone are compared with themselves, and turn without an original beside them.
        """
        if not job.needs_ending and job.target.suffix.lower() != PLY:
            raise InputError(f"{job.target}: the reconstruction of a 3D asset is a {PLY} file; its clip and contact "
                             "sheet get the same name")  # fmt: skip
        files = asset_files(job)
        for file in files.values():
            refuse_own_source(job, file)
        asset = _source(job.source)
        encoding = self._encode(job.source, asset, progress)
        gaussians = self.model.decode_asset(encoding)
        meter = ReconstructionMeter()
        progress.start_frames(f"{job.source.name}, drawing", SHEET_VIEWS + TURN_FRAMES)
        sheet = self._sheet(asset, gaussians, meter, progress)
        write_ply(gaussians, files["gaussians"])
        save_image(sheet, files["sheet"])
        self._turn(asset, gaussians, files["turntable"], progress)
        assert isinstance(encoding.size, AssetSize)
        return {
            "out": str(files["gaussians"]),
            "files": [str(file) for file in files.values()],
            "kind": "asset",
            "tokens": encoding.tokens.num_tokens,
            "bits": round(encoding.tokens.num_tokens * self._bits_per_token(encoding)),
            "gaussians": len(gaussians),
            "views": "unseen" if isinstance(asset, Mesh) else "seen",
            "psnr": round(meter.psnr, 3),
            "ssim": round(meter.ssim, 5),
        }

    def _encode(self, source: Path, asset: Mesh | Views, progress: ProgressBars) -> VisualEncoding:
        progress.start_frames(f"{source.name}, views", VIEWS)
        try:
            return self.model.encode_asset(asset, self.packing, on_view=lambda: progress.advance_frames(1))
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def _bits_per_token(self, encoding: VisualEncoding) -> float:
        if self.model.quantizer is not None:
            return self.model.quantizer.bits_per_token
        latents = encoding.tokens.features
        return float(latents.shape[1] * latents.element_size() * 8)

    def _sheet(
        self, asset: Mesh | Views, gaussians: Gaussians, meter: ReconstructionMeter, progress: ProgressBars
    ) -> Pixels:
        """Views of the original above those of the reconstruction: uint8 [2 H, V W, 3]."""
        if isinstance(asset, Mesh):
            mesh = asset.normalised()
            originals = render_views(mesh, sphere_cameras(SHEET_VIEWS, mesh.radius, phase=SHEET_PHASE), SIZE)
        else:
            originals = Views(asset.colours[:SHEET_VIEWS], asset.depth[:SHEET_VIEWS], asset.cameras[:SHEET_VIEWS])
        rows = []
        for number in range(len(originals)):
            camera = originals.cameras[number : number + 1]
            for ground in (0.0, PAPER):
                shown = _drawn(gaussians, camera, originals.size, ground)
                original = _uint8(originals.composited(ground)[number])
                if ground == PAPER:
                    rows.append(np.concatenate([original, shown], axis=0))
                else:
                    meter.update(original[None], shown[None])
            progress.advance_frames(1)
        return np.concatenate(rows, axis=1)

    def _turn(self, asset: Mesh | Views, gaussians: Gaussians, target: Path, progress: ProgressBars) -> None:
        mesh = asset.normalised() if isinstance(asset, Mesh) else None
        cameras = turntable_cameras(TURN_FRAMES, mesh.radius if mesh is not None else VIEWS_RADIUS)
        originals = render_views(mesh, cameras, SIZE, samples=2).composited(PAPER) if mesh is not None else None
        with VideoWriter(target, FRAME_RATE, SIZE, SIZE * (2 if mesh is not None else 1)) as writer:
            for number in range(TURN_FRAMES):
                frame = _drawn(gaussians, cameras[number : number + 1], SIZE, PAPER)
                if originals is not None:
                    frame = np.concatenate([_uint8(originals[number]), frame], axis=1)
                writer.write(frame[None])
                progress.advance_frames(1)


def _source(path: Path) -> Mesh | Views:
    """What lies at `path`; remarks about missing textures go to stderr."""
    if is_views(path):
        return Views.load(path.parent if path.name == TRANSFORMS_FILE else path)
    with _remarks():
        return load_mesh(path)


@contextlib.contextmanager
def _remarks() -> Iterator[None]:
    from tokenizer.assets.materials import AssetWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AssetWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, AssetWarning):
            print(f"note: {warning.message}", file=sys.stderr)


def _drawn(gaussians: Gaussians, camera: Cameras, size: int, ground: float) -> Pixels:
    with torch.no_grad():
        return _uint8(rasterize(gaussians, camera, size, background=(ground,) * 3).colours[0])


def _uint8(picture: torch.Tensor) -> Pixels:
    """[H, W, 3] in 0..1 -> uint8."""
    pixels: Pixels = (picture.clamp(0, 1) * 255 + 0.5).byte().cpu().numpy()
    return pixels
