"""The best linear code of a size: principal components of pixel patches, the baseline AToken has to beat.

A patch of `frames x 16 x 16 x 3` values is coded by its 48 leading principal components, exactly as many numbers as a
token of the model has. No linear code of that size has a smaller squared error on the patches it was fitted to.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError
from tokenizer.patches import PATCH_SIZE, PatchSize, float_to_uint8, tokens_to_pixels, video_to_tokens

COMPONENTS = 48
IMAGE_PATCH: PatchSize = (1, *PATCH_SIZE[1:])
VIDEO_PATCH: PatchSize = PATCH_SIZE
_NAMES = {"image": IMAGE_PATCH, "video": VIDEO_PATCH}


@dataclass(frozen=True, eq=False)
class LinearCode:
    """A linear code of patches in pixels scaled to [-1, 1]; all tensors float64 on the CPU.

    Attributes:
        patch_size: frames, rows and columns of a patch; P = frames * rows * columns * 3.
        mean: [P] mean patch; features in the order (frame, row, column, channel) of FORMAT 2.
        basis: [P, C] orthonormal columns, the largest variance first.
        variance: [C] variance of each code value.
    """

    patch_size: PatchSize
    mean: Tensor
    basis: Tensor
    variance: Tensor

    @classmethod
    def fit(
        cls, patches: Iterable[NDArray[np.uint8]], patch_size: PatchSize, components: int = COMPONENTS
    ) -> LinearCode:
        """Fit by the covariance, accumulated in float64 batch after batch.

        Args:
            patches: batches of uint8 patches [n, P].
            patch_size: frames, rows and columns of a patch.
            components: length C of the code.

        Raises:
            InputError: no more patches than code values.
        """
        size = _features(patch_size)
        total, products, count = np.zeros(size), np.zeros((size, size)), 0
        for batch in patches:
            # Around mid-grey the sums stay small, so subtracting the mean's square below loses no digits.
            pixels = batch.astype(np.float64) / 127.5 - 1
            total += pixels.sum(0)
            products += pixels.T @ pixels
            count += len(pixels)
        if count <= components:
            raise InputError(f"a linear code of {components} values needs more than {count} patches: add training data")
        mean = total / count
        values, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
        values, basis = values[::-1][:components], vectors[:, ::-1][:, :components]
        # The sign of an eigenvector is free: making its largest entry positive gives the same code everywhere.
        basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(components)])
        return cls(patch_size, *(torch.from_numpy(np.ascontiguousarray(x)) for x in (mean, basis, values.clip(min=0))))

    def encode(self, patches: Tensor) -> Tensor:
        """Patches [n, P] in [-1, 1] -> code [n, C], float64."""
        return (patches.to(self.mean.dtype) - self.mean) @ self.basis

    def decode(self, code: Tensor) -> Tensor:
        """Code [n, C] -> patches [n, P], float64, not clipped."""
        return code.to(self.mean.dtype) @ self.basis.T + self.mean

    def reconstruct(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Code and decode frames of any size, padded to whole patches with edge values and the last frame.

        Args:
            frames: uint8 [T, H, W, 3].

        Returns:
            uint8 [T, H, W, 3], cropped back, rounded and clipped.
        """
        tokens, size = video_to_tokens(torch.from_numpy(frames.astype(np.float64) / 127.5 - 1), self.patch_size)
        decoded = tokens.with_features(self.decode(self.encode(tokens.features)))
        return float_to_uint8(tokens_to_pixels(decoded, [size], self.patch_size)[0]).numpy()


