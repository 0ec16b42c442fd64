"""What is measured: anything that turns frames into as good a copy of them as it can."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tokenizer.patches import (
    PATCH_SIZE,
    PatchSize,
    float_to_uint8,
    image_to_tokens,
    tokens_to_pixels,
    uint8_to_float,
    video_to_tokens,
)
from tokenizer.sparse import SparseTokens


class Codec(Protocol):
    """Codes and decodes frames. `LinearCodes` and `ModelCodec` are codecs."""

    def reconstruct(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [T, H, W, 3] of any size -> the same shape and type. A single frame is a still image."""
        ...


class Encoded(Protocol):
    """The part of `Encoding` that decoding needs."""

    @property
    def latents(self) -> SparseTokens: ...


class TokenModel(Protocol):
    """The part of `AToken` that reconstructing needs; a bare `ATokenNetwork` in training has it too."""

    @property
    def device(self) -> torch.device: ...

    def encode(self, patches: SparseTokens, /) -> Encoded: ...

    def decode(self, latents: SparseTokens, /) -> SparseTokens: ...


class ModelCodec:
    """A model as a codec: the posterior's mean (or, of a discrete model, its quantised values) is what is decoded.

    Args:
        model: on any device and in any floating type.
        patch_size: of the model.
    """

    def __init__(self, model: TokenModel, patch_size: PatchSize = PATCH_SIZE) -> None:
        self.model = model
        self.patch_size = patch_size

    @torch.inference_mode()
    def reconstruct(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """uint8 [T, H, W, 3] -> the same shape and type, rounded and clipped; a single frame is a still image."""
        pixels = uint8_to_float(torch.from_numpy(frames))
        if len(pixels) == 1:
            tokens, size = image_to_tokens(pixels[0], self.patch_size)
        else:
            tokens, size = video_to_tokens(pixels, self.patch_size)
        decoded = self.model.decode(self.model.encode(tokens.to(self.model.device)).latents)
        return float_to_uint8(
            tokens_to_pixels(decoded.to("cpu", non_blocking=False), [size], self.patch_size)[0]
        ).numpy()
