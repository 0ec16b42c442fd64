"""Random crops from a training store: a folder of uint8 arrays with a manifest (`python -m data.sources.nano`).

Every batch is a function of (seed, step), so a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tokenizer.config import read_mapping
from tokenizer.errors import InputError
from tokenizer.patches import PatchSize, grid_positions, patchify, uint8_to_float
from tokenizer.sparse import SparseTokens
from tokenizer.training.config import BatchConfig

VALIDATION_SHARE = 16
"""One source file in this many is kept for validation."""


@dataclass(frozen=True, slots=True)
class CropBatch:
    """Patches of a step: the image items first, then the clips.

    patches: [N, P] in [-1, 1].
    images / clips: number of items; image_tokens: number of rows that belong to images.
    """

    patches: SparseTokens
    images: int
    clips: int
    image_tokens: int
    image_side: int


class TrainingStore:
    """Arrays of a store, memory-mapped, split by source file into training and validation."""

    def __init__(self, folder: str | Path, config: BatchConfig, *, validation: bool = False) -> None:
        self.folder = Path(folder)
        manifest = self.folder / "manifest.json"
        if not manifest.is_file():
            raise InputError(
                f"{self.folder}: no training store here; make one with: python -m data.sources.nano --out {folder}"
            )
        kinds = config.kinds
        values = read_mapping(manifest)
        try:
            chosen = [e for e in values["arrays"] if kinds.get(e["kind"], 0) > 0 and _is_validation(e) == validation]
            pictures = [e for e in chosen if e["path"].startswith("images/")]
            clips = [e for e in chosen if e["path"].startswith("clips/")]
            if config.largest_side is not None:
                pictures = [e for e in pictures if min(e["size"][:2]) <= config.largest_side]
            self._images, self._clips = (_Weighted(self.folder, part, kinds) for part in (pictures, clips))
        except (KeyError, TypeError, ValueError, EOFError) as error:
            raise InputError(f"{manifest}: damaged ({type(error).__name__}: {error}); make the store again") from None

    def batch(self, config: BatchConfig, patch_size: PatchSize, seed: tuple[int, ...]) -> CropBatch:
        """The batch for `seed`, for example (run seed, step).

        Raises:
            InputError: crops that are no whole patches, or that the store has no arrays for.
        """
        _check_whole(config, patch_size)
        rng = np.random.default_rng(seed)
        image_side, clip_side = int(rng.choice(config.image_sides)), int(rng.choice(config.clip_sides))
        images = [self._images.crop(rng, 1, image_side) for _ in range(config.images)]
        clips = [self._clips.crop(rng, config.clip_frames, clip_side) for _ in range(config.clips)]
        parts = [_tokens(pixels, patch_size) for pixels in (*images, *clips)]
        return CropBatch(
            patches=SparseTokens.cat(parts),
            images=len(images),
            clips=len(clips),
            image_tokens=sum(part.num_tokens for part in parts[: len(images)]),
            image_side=image_side,
        )

    def sample_patches(self, count: int, patch_size: PatchSize, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Random patches for fitting linear codes, in [-1, 1], 16 neighbours from each of count / 16 places.

        Returns:
            Stills [count / 16, 16, P / Pt] and clips [count / 16, 16, P].
        """
        rng = np.random.default_rng(seed)
        side = 4 * patch_size[1]

        def sample(source: _Weighted, frames: int) -> Tensor:
            pixels = (torch.from_numpy(source.crop(rng, frames, side)) for _ in range(count // 16))
            return torch.stack([patchify(uint8_to_float(p), (frames, *patch_size[1:])) for p in pixels])

        return sample(self._images, 1), sample(self._clips, patch_size[0])


class _Weighted:
    """Arrays drawn by the weight of their kind, shared equally by the arrays of that kind."""

    def __init__(self, folder: Path, entries: list[dict[str, object]], kinds: Mapping[str, float]) -> None:
        self._arrays = [np.load(folder / str(entry["path"]), mmap_mode="r") for entry in entries]
        names = [str(entry["kind"]) for entry in entries]
        weights = np.array([kinds[name] / names.count(name) for name in names])
        self._weights = weights / weights.sum() if len(weights) else weights

    def crop(self, rng: np.random.Generator, frames: int, side: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """A random crop [frames, side, side, 3], mirrored at random; clips may run backwards."""
        if not self._arrays:
            raise InputError(
                f"the store has no {'images' if frames == 1 else 'clips'} of the kinds in batch.kinds, or none in this "
                f"part: one source file in {VALIDATION_SHARE} is for validation and the others for training"
            )
        for _ in range(100):
            array = self._arrays[int(rng.choice(len(self._arrays), p=self._weights))]
            array = array[None] if array.ndim == 3 else array
            if array.shape[0] >= frames and min(array.shape[1:3]) >= side:
                break
        else:
            raise InputError(
                f"the store has hardly any array of {frames} frames and {side} pixels; choose smaller crops"
            )
        t, y, x = (
            int(rng.integers(have - want + 1)) for have, want in zip(array.shape, (frames, side, side), strict=False)
        )
        pixels = array[t : t + frames, y : y + side, x : x + side]
        if rng.random() < 0.5:
            pixels = pixels[:, :, ::-1]
        if rng.random() < 0.5:
            pixels = pixels[::-1]
        return np.ascontiguousarray(pixels)


def _check_whole(config: BatchConfig, patch_size: PatchSize) -> None:
    sides = (*config.image_sides, *config.clip_sides)
    if not (config.image_sides and config.clip_sides) or any(s < 1 or s % p for s in sides for p in patch_size[1:]):
        raise InputError(f"batch.image_sides and batch.clip_sides must be multiples of {patch_size[1:]}, got {sides}")
    if config.clip_frames < 1 or config.clip_frames % patch_size[0]:
        raise InputError(f"batch.clip_frames must be a multiple of {patch_size[0]}, got {config.clip_frames}")


def _tokens(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], patch_size: PatchSize) -> SparseTokens:
    frames = uint8_to_float(torch.from_numpy(pixels))
    if len(frames) == 1:
        frames = torch.cat([frames, frames.new_zeros(patch_size[0] - 1, *frames.shape[1:])])
    grid = (frames.shape[0] // patch_size[0], frames.shape[1] // patch_size[1], frames.shape[2] // patch_size[2])
    features = patchify(frames, patch_size)
    return SparseTokens(features, grid_positions(grid), [len(features)])


def _is_validation(entry: dict[str, object]) -> bool:
    # By source file, so that no scale or motion of a validation picture is trained on.
    import zlib

    files = entry["file"]
    names = files if isinstance(files, list) else [files]
    return any(zlib.crc32(str(name).encode()) % VALIDATION_SHARE == 0 for name in names)
