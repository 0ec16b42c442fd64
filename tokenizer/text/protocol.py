"""What a frozen text tower is to the rest: texts in, unit vectors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.errors import InputError


@runtime_checkable
class TextTower(Protocol):
    """A frozen encoder of texts, whose vectors images, videos and 3D are aligned with."""

    @property
    def name(self) -> str:
        """For logs and checkpoints: vectors of towers with different names must not be compared."""
        ...

    @property
    def width(self) -> int:
        """D, the length of a vector's list of numbers."""
        ...

    def encode(self, texts: Sequence[str]) -> Tensor:
        """float32 [B, D] unit vectors on the tower's device, without gradients.

        A text's vector does not depend on the others of the batch, but for rounding.

        Raises:
            InputError: no text, or something that is no text.
        """
        ...


def check_texts(texts: Sequence[str]) -> list[str]:
    """`texts` as a list.

    Raises:
        InputError: a single string (which is a sequence of letters), nothing, or something else than strings.
    """
    if isinstance(texts, str):
        raise InputError("a text tower takes a list of texts, got one string; put it in a list")
    if not texts:
        raise InputError("a text tower needs at least one text; the list is empty")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {number} is a {type(text).__name__}, not a string")
    return list(texts)


def encode_in_chunks(texts: list[str], chunk: int, encode: Callable[[list[str]], Tensor]) -> Tensor:
    """Unit vectors float32 [B, D] of `encode`'s vectors, so many texts at a time as memory is known to hold."""
    with torch.inference_mode():
        parts = [encode(texts[start : start + chunk]) for start in range(0, len(texts), chunk)]
    # Made outside of inference mode, so that training can use it.
    return torch.cat([F.normalize(part.float(), dim=1) for part in parts])
