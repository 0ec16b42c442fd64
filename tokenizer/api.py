"""`AToken`: the network with what people call: files in, pictures out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.fingerprint import fingerprint, look, same_but_for_precision, weights_digest, weights_of
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
from tokenizer.voxels import RESOLUTION, AssetSize, voxel_features, voxels_to_tokens

if TYPE_CHECKING:
    from tokenizer.assets.pipeline import AssetSource
    from tokenizer.assets.rules import PackingRule
    from tokenizer.gaussians import GaussianDecoder, Gaussians
    from tokenizer.text.alignment import TextAlignment

Pixels = NDArray[np.uint8]
ImageSource = str | PathLike[str] | Image.Image | Pixels | Tensor
VideoSource = str | PathLike[str] | Pixels | Tensor


@dataclass(frozen=True)
class VisualEncoding(Encoding):
    """An `Encoding` of one picture, clip or asset that knows its size and its model.

    origin: model, size and frame rate, as a token file stores them.
    """

    origin: Origin

    @property
    def size(self) -> VisualSize | AssetSize:
        return self.origin.sizes[0]

    @property
    def tokens(self) -> SparseTokens:
        """What to keep: indices of a discrete model, latents of a continuous one."""
        return self.latents if self.indices is None else self.indices

    def save(self, path: str | PathLike[str]) -> None:
        """Write a `.atok` file."""
        TokenFile(self.tokens, self.origin).save(Path(path))


class AToken(ATokenNetwork):
    """AToken: encode and decode images, videos and 3D assets.

    >>> model = AToken.from_pretrained("atoken-nano")
    >>> encoding = model.encode_image("photo.jpg")      # a path, PIL image, uint8 array [H, W, 3] or tensor in [-1, 1]
    >>> picture = model.decode_visual(encoding)         # uint8 array [1, H, W, 3]
    """

    gaussian_decoder: GaussianDecoder | None = None
    """What turns decoded voxels into Gaussians. A model of its own, so it is no submodule: it is neither part of the
    latent space, nor of a released checkpoint."""

    text_alignment: TextAlignment | None = None
    """What compares pooled vectors with texts, for models that were trained with a text tower; no submodule either."""

    _weights: tuple[Tensor, str] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """The two models beside this one are set past nn.Module, which would make them part of the state dict."""
        if name in ("gaussian_decoder", "text_alignment"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AToken:
        """What `to`, `cuda` and `cpu` do: the two models beside this one go where it goes, in types of their own."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for part in (self.gaussian_decoder, self.text_alignment):
            if part is not None:
                part.to(self.device)
        return self

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
        from tokenizer.checkpoints import find_model, holds_model, load_network

        named = source if isinstance(source, str) else Path(source)
        model = load_network(cls, named, config=config, dtype=dtype, device=device)
        folder = find_model(named)
        if holds_model(folder / "gaussians"):
            model.load_gaussian_decoder(folder / "gaussians", dtype=dtype)
        if holds_model(folder / "text_alignment"):
            from tokenizer.text.alignment import load_text_alignment

            model.text_alignment = load_text_alignment(folder, device)
        return model

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
        """Write `config.json` and `model.safetensors` into `folder`, both or neither, and then what there is besides:
        the Gaussian decoder into `gaussians` below it, and what compares with texts into `text_alignment`. What this
        model has not, an earlier one in the folder loses; files of others stay."""
        from tokenizer.checkpoints import save_network, without_parts
        from tokenizer.gaussians.checkpoints import SUBFOLDER, save_gaussian_decoder
        from tokenizer.text import alignment

        folder = Path(folder)
        parts = {folder / SUBFOLDER: self.gaussian_decoder, folder / alignment.SUBFOLDER: self.text_alignment}
        with without_parts(path for path, part in parts.items() if part is None):
            save_network(self, folder, dtype)
        if self.gaussian_decoder is not None:
            save_gaussian_decoder(self.gaussian_decoder, folder / SUBFOLDER, dtype)
        if self.text_alignment is not None:
            alignment.save_text_alignment(self.text_alignment, folder)

    def load_gaussian_decoder(self, source: str | PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Load what turns decoded voxels into Gaussians, from a folder or a released file.

        Args:
            dtype: of its parameters; by default that of the file.

        Raises:
            InputError: it cannot be read, or takes voxels of another size than this model makes.
        """
        from tokenizer.gaussians.checkpoints import load_gaussian_decoder

        try:
            self.use_gaussian_decoder(load_gaussian_decoder(source, dtype=dtype, device=self.device))
        except InputError as error:
            raise InputError(f"{source}: {error}" if str(source) not in str(error) else str(error)) from None

    def use_gaussian_decoder(self, decoder: GaussianDecoder) -> None:
        """Take `decoder` for `decode_asset` and `save_pretrained`.

        Raises:
            InputError: it takes voxels of another size than this model makes.
        """
        _, rows, columns = self.config.patch_size
        if decoder.config.inputs != rows * columns * 3:
            raise InputError(
                f"the Gaussian decoder takes voxels of {decoder.config.inputs} channels, {self.config.name} makes "
                f"{rows * columns * 3}"
            )
        self.gaussian_decoder = decoder.to(self.device)

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
        """The digest of the weights, computed anew after they changed. A change of precision is none.

        Values are compared rather than counts of writes: weights may be replaced, or written to past autograd. It takes
        some 15 microseconds a tensor.
        """
        state = weights_of(self)
        if self._weights is None or not same_but_for_precision(self._weights[0], look(state)):
            self.remember_digest(weights_digest(state))
        assert self._weights is not None
        return self._weights[1]

    def remember_digest(self, digest: str) -> None:
        """Keep the digest of the weights as they were in their file, before any change of precision."""
        self._weights = (look(weights_of(self)), digest)

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
        size = sizes[0]
        if isinstance(size, AssetSize):
            raise InputError("these tokens are of a 3D asset; decode them with decode_asset")
        patches = self.decode(stored.tokens.to(self.device), tiling)
        frames = tokens_to_pixels(patches, [size], self.config.patch_size)
        pixels: Pixels = float_to_uint8(frames[0]).cpu().numpy()
        return pixels

    def reconstruct(self, image: ImageSource) -> Image.Image:
        """A still image through the tokenizer and back."""
        return Image.fromarray(self.decode_visual(self.encode_image(image))[0])

    def reconstruct_video(self, video: VideoSource, tiling: Tiling | None = None) -> Pixels:
        """A clip through the tokenizer and back, uint8 [T, H, W, 3]."""
        return self.decode_visual(self.encode_video(video), tiling)

    # ------------------------------------------------------------------ 3D assets

    @torch.no_grad()
    def encode_asset(
        self, asset: AssetSource, rule: PackingRule | None = None, on_view: Callable[[], object] | None = None
    ) -> VisualEncoding:
        """Encode one 3D asset.

        Args:
            asset: path of a mesh (GLB, glTF, OBJ, PLY, STL, OFF), of a folder of views or of its `transforms.json`; or
                a `Mesh`, or `Views`. Meshes are normalised to the unit cube and rendered from 16 sides; the way back
                is kept in the origin.
            rule: how views become voxels (`tokenizer.assets.packing`); by default what the Gaussian decoder was trained
                on, and the released rule where there is none.
            on_view: called after each rendered view, for progress.

        Raises:
            InputError: a file that cannot be read, nothing to see, or a package is missing.
        """
        from tokenizer.assets.pipeline import asset_voxels

        decoder = self.gaussian_decoder
        packing: PackingRule = rule or (decoder.config.packing if decoder is not None else "released")
        resolution = decoder.config.resolution if decoder is not None else RESOLUTION
        voxels, size = asset_voxels(asset, packing, resolution, on_view)
        tokens = voxels_to_tokens(voxels.features, voxels.coordinates, self.config.patch_size)
        return self._encode_visual(tokens, size, 0.0)

    @torch.no_grad()
    def decode_asset(self, visual: VisualEncoding | TokenFile, *, original: bool = False) -> Gaussians:
        """The Gaussians of one asset.

        Args:
            original: put them back to the axes and units of the asset's file, instead of the unit cube with z up.

        Raises:
            InputError: no Gaussian decoder, no tokens of an asset, voxels outside their grid, or tokens of another
                latent space.
        """
        stored = visual if isinstance(visual, TokenFile) else TokenFile(visual.tokens, visual.origin)
        stored.check_made_by(self.config.name, self.fingerprint)
        sizes = stored.origin.sizes
        if len(sizes) != 1 or not isinstance(sizes[0], AssetSize):
            raise InputError("these tokens are not of one 3D asset; decode them with decode_visual")
        if self.gaussian_decoder is None:
            raise InputError(
                f"{self.config.name} has no Gaussian decoder; load one with load_gaussian_decoder (--gaussians)"
            )
        if sizes[0].resolution != self.gaussian_decoder.config.resolution:
            raise InputError(
                f"the tokens lie on a grid of {sizes[0].resolution}, the Gaussian decoder reads one of "
                f"{self.gaussian_decoder.config.resolution}; encode the asset with this decoder loaded"
            )
        outside = (stored.tokens.host_positions[:, 1:] >= sizes[0].resolution).any(dim=1)
        if bool(outside.any()):
            row = int(outside.int().argmax())
            _, x, y, z = stored.tokens.host_positions[row].tolist()
            raise InputError(f"row {row} has the voxel x={x} y={y} z={z}, outside its grid of {sizes[0].resolution}")
        patches = self.decode(stored.tokens.to(self.device))
        decoder = self.gaussian_decoder
        gaussians = decoder.gaussians(voxel_features(patches, self.config.patch_size))
        if original:
            from tokenizer.gaussians.edit import transform

            gaussians = transform(gaussians, torch.tensor(sizes[0].to_original, dtype=torch.float64, device="cpu"))
        return gaussians

    def reconstruct_asset(self, asset: AssetSource) -> Gaussians:
        """An asset through the tokenizer and back, in the unit cube with z up."""
        return self.decode_asset(self.encode_asset(asset))

    def _encode_visual(self, tokens: SparseTokens, size: VisualSize | AssetSize, frame_rate: float) -> VisualEncoding:
        encoding = self.encode(tokens.to(self.device))
        return VisualEncoding(
            features=encoding.features,
            pooled=encoding.pooled,
            posterior=encoding.posterior,
            quantizer=encoding.quantizer,
            origin=self.origin([size], [frame_rate]),
        )

    def origin(self, sizes: Sequence[VisualSize | AssetSize], frame_rates: list[float]) -> Origin:
        """The origin that token files of this model carry."""
        return Origin(self.config.name, self.fingerprint, tuple(sizes), tuple(frame_rates))

    def _image_pixels(self, image: ImageSource) -> Tensor:
        if isinstance(image, (str, PathLike, Image.Image)):
            from tokenizer.media import load_image

            image = load_image(image)
        return _float_pixels(image)


def _float_pixels(pixels: Pixels | Tensor) -> Tensor:
    """uint8 arrays become floats in [-1, 1]; float tensors must be in that range already (checked when patched)."""
    if isinstance(pixels, np.ndarray):
        # Torch takes no negative strides, and warns of arrays that only read, such as those of PIL images.
        pixels = np.require(pixels, requirements=("C", "W"))
    tensor = torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels
    return uint8_to_float(tensor) if tensor.dtype == torch.uint8 else tensor
