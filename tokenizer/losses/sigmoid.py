"""Sigmoid image-text loss: each image is asked of each text whether they belong together (SigLIP, arXiv 2303.15343).

    S_i = - sum over texts j of log sigmoid(z_ij (s_ij + bias)),  0 or more; z_ij is 1 if text j describes i, else -1

For videos and 3D (PAPER 2). s are the scores of `tokenizer.losses.similarity`; scale and bias start at the released
values (FORMAT 12). Processes gather each other's texts and keep their own items, so that the mean over all items is
the loss of the global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.errors import InputError


def sigmoid(logits: Tensor, matches: Tensor) -> Tensor:
    """Loss of each item.

    Args:
        logits: [b, B] scores plus bias, of this process's items with all texts.
        matches: bool [b, B], whether text j describes item i. See `same_text`.

    Returns:
        [b] float32 (float64 for float64), summed over texts as SigLIP does; the loss is its mean.

    Raises:
        InputError: shapes that differ.
    """
    if logits.shape != matches.shape or logits.ndim != 2:
        raise InputError(
            f"the sigmoid loss takes logits and matches [items, texts], got {list(logits.shape)} and "
            f"{list(matches.shape)}"
        )
    logits = logits if logits.dtype.itemsize > 2 else logits.float()
    return -F.logsigmoid(logits.where(matches, -logits)).sum(dim=1)


def text_keys(texts: Sequence[str]) -> Tensor:
    """A number for each text, int64 [n] on the CPU, the same in every process; equal for equal texts alone."""
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.int64)


def same_text(own: Tensor, every: Tensor) -> Tensor:
    """Matches by equal texts, so that two chairs called "chair" are not told apart.

    Args:
        own: [b] `text_keys` of this process's items.
        every: [B] those of all processes (`gather_rows(own)`).

    Returns:
        bool [b, B].
    """
    return own[:, None] == every[None]
