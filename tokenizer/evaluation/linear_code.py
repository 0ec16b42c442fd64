"""The best linear code of a size: principal components of pixel patches, the baseline AToken has to beat.

A patch of `frames x 16 x 16 x 3` values is coded by its 48 leading principal components, exactly as many numbers as a
token of the model has. No linear code of that size has a smaller squared error on the patches it was fitted to.

`tests/linear_code.npz` was fitted once, to photographs and clips of the packages that `data.sources` names, at short
sides of 256, 384 and 640 pixels. A new one is fitted to the data of a run (`fit_to_training_data`).
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.atomic import atomic_path
from tokenizer.config import load_config
from tokenizer.errors import InputError
from tokenizer.patches import PATCH_SIZE, PatchSize, float_to_uint8, tokens_to_pixels, video_to_tokens

COMPONENTS = 48
PATCHES = 48_000
"""That a code is fitted to, of stills and of clips."""
IMAGE_PATCH: PatchSize = (1, *PATCH_SIZE[1:])
VIDEO_PATCH: PatchSize = PATCH_SIZE
_NAMES = {"image": IMAGE_PATCH, "video": VIDEO_PATCH}
_BATCH = 4096


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
    def fit(cls, patches: Iterable[Tensor], patch_size: PatchSize, components: int = COMPONENTS) -> LinearCode:
        """Fit by the covariance, accumulated in float64 batch after batch.

        Args:
            patches: batches [n, P] of values in [-1, 1], floating.
            patch_size: frames, rows and columns of a patch.
            components: length C of the code.

        Raises:
            InputError: no more patches than code values.
        """
        size = _features(patch_size)
        total, products, count = np.zeros(size), np.zeros((size, size)), 0
        for batch in patches:
            # Values around zero keep the sums small, so subtracting the mean's square below loses no digits.
            pixels = batch.double().numpy()
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
    def fit(cls, stills: Tensor, clips: Tensor) -> LinearCodes:
        """Fit both codes.

        Args:
            stills: [places, n, P / Pt] patches of single frames, clips: [places, n, P] patches, values in [-1, 1].

        Raises:
            InputError: no more patches than code values.
        """
        batches = (patches.flatten(0, 1).split(_BATCH) for patches in (stills, clips))
        return cls(*(LinearCode.fit(batch, size) for batch, size in zip(batches, _NAMES.values(), strict=True)))

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


def fit_to_training_data(path: Path, seed: int = 0) -> LinearCodes:
    """Fit both codes to what a run of the curriculum trains on: as its loader gives it, so at the scales of its model.

    Args:
        path: the run's configuration, a YAML file; relative paths in it start at the working directory.
        seed: decides the order of the data and which patches are taken.

    Raises:
        InputError: no such configuration, data that are missing, or too few pictures or clips among them.
    """
    from tokenizer.training.curriculum.codes import sample_patches
    from tokenizer.training.curriculum.config import RunConfig
    from tokenizer.training.curriculum.launch import training_batches

    config = replace(load_config(RunConfig, path), seed=seed)
    return LinearCodes.fit(*sample_patches(training_batches(config), PATCHES, VIDEO_PATCH, seed))


def _features(patch_size: PatchSize) -> int:
    return patch_size[0] * patch_size[1] * patch_size[2] * 3
