"""Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505) as AToken uses it (FORMAT 8).

Latent channels are split into codebooks of d channels; each channel is squashed into an interval and rounded to one of
L levels. With L = 4 the levels are the asymmetric {-1, -0.5, 0, 0.5}. There are no parameters and no projections.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.model.config import FSQConfig
from tokenizer.model.precision import at_least_float32
from tokenizer.quantizers.protocol import Quantized

LEVELS: dict[int, tuple[int, ...]] = {
    16: (5, 3),
    64: (8, 8),
    256: (8, 6, 5),
    512: (8, 8, 8),
    1024: (8, 5, 5, 5),
    2048: (8, 8, 6, 5),
    4096: (4, 4, 4, 4, 4, 4),
    8192: (8, 8, 8, 4, 4),
    16384: (8, 8, 8, 6, 5),
    65536: (8, 8, 8, 5, 5, 5),
    2**18: (8, 8, 6, 5, 5, 5, 5),
    2**18 + 1: (8,) * 6,
    2**18 - 1: (13, 12, 12, 12, 12),
    2**18 - 2: (23,) * 4,
    5**8: (5,) * 8,
    5**8 - 1: (25,) * 4,
}
"""Levels of each channel for a nominal codebook size. A few keys are names only: 256 stands for 240 entries."""

_EPS = 1e-3


def levels_of(codebook_size: int) -> tuple[int, ...]:
    """Levels for a nominal size; a negative size n gives log2(-n) channels of 2 levels.

    Raises:
        InputError: a size that the released table does not have.
    """
    if codebook_size < 0 and (-codebook_size & (-codebook_size - 1)) == 0 and codebook_size < -1:
        return (2,) * int(math.log2(-codebook_size))
    if codebook_size not in LEVELS:
        known = ", ".join(str(size) for size in sorted(LEVELS))
        raise InputError(f"no FSQ levels for codebook size {codebook_size}; known sizes: {known}")
    return LEVELS[codebook_size]


class FSQ:
    """Finite scalar quantiser without state; every method works on any device.

    Args:
        config: codebook size and number of codebooks.
        channels: latent channels; must be codebooks x channels of a codebook.
    """

    def __init__(self, config: FSQConfig, channels: int) -> None:
        self.levels = levels_of(config.codebook_size)
        self.codebooks = config.codebooks
        self.codebook_size = math.prod(self.levels)
        self.channels = channels
        if self.codebooks * len(self.levels) != channels:
            raise InputError(
                f"{self.codebooks} codebooks of {len(self.levels)} channels need {self.codebooks * len(self.levels)} "
                f"latent channels, the model has {channels}"
            )
        # Powers of the mixed radix number system, least significant digit first.
        self.basis = tuple(math.prod(self.levels[:i]) for i in range(len(self.levels)))

    @property
    def bits_per_token(self) -> float:
        return self.codebooks * math.log2(self.codebook_size)

    def bound(self, latents: Tensor) -> Tensor:
        """Squash latents [N, C] -> [N, codebooks, d] so that rounding gives the levels; float32 at least."""
        levels = self._row(self.levels, latents)
        half = (levels - 1) * (1 + _EPS) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0).to(levels.dtype)
        shift = torch.atanh(offset / half)
        grouped = at_least_float32(latents).unflatten(-1, (self.codebooks, len(self.levels)))
        return torch.tanh(grouped + shift) * half - offset

    def quantize(self, latents: Tensor) -> Quantized:
        """latents [N, C] -> values [N, C] in the dtype of `latents` (straight-through gradient) and indices.

        A NaN stays one among the values, and the index of its codebook is -1, which no file and no decoder takes.

        Raises:
            InputError: another number of channels.
        """
        if latents.ndim != 2 or latents.shape[1] != self.channels:
            raise InputError(f"FSQ needs latents [N, {self.channels}], got {tuple(latents.shape)}")
        bounded = self.bound(latents)
        codes = bounded + (bounded.round() - bounded).detach()
        half = self._row([level // 2 for level in self.levels], latents)
        digits = (codes.detach() + half).round().to(torch.int32)
        indices = (digits * self._row(self.basis, digits)).sum(dim=-1, dtype=torch.int32)
        # What an integer is that was NaN depends on the device; it may be a legal digit.
        indices = indices.masked_fill(bounded.detach().isnan().any(dim=-1), -1)
        values = (codes / half).flatten(-2).to(latents.dtype)
        return Quantized(values=values, indices=indices, loss=values.new_zeros(()))

    def decode(self, indices: Tensor) -> Tensor:
        """indices [N, codebooks] -> values [N, C] float32; the exact inverse of `quantize`.

        Raises:
            InputError: wrong shape, not integers, or (checked on the CPU) an index out of range.
        """
        if indices.ndim != 2 or indices.shape[1] != self.codebooks:
            raise InputError(f"indices must be [N, {self.codebooks}], got {tuple(indices.shape)}")
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise InputError(f"indices must be integers, got {str(indices.dtype).removeprefix('torch.')}")
        if indices.dtype != torch.int64:
            indices = indices.to(torch.int32)  # smaller types may hold the indices, but not the basis
        if indices.device.type == "cpu":
            bad = ((indices < 0) | (indices >= self.codebook_size)).any(dim=1)
            if bool(bad.any()):
                row = int(bad.int().argmax())
                raise InputError(f"row {row} has indices {indices[row].tolist()} outside 0..{self.codebook_size - 1}")
        levels, basis = self._row(self.levels, indices), self._row(self.basis, indices)
        digits = (indices[..., None] // basis) % levels
        half = levels // 2
        return ((digits - half).float() / half).flatten(-2)

    def all_codes(self) -> Tensor:
        """[codebook_size, d] float32: the values of every index of one codebook, in order."""
        indices = torch.arange(self.codebook_size, dtype=torch.int32, device="cpu")[:, None]
        return self.decode(indices.expand(-1, self.codebooks))[:, : len(self.levels)]

    @staticmethod
    def _row(numbers: tuple[int, ...] | list[int], like: Tensor) -> Tensor:
        kind = at_least_float32(like).dtype if like.is_floating_point() else like.dtype
        return torch.tensor(numbers, dtype=kind, device="cpu").to(like.device, non_blocking=True)
