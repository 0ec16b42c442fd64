"""Autoencoders of the package diffusers, from a local folder with a config.json and weights.

What goes through is the mode of the posterior, or of a quantised autoencoder its codes. Latents count as they are
stored, indices with log2 of the codebook. Autoencoders of pictures code a clip frame by frame; one with a temporal
decoder decodes its frames together. Pictures are padded with edge values, and clips with their last frame, to what the
network can divide; the padding is paid for.
"""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.config import read_mapping
from tokenizer.errors import InputError, require_package
from tokenizer.evaluation.command.identity import checksum
from tokenizer.evaluation.command.samples import Frames
from tokenizer.evaluation.command.systems import AdapterSystem

Shape = tuple[int, int, int]


class DiffusersAdapter:
    """An autoencoder of diffusers as an `Adapter`.

    Args:
        model: AutoencoderKL, VQModel, AutoencoderKLWan and the like: `encode` gives an object with `latent_dist` or
            `latents`, or a code with `latent`, and `decode` one with `sample`.
        name: in the tables.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.name = name
        self._model = model
        # Of the encoder alone: that of Stable Video Diffusion sees pictures, and its decoder all frames together.
        self._video = any(isinstance(part, nn.Conv3d) for part in getattr(model, "encoder", model).modules())
        self._together = "num_frames" in inspect.signature(model.decode).parameters
        config = model.config
        levels = config.get("block_out_channels") or config.get("dim_mult") or (0,) * 5
        self._space = int(
            getattr(model, "spatial_compression_ratio", None)
            or config.get("scale_factor_spatial")
            or 2 ** (len(levels) - 1)
        )
        self._time = int(getattr(model, "temporal_compression_ratio", None) or config.get("scale_factor_temporal") or 4)
        codebook = config.get("num_vq_embeddings")
        self._index_bits = math.log2(codebook) if codebook else None

    def encode(self, frames: Frames) -> tuple[tuple[list[Tensor], Shape], float]:
        """See `Adapter`."""
        height, width = frames.shape[1:3]
        space = self._space
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).to(self._model.device, self._model.dtype) / 127.5 - 1
        pixels = F.pad(pixels, (0, -width % space, 0, -height % space), mode="replicate")
        if self._video:
            # Causal networks take one frame and then whole steps.
            missing = -(len(frames) - 1) % self._time
            pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
            batches = [pixels.transpose(0, 1)[None]]
        else:
            batches = list(pixels.split(1))
        codes = [self._latents(batch) for batch in batches]
        return (codes, (len(frames), height, width)), sum(self._bits(code) for code in codes)

    def decode(self, code: tuple[list[Tensor], Shape]) -> Frames:
        """See `Adapter`."""
        codes, (count, height, width) = code
        if self._together:
            parts = [self._model.decode(torch.cat(codes), num_frames=count).sample]
        else:
            parts = [self._model.decode(latents).sample for latents in codes]
        pixels = parts[0][0].transpose(0, 1) if self._video else torch.cat(parts)
        pixels = pixels[:count, :, :height, :width].permute(0, 2, 3, 1).float()
        return np.ascontiguousarray(((pixels + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy())

    def _latents(self, pixels: Tensor) -> Tensor:
        encoded = self._model.encode(pixels)
        if hasattr(encoded, "latent_dist"):
            return torch.as_tensor(encoded.latent_dist.mode())
        return torch.as_tensor(encoded.latents if hasattr(encoded, "latents") else encoded.latent)

    def _bits(self, latents: Tensor) -> float:
        if self._index_bits is not None:
            return latents.shape[0] * math.prod(latents.shape[2:]) * self._index_bits
        return float(latents.numel() * latents.element_size() * 8)


def load_diffusers(folder: Path, device: torch.device, dtype: torch.dtype) -> AdapterSystem:
    """An autoencoder from a folder of `save_pretrained`, or of a pipeline whose "vae" it is.

    Raises:
        InputError: diffusers is missing, or no autoencoder there that it can load.
    """
    require_package("diffusers", "measuring autoencoders of diffusers")
    import diffusers

    place = folder if (folder / "config.json").is_file() else folder / "vae"
    if not (place / "config.json").is_file():
        raise InputError(f"--diffusers {folder}: no config.json there; give the folder of an autoencoder")
    kind = str(read_mapping(place / "config.json").get("_class_name", ""))
    if not kind.startswith(("Autoencoder", "AsymmetricAutoencoder", "VQModel", "ConsistencyDecoder")):
        raise InputError(f"--diffusers {folder}: holds '{kind}', which is no autoencoder")
    try:
        loader: Any = getattr(diffusers, kind)
        model = loader.from_pretrained(str(place), torch_dtype=dtype, local_files_only=True)
    except (AttributeError, OSError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"--diffusers {folder}: cannot be loaded ({' '.join(str(error).split()):.200})") from None
    model = model.to(device).eval().requires_grad_(False)
    facts = {
        "source": str(folder),
        "class": kind,
        "diffusers": diffusers.__version__,
        "config_sha256": checksum(place / "config.json"),
        "weights_sha256": _checksums(place),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
    }
    return AdapterSystem(DiffusersAdapter(model, folder.resolve().name), facts=facts, device=device)


def _checksums(folder: Path) -> dict[str, str]:
    paths = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return {path.name: str(checksum(path)) for path in paths}