@dataclass(frozen=True, eq=False)
class LinearCodes:
    """The codes of stills and of video, as one codec (`tokenizer.evaluation.nano.Codec`)."""

    image: LinearCode
    video: LinearCode

    @classmethod
    def fit(cls, store: Path, seed: int = 0) -> LinearCodes:
        """Fit both codes to a training store.

        The image code is fitted to the photographs alone: with the drawn pictures and cut-outs among them it measures
        0.2 dB worse on photographs, and a baseline should be as strong as it can be. The video code uses every clip.

        Args:
            store: folder with manifest.json and the arrays it names.
            seed: decides which patches are drawn.

        Raises:
            InputError: no store, or too few photographs or clips in it.
        """
        stills = draw_patches(store, IMAGE_PATCH, seed, per_array=2048, kinds={"photograph"})
        clips = draw_patches(store, VIDEO_PATCH, seed, per_array=512)
        return cls(LinearCode.fit(stills, IMAGE_PATCH), LinearCode.fit(clips, VIDEO_PATCH))

    def reconstruct(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [T, H, W, 3] -> the same shape; a single frame is coded as a still."""
        return (self.image if len(frames) == 1 else self.video).reconstruct(frames)

    def save(self, path: Path) -> None:
        """Write `image_mean`, `image_basis`, `image_var` and the same for `video` to an .npz file."""
        arrays: dict[str, Any] = {}
        for name, code in (("image", self.image), ("video", self.video)):
            arrays |= {f"{name}_mean": code.mean, f"{name}_basis": code.basis, f"{name}_var": code.variance}
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **{name: tensor.numpy() for name, tensor in arrays.items()})

    @classmethod
    def load(cls, path: Path) -> LinearCodes:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, damaged or holds something else.
        """
        codes = {}
        try:
            with np.load(path, allow_pickle=False) as file:
                for name, patch_size in _NAMES.items():
                    mean, basis, variance = (file[f"{name}_{part}"] for part in ("mean", "basis", "var"))
                    if basis.shape != (_features(patch_size), len(variance)) or mean.shape != basis.shape[:1]:
                        raise InputError(f"{path}: its {name} code has basis {basis.shape}: fit the linear code again")
                    tensors = (torch.from_numpy(array.astype(np.float64)) for array in (mean, basis, variance))
                    codes[name] = LinearCode(patch_size, *tensors)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: not a linear code ({type(error).__name__}): fit it again") from None
        return cls(**codes)


def draw_patches(
    store: Path, patch_size: PatchSize, seed: int, *, per_array: int, kinds: Collection[str] | None = None
) -> Iterator[NDArray[np.uint8]]:
    """Draw patches at random places (not on a grid) from the images or, for several frames, the clips of a store.

    Args:
        store: folder with manifest.json and the arrays it names, written by `python -m data.sources.nano`.
        patch_size: frames, rows and columns; one frame draws from images, more from clips.
        seed: decides the places.
        per_array: patches of each image or clip.
        kinds: use only arrays of these kinds; all by default.

    Yields:
        uint8 [per_array, P], one batch for every array that is large enough.

    Raises:
        InputError: `store` is not a training store, or an array it names cannot be read.
    """
    folder = "images/" if patch_size[0] == 1 else "clips/"
    entries = [entry for entry in _manifest(store) if entry["path"].startswith(folder)]
    rng = np.random.default_rng([seed, patch_size[0]])
    for entry in entries:
        if kinds is not None and entry["kind"] not in kinds:
            continue
        frames = _frames(store / entry["path"])
        limits = [size - patch + 1 for size, patch in zip(frames.shape, patch_size, strict=False)]
        if min(limits) < 1:
            continue
        corners = np.stack([rng.integers(0, limit, size=per_array) for limit in limits], axis=1).tolist()
        dt, dx, dy = patch_size
        yield np.stack([frames[t : t + dt, x : x + dx, y : y + dy].reshape(-1) for t, x, y in corners])


def _features(patch_size: PatchSize) -> int:
    return patch_size[0] * patch_size[1] * patch_size[2] * 3


def _manifest(store: Path) -> list[dict[str, Any]]:
    try:
        entries: list[dict[str, Any]] = json.loads((store / "manifest.json").read_text(encoding="utf-8"))["arrays"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{store}: no training store here; build one: python -m data.sources.nano --out {store}"
        ) from None
    return entries


def _frames(path: Path) -> NDArray[np.uint8]:
    """The array as [T, H, W, 3], memory-mapped."""
    try:
        array: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error}): build the training store again") from None
    return array[None] if array.ndim == 3 else array
