"""Scores of images with texts, on one process or over many.

    s_ij = exp(scale) * cos(image_i, text_j)

The released scale 4.8438 and the bias -15.5625 of the sigmoid loss are those of FORMAT 12.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.errors import InputError

RELEASED_SCALE = 4.8438
RELEASED_BIAS = -15.5625


class SimilarityScale(nn.Module):
    """The scale and bias that turn cosines into scores.

    Args:
        scale: logarithm of the factor on cosines.
        bias: what the sigmoid loss adds.
        trained: whether they are trained; a frozen pair is in the state dict all the same.
    """

    def __init__(self, scale: float = RELEASED_SCALE, bias: float = RELEASED_BIAS, trained: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale), requires_grad=trained)
        self.bias = nn.Parameter(torch.tensor(bias), requires_grad=trained)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scores without the bias.

        Args:
            images: [b, D] floating, of any length.
            texts: [B, D].

        Returns:
            [b, B] float32 (float64 for float64).

        Raises:
            InputError: widths that differ.
        """
        if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
            raise InputError(
                f"images and texts must be [count, width] with one width, got {list(images.shape)} and "
                f"{list(texts.shape)}; project the images to the width of the text tower"
            )
        # In half precision a cosine has an error of a hundredth, which the scale of 127 would make more than one.
        with torch.autocast(images.device.type, enabled=False):
            images, texts = (F.normalize(x if x.dtype.itemsize > 2 else x.float(), dim=1) for x in (images, texts))
            return self.scale.exp() * (images @ texts.T)


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, int]:
    """The rows of all processes, in their order, and where this process's begin.

    Gradients flow back: every process gets the sum of what all of them ask of its rows. With frozen texts there are
    none, and nothing is sent backward. Without `torch.distributed` the rows are returned as they are.

    Args:
        rows: [b, ...]; b may differ between processes, the rest must not.
        group: processes to gather from, all by default.

    Returns:
        [B, ...] with B the sum of all b, and the first own row.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return rows, 0
    mine = torch.tensor([rows.shape[0]], device=rows.device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    counts = [int(count) for count in found]
    gathered: Tensor = _Gather.apply(rows, counts, group)  # type: ignore[no-untyped-call]
    return gathered, sum(counts[: dist.get_rank(group)])


class _Gather(torch.autograd.Function):
    """all_gather of unequal parts: padded to the longest, since backends gather equal ones alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.count, ctx.first = group, rows.shape[0], sum(counts[: dist.get_rank(group)])
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.first : ctx.first + ctx.count], None, None
