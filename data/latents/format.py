"""KEY.latents.safetensors: what one sample became, decodable with nothing else but the model that made it.

    mean, logvar    float16 [N, C]            of a continuous model
    indices         uint16 [N, codebooks]     of a discrete one (uint32 for more than 65,536 codes)
    positions       uint16 [N, 4]             t, x, y, z
    pooled          float16 [D]               one vector for the whole sample, not normalised

and one metadata entry "atoken-latents", JSON: version, model, fingerprint of its latent space, size, frame rate.

Why float16: latents are of the order of one, where it keeps 11 bits. bfloat16 keeps 8, so whatever a model computed in
bfloat16 is stored without loss, down to 6e-5; float32 would double the size of a set for bits that a posterior's own
noise drowns. What float16 cannot hold (beyond 65504, not finite) is refused, never clipped; so are log-variances whose
variance float32 cannot hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from data.samples import LATENTS_EXTENSION, Raw, SampleError
from tokenizer.patches import VisualSize
from tokenizer.sparse import MAX_POSITION, SparseTokens
from tokenizer.voxels import AssetSize

VERSION = 1
OUT_OF_RANGE = "latents out of range"
DAMAGED = "damaged latents"

LARGEST_LOGVAR = 80.0
"""Of which float32 still holds the variance, exp(80) = 6e34."""

_METADATA = "atoken-latents"
_DTYPES = {
    "mean": ("float16",),
    "logvar": ("float16",),
    "indices": ("uint16", "uint32"),
    "positions": ("uint16",),
    "pooled": ("float16",),
}


@dataclass(frozen=True, slots=True)
class LatentItem:
    """One sample in the latent space of a model. Either `mean` and `logvar`, or `indices`, are there.

    positions: int32 [N, 4], t, x, y, z, each in 0..4095.
    pooled: float16 [D], not normalised.
    size: what it decodes to.
    model: name of the model. fingerprint: of its latent space.
    frame_rate: frames per second; 0 for stills and where it is not known.
    mean, logvar: float16 [N, C], the Gaussian over the latents.
    indices: int32 [N, codebooks].
    """

    positions: Tensor
    pooled: Tensor
    size: VisualSize | AssetSize
    model: str
    fingerprint: str
    frame_rate: float = 0.0
    mean: Tensor | None = None
    logvar: Tensor | None = None
    indices: Tensor | None = None

    def tokens(self, generator: torch.Generator | None = None) -> SparseTokens:
        """What `AToken.decode` takes: indices [N, codebooks] int32, or latents [N, C] float32.

        Args:
            generator: draws latents from the Gaussian; without it they are its mean. Indices are not drawn.
        """
        if self.indices is not None:
            return SparseTokens(self.indices, self.positions, [len(self.positions)])
        assert self.mean is not None
        assert self.logvar is not None
        latents = self.mean.float()
        if generator is not None:
            latents = latents + torch.exp(0.5 * self.logvar.float()) * torch.randn(latents.shape, generator=generator)
        return SparseTokens(latents, self.positions, [len(self.positions)])


def encode_latents(item: LatentItem, name: str) -> bytes:
    """The file of one sample; the same bytes for the same item.

    Args:
        name: of the sample, for errors.

    Raises:
        SampleError: "latents out of range": a value that float16 cannot hold, a log-variance over `LARGEST_LOGVAR`, or
            the index of NaN.
    """
    from safetensors.numpy import save

    arrays: dict[str, NDArray[Any]] = {
        "positions": item.positions.numpy().astype(np.uint16),
        "pooled": _half(item.pooled, "pooled", name),
    }
    if item.indices is not None:
        if item.indices.numel() and int(item.indices.min()) < 0:
            raise SampleError(OUT_OF_RANGE, f"{name}: an index below 0, which stands for NaN")
        wide = item.indices.numel() > 0 and int(item.indices.max()) > np.iinfo(np.uint16).max
        arrays["indices"] = item.indices.numpy().astype(np.uint32 if wide else np.uint16)
    else:
        assert item.mean is not None
        assert item.logvar is not None
        arrays |= {"mean": _half(item.mean, "mean", name), "logvar": _half(item.logvar, "logvar", name)}
        if float(arrays["logvar"].max()) > LARGEST_LOGVAR:
            raise SampleError(OUT_OF_RANGE, f"{name}: a log-variance of {arrays['logvar'].max():g}")
    origin = {"version": VERSION, "model": item.model, "fingerprint": item.fingerprint}
    origin |= {"size": _size_to_json(item.size), "frame_rate": item.frame_rate}
    return bytes(save(arrays, {_METADATA: json.dumps(origin)}))


def decode_latents(raw: Raw) -> LatentItem:
    """The latents of a sample of a tokenised set.

    Raises:
        SampleError: "damaged latents": missing, truncated, of another format or version, or in contradiction to itself.
    """
    if LATENTS_EXTENSION not in raw.files:
        raise SampleError(DAMAGED, f"{raw.id}: has no .{LATENTS_EXTENSION}")
    contents = raw.files[LATENTS_EXTENSION]
    where = f"{raw.id}.{LATENTS_EXTENSION}"
    try:
        origin = _metadata(contents)
        arrays = _arrays(contents)
        size, rate = _size_from_json(origin["size"]), float(origin["frame_rate"])
        model, fingerprint = str(origin["model"]), str(origin["fingerprint"])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SampleError(DAMAGED, f"{where}: not readable ({' '.join(str(error).split())})") from None
    if problem := _contradiction(arrays):
        raise SampleError(DAMAGED, f"{where}: {problem}")
    tensors = {key: _tensor(array) for key, array in arrays.items()}
    return LatentItem(size=size, model=model, fingerprint=fingerprint, frame_rate=rate, **tensors)


def _half(tensor: Tensor, what: str, name: str) -> NDArray[np.float16]:
    half = tensor.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        worst = float(tensor.float().abs().max())
        raise SampleError(OUT_OF_RANGE, f"{name}: {what} reaches {worst:g}; float16 holds at most 65504")
    array: NDArray[np.float16] = half.numpy()
    return array


def _metadata(contents: bytes) -> dict[str, Any]:
    """The entry of this module in the header. safetensors reads headers of files on disk only."""
    length = int.from_bytes(contents[:8], "little")
    metadata = dict(json.loads(contents[8 : 8 + length])).get("__metadata__", {})
    if _METADATA not in metadata:
        raise ValueError("a safetensors file, but not one of latents")
    origin: dict[str, Any] = json.loads(metadata[_METADATA])
    if origin["version"] != VERSION:
        raise ValueError(f"version {origin['version']!r}, this AToken reads version {VERSION}")
    return origin


def _arrays(contents: bytes) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load

    return dict(load(contents))


def _contradiction(arrays: Mapping[str, NDArray[Any]]) -> str:
    """What does not fit together; empty where all does."""
    values = {"indices"} if "indices" in arrays else {"mean", "logvar"}
    if set(arrays) != {*values, "positions", "pooled"}:
        return f"holds {', '.join(sorted(arrays))}; expected mean and logvar, or indices, with positions and pooled"
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES[name] or array.ndim != (1 if name == "pooled" else 2):
            return f"{name} is {array.dtype.name} of shape {array.shape}"
    rows = len(arrays["positions"])
    shapes = {arrays[name].shape for name in values}
    if rows < 1 or len(shapes) != 1 or shapes.pop()[0] != rows or arrays["positions"].shape[1] != 4:
        return "its tensors have shapes that do not fit together"
    if int(arrays["positions"].max()) > MAX_POSITION:
        return f"a position is beyond {MAX_POSITION}"
    if not all(np.isfinite(array).all() for name, array in arrays.items() if name in ("mean", "logvar", "pooled")):
        return "a value is not finite"
    return ""


def _tensor(array: NDArray[Any]) -> Tensor:
    # torch computes little with unsigned integers, and arrays out of bytes cannot be written to.
    return torch.from_numpy(array.copy() if array.dtype == np.float16 else array.astype(np.int32))


def _size_to_json(size: VisualSize | AssetSize) -> dict[str, Any]:
    if isinstance(size, AssetSize):
        return {"kind": size.kind, "resolution": size.resolution, "to_original": size.to_original}
    return {"kind": size.kind, "frames": size.frames, "height": size.height, "width": size.width}


def _size_from_json(values: Mapping[str, Any]) -> VisualSize | AssetSize:
    if values["kind"] == "asset":
        rows = tuple(tuple(float(value) for value in row) for row in values["to_original"])
        return AssetSize(int(values["resolution"]), rows)
    return VisualSize(values["kind"], int(values["frames"]), int(values["height"]), int(values["width"]))
