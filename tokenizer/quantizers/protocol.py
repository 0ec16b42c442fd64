"""What every quantiser offers, so that models, token files and generators need not know which one it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Quantized:
    """values: [N, C], what the decoder reads, with a straight-through gradient. indices: [N, codebooks] int32.

    loss: the quantiser's own training loss, a scalar (zero for FSQ).
    """

    values: Tensor
    indices: Tensor
    loss: Tensor


@runtime_checkable
class Quantizer(Protocol):
    """Maps latents [N, C] to integers [N, codebooks] and exactly back to the values the decoder reads."""

    channels: int
    codebooks: int
    codebook_size: int

    @property
    def bits_per_token(self) -> float:
        """log2(codebook_size) * codebooks."""
        ...

    def quantize(self, latents: Tensor) -> Quantized:
        """latents [N, C] float -> values, indices and loss."""
        ...

    def decode(self, indices: Tensor) -> Tensor:
        """indices [N, codebooks] integer -> values [N, C] float32, equal to those `quantize` gave.

        Raises:
            InputError: wrong shape, not integers, or an index outside 0..codebook_size - 1.
        """
        ...
