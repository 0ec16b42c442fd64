"""`AToken`: the network with what people call: files in, pictures out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.fingerprint import fingerprint, weights_digest
from tokenizer.model.atoken import ATokenNetwork, Encoding
from tokenizer.model.config import ATokenConfig
from tokenizer.model.context import Tiling
from tokenizer.patches import (
    Fit,
    VisualSize,
    float_to_uint8,
    image_to_tokens,
    tokens_to_pixels,
    uint8_to_float,
    video_to_tokens,
)
from tokenizer.sparse import SparseTokens
from tokenizer.tokenfile import Origin, TokenFile

Pixels = NDArray[np.uint8]
ImageSource = str | PathLike[str] | Image.Image | Pixels | Tensor
VideoSource = str | PathLike[str] | Pixels | Tensor


@dataclass(frozen=True)
class VisualEncoding(Encoding):
    """An `Encoding` of one picture or clip that knows its size and its model.

    origin: model, size and frame rate, as a token file stores them.
    """

    origin: Origin

    @property
    def size(self) -> VisualSize:
        return self.origin.sizes[0]

    @property
    def tokens(self) -> SparseTokens:
        """What to keep: indices of a discrete model, latents of a continuous one."""
        return self.latents if self.indices is None else self.indices

    def save(self, path: str | PathLike[str]) -> None:
        """Write a `.atok` file."""
        TokenFile(self.tokens, self.origin).save(Path(path))


class AToken(ATokenNetwork):
    """AToken: encode and decode images and videos.

    >>> model = AToken.from_pretrained("atoken-nano")
    >>> encoding = model.encode_image("photo.jpg")      # a path, PIL image, uint8 array [H, W, 3] or tensor in [-1, 1]
    >>> picture = model.decode_visual(encoding)         # uint8 array [1, H, W, 3]
    """

    _weights: tuple[int, str] | None = None

    # ------------------------------------------------------------------ files

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        config: ATokenConfig | None = None,
    ) -> AToken:
        """Load by bundled name, from a folder of `save_pretrained`, or from a released .pt / .safetensors file.

        Args:
            dtype: float32, bfloat16 or float16; by default that of the file.
            device: parameters go there straight from the memory-mapped file.
            config: for a released file with no configuration beside it.

        Raises:
            InputError: nothing there, unreadable, or not fitting its configuration (bad keys are listed).
        """
        from tokenizer.checkpoints import load_network

        return load_network(
            cls, source if isinstance(source, str) else Path(source), config=config, dtype=dtype, device=device
        )

    @classmethod
    def from_released(
        cls,
        config: Mapping[str, Any] | ATokenConfig,
        state_dict: Mapping[str, Tensor],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> AToken:
        """Build from a released configuration mapping and a state dict with released names."""
        from tokenizer.checkpoints import released_network

        return released_network(cls, config, state_dict, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, both or neither."""
        from tokenizer.checkpoints import save_network

        save_network(self, Path(folder), dtype)

    def export_released(self, path: str | PathLike[str]) -> None:
        """Write a released-format checkpoint (.safetensors or .pt) and its configuration (.json) beside it."""
        from tokenizer.checkpoints import export_released

        export_released(self, Path(path))

    @property
    def fingerprint(self) -> str:
        """The name of this model's latent space (`tokenizer.fingerprint`)."""
        return fingerprint(self.config, self.weights_digest)

    @property
    def weights_digest(self) -> str:
        """The digest of the weights, computed anew after they changed. A change of precision is none."""
        if self._weights is None or self._weights[0] != self._changes():
            self.remember_digest(weights_digest(self.state_dict()))
        assert self._weights is not None
        return self._weights[1]

    def remember_digest(self, digest: str) -> None:
        """Keep the digest of the weights as they were in their file, before any change of precision."""
        self._weights = (self._changes(), digest)

    def _changes(self) -> int:
        """How often the parameters were written to. `.to(dtype)` does not count."""
        return sum(p._version for p in chain(self.parameters(), self.buffers()) if not p.is_inference())

    # ------------------------------------------------------------------ pictures and clips

    @torch.no_grad()
    def encode_image(self, image: ImageSource, fit: Fit = "pad") -> VisualEncoding:
        """Encode one still image.

        Args:
            image: path, PIL image, uint8 array [H, W, 3], or float tensor [H, W, 3] in [-1, 1].
            fit: "pad" keeps every pixel, "crop" is the released centre crop; see `tokenizer.patches`.
        """
        tokens, size = image_to_tokens(self._image_pixels(image), self.config.patch_size, fit)
        return self._encode_visual(tokens, size, 0.0)

    @torch.no_grad()
    def encode_video(self, video: VideoSource, fit: Fit = "pad", frame_rate: float = 25.0) -> VisualEncoding:
        """Encode one clip, all of it in memory; `tokenizer.streaming` does the same in bounded memory.

        Args:
            video: path, uint8 array [T, H, W, 3], or float tensor [T, H, W, 3] in [-1, 1].
            fit: as for `encode_image`.
            frame_rate: frames a second, for arrays and tensors; a file knows its own.
        """
        if isinstance(video, (str, PathLike)):
            from tokenizer.media import VideoReader

            reader = VideoReader(Path(video))
            frame_rate = float(reader.fps)
            video = np.concatenate(list(reader))
        tokens, size = video_to_tokens(_float_pixels(video), self.config.patch_size, fit)
        return self._encode_visual(tokens, size, frame_rate)

    @torch.no_grad()
    def decode_visual(self, visual: VisualEncoding | TokenFile, tiling: Tiling | None = None) -> Pixels:
        """Pixels of one picture or clip, uint8 [T, H, W, 3], cut to its original size.

        Raises:
            InputError: the tokens were made by a model with another latent space.
        """
        stored = visual if isinstance(visual, TokenFile) else TokenFile(visual.tokens, visual.origin)
        stored.check_made_by(self.config.name, self.fingerprint)
        sizes = stored.origin.sizes
        if len(sizes) != 1:
            raise InputError(f"the file holds {len(sizes)} visuals; decode them one by one with TokenReader.items()")
        patches = self.decode(stored.tokens.to(self.device), tiling)
        frames = tokens_to_pixels(patches, sizes, self.config.patch_size)
        pixels: Pixels = float_to_uint8(frames[0]).cpu().numpy()
        return pixels

    def reconstruct(self, image: ImageSource) -> Image.Image:
        """A still image through the tokenizer and back."""
        return Image.fromarray(self.decode_visual(self.encode_image(image))[0])

    def reconstruct_video(self, video: VideoSource, tiling: Tiling | None = None) -> Pixels:
        """A clip through the tokenizer and back, uint8 [T, H, W, 3]."""
        return self.decode_visual(self.encode_video(video), tiling)

    def _encode_visual(self, tokens: SparseTokens, size: VisualSize, frame_rate: float) -> VisualEncoding:
        encoding = self.encode(tokens.to(self.device))
        return VisualEncoding(
            features=encoding.features,
            pooled=encoding.pooled,
            posterior=encoding.posterior,
            quantizer=encoding.quantizer,
            origin=self.origin([size], [frame_rate]),
        )

    def origin(self, sizes: list[VisualSize], frame_rates: list[float]) -> Origin:
        """The origin that token files of this model carry."""
        return Origin(self.config.name, self.fingerprint, tuple(sizes), tuple(frame_rates))

    def _image_pixels(self, image: ImageSource) -> Tensor:
        if isinstance(image, (str, PathLike, Image.Image)):
            from tokenizer.media import load_image

            image = load_image(image)
        return _float_pixels(image)


def _float_pixels(pixels: Pixels | Tensor) -> Tensor:
    """uint8 arrays become floats in [-1, 1]; float tensors must be in that range already (checked when patched)."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels)) if isinstance(pixels, np.ndarray) else pixels
    return uint8_to_float(tensor) if tensor.dtype == torch.uint8 else tensor
