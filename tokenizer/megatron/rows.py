"""Row arithmetic of padding and of the tensor between pipeline stages: pure functions, without Megatron.

Between the encoder's and the decoder's stage travels one tensor a microbatch, because Megatron's schedules send one:
the posterior parameters [N, 2C] and, behind them, the pooled vectors [B, D] cut into rows of the same width. That is
all that a loss can ask of the encoder except its token features, which stay there; for so400m it is a twelfth of a
residual stream. Positions do not travel: both stages read the same batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def padded_count(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `count`."""
    return -(-count // multiple) * multiple


def pad_rows(x: Tensor, total: int) -> Tensor:
    """[N, C] -> [total, C] with rows of zeros behind; x itself if it has `total` rows."""
    return x if x.shape[0] == total else F.pad(x, (0, 0, 0, total - x.shape[0]))


def to_boundary(parameters: Tensor, pooled: Tensor) -> Tensor:
    """Posterior parameters [N, 2C] and pooled vectors [B, D] -> [N + ceil(B D / 2C), 1, 2C]."""
    width = parameters.shape[1]
    tail = F.pad(pooled.flatten(), (0, -pooled.numel() % width)).view(-1, width)
    return torch.cat([parameters, tail])[:, None]


def from_boundary(boundary: Tensor, tokens: int, items: int, width: int) -> tuple[Tensor, Tensor]:
    """The way back: (parameters [tokens, 2C], pooled [items, width])."""
    rows = boundary[:, 0]
    return rows[:tokens], rows[tokens:].flatten()[: items * width].view(items, width)
