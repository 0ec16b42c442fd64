"""One file through the model: encode, decode, reconstruct. Videos pass tile by tile, in bounded memory; 3D assets go to
`tokenizer.cli.assets`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenizer.api import AToken
from tokenizer.assets.rules import PackingRule
from tokenizer.cli.assets import AssetCodec, asset_files
from tokenizer.cli.inputs import is_asset_input
from tokenizer.cli.jobs import Job, refuse_own_source
from tokenizer.cli.outcome import Result
from tokenizer.cli.progress import ProgressBars
from tokenizer.errors import InputError
from tokenizer.evaluation.metrics import ReconstructionMeter
from tokenizer.media import VideoReader, VideoWriter, load_image, media_kind, save_image
from tokenizer.media.images import check_image_ending
from tokenizer.media.writers import check_video_ending
from tokenizer.patches import VisualSize, float_to_uint8, uint8_to_float
from tokenizer.streaming import decode_stream, encode_stream
from tokenizer.tokenfile import SUFFIX, TokenFile, TokenReader, TokenWriter, check_same_space
from tokenizer.voxels import AssetSize

Pixels = NDArray[np.uint8]


class FileCodec:
    """Applies a model to files.

    Args:
        model: on its device, in its precision.
        image_ending, video_ending: of results whose name leaves the ending open; "" is a folder of PNG frames.
        packing, original: see `AssetCodec`.
    """

    def __init__(
        self,
        model: AToken,
        image_ending: str = ".png",
        video_ending: str = ".mp4",
        packing: PackingRule | None = None,
        *,
        original: bool = False,
    ) -> None:
        self.model = model
        self.assets = AssetCodec(model, packing, original=original)
        self.endings = {"image": image_ending, "video": video_ending}

    def encode(self, job: Job, progress: ProgressBars) -> Result:
        """A picture, video or asset file -> a token file."""
        target = job.target_with(SUFFIX)
        refuse_own_source(job, target)
        if is_asset_input(job.source):
            return self.assets.encode(job, target, progress)
        size, tokens = self._encode_file(job.source, target, progress)
        return {"out": str(target), **_describe(size), "tokens": tokens, "bytes": target.stat().st_size}

    def decode(self, job: Job, progress: ProgressBars) -> Result:
        """A token file -> a picture, a video, or a .ply file of Gaussians."""
        reader = self._open_tokens(job.source)
        size = reader.origin.sizes[0]
        if isinstance(size, AssetSize):
            return self.assets.decode(job, reader)
        target = self._target(job, size.kind)
        if size.kind == "image":
            check_image_ending(target)
            save_image(self.model.decode_visual(TokenFile.load(job.source))[0], target)
        else:
            with VideoWriter(target, self._frame_rate(reader), size.height, size.width) as writer:
                progress.start_frames(job.source.name, size.frames)
                for frames in self._decoded_blocks(reader):
                    writer.write(frames)
                    progress.advance_frames(len(frames))
        return {"out": str(target), **_describe(size), "tokens": reader.num_tokens}

    def reconstruct(self, job: Job, progress: ProgressBars) -> Result:
        """A picture, video or asset file -> original and reconstruction side by side, and how close they are.

        A video is read twice: its tokens wait in a temporary token file, so that memory does not grow with its length.
        """
        if is_asset_input(job.source):
            return self.assets.reconstruct(job, progress)
        kind = media_kind(job.source)
        target = self._target(job, kind)
        refuse_own_source(job, target)
        (check_image_ending if kind == "image" else check_video_ending)(target)
        with tempfile.TemporaryDirectory() as folder:
            tokens = Path(folder) / f"tokens{SUFFIX}"
            size, count = self._encode_file(job.source, tokens, progress)
            reader = TokenReader(tokens)
            meter = ReconstructionMeter()
            if kind == "image":
                original = load_image(job.source)[None]
                copy = self.model.decode_visual(TokenFile.load(tokens))
                meter.update(original, copy)
                save_image(_side_by_side(original, copy)[0], target)
            else:
                self._compare_video(job.source, reader, target, meter, progress)
            bits = count * self._bits_per_token(reader)
        pixels = size.frames * size.height * size.width
        return {
            "out": str(target),
            **_describe(size),
            "tokens": count,
            "bits_per_pixel": round(bits / pixels, 4),
            "psnr": round(meter.psnr, 3),
            "ssim": round(meter.ssim, 5),
        }

    def _encode_file(self, source: Path, target: Path, progress: ProgressBars) -> tuple[VisualSize, int]:
        """Write the tokens of a file; returns its size and how many tokens it became."""
        if media_kind(source) == "image":
            encoding = self.model.encode_image(source)
            encoding.save(target)
            return _pixel_size(encoding.size), encoding.tokens.num_tokens
        reader = VideoReader(source)
        frames = 0
        with TokenWriter(target) as writer:
            progress.start_frames(source.name, reader.num_frames)
            for tile in encode_stream(self.model, (uint8_to_float(torch.from_numpy(block)) for block in reader)):
                indices = tile.encoding.indices
                writer.append(tile.encoding.latents if indices is None else indices)
                frames += tile.frames
                progress.advance_frames(tile.frames)
            size = VisualSize("video", frames, reader.height, reader.width)
            writer.finish(self.model.origin([size], [float(reader.fps)]), [writer.num_tokens])
        return size, writer.num_tokens

    def _compare_video(
        self, source: Path, tokens: TokenReader, target: Path, meter: ReconstructionMeter, progress: ProgressBars
    ) -> None:
        size = _pixel_size(tokens.origin.sizes[0])
        originals = VideoReader(source).frames()
        progress.start_frames(f"{source.name}, decoding", size.frames)
        with VideoWriter(target, self._frame_rate(tokens), size.height, 2 * size.width) as writer:
            for copy in self._decoded_blocks(tokens):
                original = np.stack([next(originals) for _ in copy])
                meter.update(original, copy)
                writer.write(_side_by_side(original, copy))
                progress.advance_frames(len(copy))

    def _decoded_blocks(self, reader: TokenReader) -> Iterator[Pixels]:
        """Decode the video of a token file: uint8 [T, H, W, 3] blocks."""
        size = _pixel_size(reader.origin.sizes[0])
        _, rows, columns = size.grid(self.model.config.patch_size)
        tile = rows * columns * self.model.config.tile_steps
        for frames in decode_stream(self.model, reader.chunks(tile), size):
            yield float_to_uint8(frames).cpu().numpy()

    def _open_tokens(self, path: Path) -> TokenReader:
        reader = TokenReader(path)
        check_same_space(reader.origin, self.model.config.name, self.model.fingerprint)
        if len(reader.origin.sizes) != 1:
            raise InputError(f"{path}: holds {len(reader.origin.sizes)} visuals; decode it from Python, one by one")
        return reader

    def _target(self, job: Job, kind: str) -> Path:
        return job.target_with(self.endings[kind])

    def _bits_per_token(self, reader: TokenReader) -> float:
        if reader.discrete:
            assert self.model.quantizer is not None
            return self.model.quantizer.bits_per_token
        latents, _ = reader.rows(0, 1)
        return float(latents.shape[1] * latents.element_size() * 8)

    @staticmethod
    def _frame_rate(reader: TokenReader) -> Fraction:
        # Stored as a float; 29.97... comes back as 30000/1001.
        return Fraction(reader.origin.frame_rates[0]).limit_denominator(1001)


def reconstructed_files(job: Job, image_ending: str, video_ending: str) -> list[Path]:
    """Every file that `FileCodec.reconstruct` writes for a job; none for a source that cannot be read."""
    if is_asset_input(job.source):
        return list(asset_files(job).values())
    if not job.needs_ending:
        return [job.target]
    try:
        ending = {"image": image_ending, "video": video_ending}[media_kind(job.source)]
    except (InputError, OSError):  # reported when it is its turn
        return []
    return [job.target_with(ending)]


def _pixel_size(size: VisualSize | AssetSize) -> VisualSize:
    assert isinstance(size, VisualSize)
    return size


def _describe(size: VisualSize) -> dict[str, Any]:
    return {"kind": size.kind, "frames": size.frames, "height": size.height, "width": size.width}


def _side_by_side(original: Pixels, copy: Pixels) -> Pixels:
    """[T, H, W, 3] twice -> [T, H, 2 W, 3], the original on the left."""
    return np.concatenate([original, copy], axis=2)
