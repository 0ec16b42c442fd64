"""4D rotary positions (FORMAT 5).

What differs from the textbook: every axis uses the same Dh / 8 frequencies, and their exponent divides by the whole
head width, f_i = 10000^(-i / Dh), so for 72-wide heads they run only from 1 down to 0.359. Pairs are adjacent channels.
The Dh / 2 angles of a token are [t f, x f, y f, z f].
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.model.precision import at_least_float32

BASE = 10000.0


def rotary_frequencies(head_width: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """[Dh / 8] frequencies, largest first."""
    exponent = torch.arange(head_width // 8, dtype=dtype, device=device) / head_width
    return BASE**-exponent


def rotary_table(positions: Tensor, head_width: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of all tokens, [N, 1, Dh / 2, 2] in `dtype` (float32 or float64).

    Args:
        positions: [N, 4] integer, tile-local.
    """
    frequencies = rotary_frequencies(head_width, dtype, positions.device)
    angles = (positions.to(dtype)[:, :, None] * frequencies).flatten(1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[:, None]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent channel pairs of x [N, H, Dh] by the angles of `table` [N, 1, Dh / 2, 2].

    Computed in float32 at least, returned in the dtype of x.
    """
    pairs = at_least_float32(x).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # Compilers fuse real arithmetic but not complex; eager kernels do the complex product in one pass. Every number
        # is read with its neighbour, so that a kernel reads each line of memory once.
        cos, sin = table.unbind(-1)
        rotated: Tensor = pairs * cos[..., None] + pairs.flip(-1) * torch.stack([-sin, sin], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(table))
    return rotated.flatten(-2).to(x.dtype)
