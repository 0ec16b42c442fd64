"""The learned 2-D position table and its resizing to any grid (FORMAT 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenizer.model.plan import Plan
from tokenizer.model.precision import at_least_float32, full_precision, no_autocast

GRID = 16
"""The table is a GRID x GRID picture of embeddings, row-major, row = x and column = y."""


class PositionTable(nn.Module):
    """Learned position embedding, resized for each segment to the grid its tokens span.

    The resize is the antialiased bilinear one (align_corners=False). It is linear in the table, so the embedding of all
    tokens of a batch is one matrix product W @ table with W [N, 256] from `resize_weights`: no interpolation per item,
    and no size that the host would have to wait for.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(GRID * GRID, width))

    def forward(self, plan: Plan) -> Tensor:
        """[N, D] in segment order, the dtype of the table. Interpolated in float32 at least."""
        kind = full_precision(self.weight.dtype)
        weights = plan.table(("positions", kind), lambda: token_weights(plan.positions, plan.extent, kind))
        with no_autocast(weights.device):
            return (weights @ at_least_float32(self.weight)).to(self.weight.dtype)


def token_weights(positions: Tensor, extent: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, 256]: how much each table entry counts for each token, from its x, y and the extent of its segment."""
    x = resize_weights(positions[:, 1], extent[:, 0], dtype)
    y = resize_weights(positions[:, 2], extent[:, 1], dtype)
    return (x[:, :, None] * y[:, None, :]).flatten(1)


def resize_weights(index: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of the antialiased linear resize of GRID samples to `size` samples, for output sample `index`.

    Args:
        index: [N] integer, 0 <= index < size.
        size: [N] integer.

    Returns:
        [N, GRID], rows sum to 1: a triangle around GRID / size * (index + 0.5), as wide as one input sample when
        enlarging and as one output sample when shrinking.
    """
    scale = GRID / size.to(dtype)
    centre = scale * (index.to(dtype) + 0.5)
    sample = torch.arange(GRID, dtype=dtype, device=index.device) + 0.5
    distance = (sample - centre[:, None]) / scale.clamp_min(1.0)[:, None]
    weights = (1.0 - distance.abs()).clamp_min(0.0)
    return weights / weights.sum(dim=1, keepdim=True)
