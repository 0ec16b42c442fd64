"""What is measured: AToken models, baselines, and any tokenizer through an adapter of three methods.

class MyTokenizer:
    name = "mine"
    def encode(self, frames):        # uint8 [T, H, W, 3]; T = 1 for a picture
        return code, bits            # anything, and how many bits it takes
    def decode(self, code):
        return frames                # uint8 of the same shape

atoken evaluate --adapter my_package.my_module:MyTokenizer ...
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tokenizer.api import AToken, VisualEncoding
from tokenizer.assets.views import Views
from tokenizer.errors import InputError
from tokenizer.evaluation.command.cost import measured
from tokenizer.evaluation.command.identity import code_checksums
from tokenizer.evaluation.command.presets import Kind, Preset
from tokenizer.evaluation.command.samples import Asset, Frames, Sample
from tokenizer.fingerprint import weights_digest
from tokenizer.model.context import Tiling
from tokenizer.patches import VisualSize, float_to_uint8, tokens_to_pixels, uint8_to_float
from tokenizer.sparse import SparseTokens
from tokenizer.streaming import decode_stream, encode_stream
from tokenizer.voxels import voxels_to_tokens

Role = Literal["model", "adapter", "baseline"]
PIXELS: Final[tuple[Kind, ...]] = ("image", "video")


class NotHandledError(InputError):
    """A baseline has no way to code a sample, which is measured without it."""


class Adapter(Protocol):
    """Any tokenizer of pictures, or of pictures and clips."""

    @property
    def name(self) -> str: ...

    def encode(self, frames: Frames, /) -> tuple[Any, float]:
        """uint8 [T, H, W, 3] -> a code, and how many bits it takes."""
        ...

    def decode(self, code: Any, /) -> Frames:
        """A code -> uint8 of the shape that was encoded."""
        ...


@dataclass(frozen=True, slots=True)
class Copy:
    """A reconstruction.

    frames: uint8, of the shape of the sample's. bits: of the code. tokens: where the code has such. encode_seconds,
    decode_seconds, memory: what it cost, see `cost`.
    """

    frames: Frames
    bits: float
    encode_seconds: float
    decode_seconds: float
    memory: int
    tokens: int | None = None

    def figures(self, sample: Sample) -> dict[str, float]:
        """What is recorded of it beside its likeness. Assets have no pixels, so no bits for each."""
        found = {
            "bits": float(self.bits),
            "encode_seconds": self.encode_seconds,
            "decode_seconds": self.decode_seconds,
            "memory_mb": self.memory / 1e6,
        }
        if self.tokens is not None:
            found["tokens"] = float(self.tokens)
        if sample.kind != "asset":
            found["pixels"] = float(sample.frames.size // 3)
        return found


class System(Protocol):
    """Something that is measured. budget_of: the name of the system whose bits it may spend on each sample."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> Role: ...
    @property
    def budget_of(self) -> str | None: ...

    def facts(self) -> dict[str, Any]:
        """What identifies it, for JSON."""
        ...

    def handles(self, sample: Sample) -> bool: ...

    def reconstruct(self, sample: Sample, budget: float | None) -> Copy:
        """Encode and decode. budget: bits that it may spend, for systems with `budget_of`.

        Raises:
            NotHandledError: a baseline cannot take this sample. Others are measured on it all the same.
            InputError: it cannot be measured, by any system.
        """
        ...


class AdapterSystem:
    """An adapter as a system.

    Args:
        adapter: see there.
        role: what it is in the tables.
        kinds: of samples that it takes.
        facts: what identifies it.
        device: whose memory counts.
    """

    budget_of: str | None = None

    def __init__(
        self,
        adapter: Adapter,
        role: Role = "adapter",
        kinds: tuple[Kind, ...] = PIXELS,
        facts: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.adapter, self.role, self.kinds = adapter, role, kinds
        self.name = str(adapter.name)
        self._facts, self._device = facts or {}, torch.device(device)

    def facts(self) -> dict[str, Any]:
        """See `System`."""
        return self._facts

    def handles(self, sample: Sample) -> bool:
        """See `System`."""
        return sample.kind in self.kinds

    def reconstruct(self, sample: Sample, budget: float | None = None) -> Copy:  # noqa: ARG002
        """See `System`.

        Raises:
            InputError: the adapter returns something else than its protocol says.
        """
        with torch.inference_mode():
            encoded, encoding = measured(lambda: self.adapter.encode(sample.frames), self._device)
            if not isinstance(encoded, tuple) or len(encoded) != 2:
                raise InputError(f"{self.name}: encode must return (code, bits), got {type(encoded).__name__}")
            code, bits = encoded
            frames, decoding = measured(lambda: self.adapter.decode(code), self._device)
        if not isinstance(frames, np.ndarray) or frames.shape != sample.frames.shape or frames.dtype != np.uint8:
            found = getattr(frames, "shape", type(frames).__name__)
            raise InputError(f"{self.name}: decode must return uint8 {sample.frames.shape}, got {found}")
        memory = max(encoding.memory, decoding.memory)
        return Copy(frames, float(bits), encoding.seconds, decoding.seconds, memory)


class ATokenSystem:
    """An AToken model as a system. Clips pass tile by tile, so that memory does not grow with their length.

    Args:
        model: on its device.
        name: in the tables.
        preset: says how clips are tiled.
        source: where it was loaded from.
    """

    role: Role = "model"
    budget_of: str | None = None

    def __init__(self, model: AToken, name: str, preset: Preset, source: str = "") -> None:
        self.model, self.name, self._source = model, name, source
        tiles = model.config.tile_frames
        fits = preset.stride + preset.context <= tiles and preset.stride % model.config.patch_size[0] == 0
        self.tiling = Tiling(stride=preset.stride, context=preset.context) if fits else Tiling(stride=tiles)

    @property
    def bits_per_token(self) -> float:
        """Of indices as entropy-free codes, of latents as they are stored."""
        if self.model.quantizer is not None:
            return self.model.quantizer.bits_per_token
        return float(self.model.config.latent_channels * torch.finfo(self.model.dtype).bits)

    def facts(self) -> dict[str, Any]:
        """See `System`."""
        return {
            "source": self._source,
            "latent_space": self.model.fingerprint,
            "weights_sha256": file_checksum(self._source),
            "weights_digest": self.model.weights_digest,
            "parts": parts_digests(self.model),
            "parameters": sum(tensor.numel() for tensor in self.model.state_dict().values()),
            "patch": list(self.model.config.patch_size),
            "bits_per_token": self.bits_per_token,
            "discrete": self.model.quantizer is not None,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "tiles": {"stride": self.tiling.stride, "context": self.tiling.context},
        }

    def handles(self, sample: Sample) -> bool:
        """See `System`. Assets need a Gaussian decoder."""
        return sample.kind in PIXELS or self.model.gaussian_decoder is not None

    def reconstruct(self, sample: Sample, budget: float | None = None) -> Copy:  # noqa: ARG002
        """See `System`."""
        device = self.model.device
        if sample.asset is not None:
            asset = sample.asset
            encoding, coding = measured(lambda: self.encode_asset(asset), device)
            frames, decoding = measured(lambda: self._draw(encoding, asset), device)
            tokens = encoding.tokens.num_tokens
        else:
            parts, coding = measured(lambda: list(self._encode(sample.frames, sample.kind)), device)
            frames, decoding = measured(lambda: self._decode(parts, sample), device)
            tokens = sum(part.num_tokens for part in parts)
        memory = max(coding.memory, decoding.memory)
        return Copy(frames, tokens * self.bits_per_token, coding.seconds, decoding.seconds, memory, tokens)

    @torch.no_grad()
    def pooled(self, sample: Sample) -> Tensor:
        """The pooled vectors of what is understood: [S, D], of a clip one for each frame alone, of an asset one."""
        if sample.asset is not None:
            return self.encode_asset(sample.asset).pooled
        if sample.understood is None:
            raise InputError(f"{sample.id}: nothing of it is to be understood")
        return torch.cat([self.model.encode_image(frame).pooled for frame in sample.understood])

    def encode_asset(self, asset: Asset) -> VisualEncoding:
        """The encoding of an asset, of its views or its voxels.

        Raises:
            InputError: voxels that were packed for another model.
        """
        source, decoder = asset.source, self.model.gaussian_decoder
        if isinstance(source, Views):
            return self.model.encode_asset(source)
        size = source.size
        if decoder is not None and (size.resolution, source.rule) != (
            decoder.config.resolution,
            decoder.config.packing,
        ):
            raise InputError(
                f"its voxels are packed by the rule '{source.rule}' on a grid of {size.resolution}; {self.name} needs "
                f"'{decoder.config.packing}' and {decoder.config.resolution}: write the shards anew"
            )
        tokens = voxels_to_tokens(source.features, source.coordinates, self.model.config.patch_size)
        with torch.no_grad():
            encoding = self.model.encode(tokens.to(self.model.device))
        origin = self.model.origin([size], [0.0])
        return VisualEncoding(encoding.features, encoding.pooled, encoding.posterior, encoding.quantizer, origin)

    def _encode(self, frames: Frames, kind: Kind) -> Iterator[SparseTokens]:
        if kind == "image":
            yield self.model.encode_image(frames[0]).tokens
            return
        step = self.model.config.tile_frames
        blocks = (
            uint8_to_float(torch.from_numpy(frames[start : start + step])) for start in range(0, len(frames), step)
        )
        for tile in encode_stream(self.model, blocks):
            yield tile.encoding.latents if tile.encoding.indices is None else tile.encoding.indices

    def _decode(self, parts: list[SparseTokens], sample: Sample) -> Frames:
        count, height, width, _ = sample.frames.shape
        size = VisualSize("image" if sample.kind == "image" else "video", count, height, width)
        if size.kind == "video":
            blocks = [
                float_to_uint8(block).cpu().numpy() for block in decode_stream(self.model, parts, size, self.tiling)
            ]
            return np.concatenate(blocks)
        with torch.no_grad():
            patches = self.model.decode(parts[0])
        pixels: Frames = (
            float_to_uint8(tokens_to_pixels(patches, [size], self.model.config.patch_size)[0]).cpu().numpy()
        )
        return pixels

    def _draw(self, encoding: VisualEncoding, asset: Asset) -> Frames:
        from tokenizer.evaluation.assets import draw

        gaussians = self.model.decode_asset(encoding)
        drawn = draw(gaussians, asset.wanted.cameras, asset.wanted.size)
        pixels: Frames = (drawn * 255).round().byte().cpu().numpy()
        return pixels


def load_adapter(spec: str) -> AdapterSystem:
    """The adapter that "module:Class" names, made without arguments; modules are also looked for in this folder.

    An evaluation with an adapter whose source file has changed is another one. Weights that it loads, and modules that
    it imports, can change unnoticed.

    Raises:
        InputError: not of this form, no such module or class, or a class without the three members.
    """
    module_name, colon, class_name = spec.partition(":")
    if not colon or not module_name or not class_name:
        raise InputError(f"--adapter {spec}: write module:Class")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
        adapter = getattr(module, class_name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(f"--adapter {spec}: {' '.join(str(error).split())}") from None
    for member in ("name", "encode", "decode"):
        if not hasattr(adapter, member):
            raise InputError(f"--adapter {spec}: has no '{member}'; an adapter has name, encode and decode")
    return AdapterSystem(adapter, facts={"source": spec, "code_sha256": code_checksums(adapter, module)})


def parts_digests(model: AToken) -> dict[str, str]:
    """Of what a model has beside its latent space: figures change with it although the model is the same."""
    parts = {"gaussian_decoder": model.gaussian_decoder, "text_alignment": model.text_alignment}
    return {name: weights_digest(part.state_dict()) for name, part in parts.items() if isinstance(part, nn.Module)}


def file_checksum(source: str) -> str | None:
    """SHA-256 of the weights of a model: of a bundled name or folder of its model.safetensors, or of the file."""
    import hashlib

    from tokenizer.checkpoints import WEIGHTS_FILE, bundled_models

    place = bundled_models().get(source, Path(source))
    path = place / WEIGHTS_FILE if place.is_dir() else place
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
