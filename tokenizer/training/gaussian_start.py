"""Where a Gaussian decoder with a skip starts: a linear fit from decoded voxel tokens to what the octants hold.

Each Gaussian belongs to one octant of its voxel. The fit gives it the place, colour and presence of the surface there;
the transformer, which starts silent, learns what is better than any linear reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.gaussians.attributes import SH_DEGREE_0
from tokenizer.gaussians.decoder import GaussianDecoder

PRESENT, ABSENT = 0.9, 0.03
"""Opacities that the fit aims at where an octant holds surface, and where it does not."""

_REACH = 0.9
"""Largest |tanh| that a place is fitted with; its inverse grows without bound."""
_SPREAD = 0.1
"""Distance in voxels between the two sides on which Gaussians of one octant start."""
_RIDGE = 1e-3


@torch.no_grad()
def start_from_octants(
    decoder: GaussianDecoder,
    features: Sequence[Tensor],
    places: Sequence[Tensor],
    colours: Sequence[Tensor],
    counts: Sequence[Tensor],
) -> None:
    """Fit the skip by weighted least squares.

    Args:
        decoder: with a skip and a multiple of 8 Gaussians a voxel.
        features: of each asset [N, inputs], what the decoder will see.
        places / colours / counts: of each asset, as `tokenizer.assets.packing.octants` gives them.
    """
    config = decoder.config
    if decoder.skip is None or config.gaussians % 8:
        raise InputError("a start from octants needs a decoder with a skip and a multiple of 8 Gaussians a voxel")
    x = torch.cat([torch.nn.functional.pad(f, (0, 1), value=1.0) for f in features]).double()
    count = torch.cat(list(counts)).double()
    present = (count > 0).double()
    bias = decoder.offset_perturbation.double()
    opacity = _logit(ABSENT) + present * (_logit(PRESENT) - _logit(ABSENT)) - _logit(config.initial_opacity)
    place, colour = torch.cat(list(places)).double(), torch.cat(list(colours)).double()
    # An absent octant has no colour of its own: it takes that of the others, so that the fit stays smooth.
    mean = (colour * count[..., None]).sum(1, keepdim=True) / count.sum(1)[:, None, None]
    dc = (torch.where(present[..., None] > 0, colour, mean) - 0.5) / SH_DEGREE_0

    repeats = config.gaussians // 8
    weight = torch.zeros(config.outputs, config.inputs + 1, dtype=torch.float64)
    groups = weight.split([size * config.gaussians for size in (3, 3, 3, 4, 1)])
    everywhere = torch.ones(len(x), dtype=torch.float64)
    shown = _fit(x, torch.cat([dc.flatten(1), opacity], dim=1), everywhere)
    for octant in range(8):
        aside = _SPREAD * (torch.arange(repeats, dtype=torch.float64) - (repeats - 1) / 2)
        offset = (place[:, octant, None] - 0.5 + aside[:, None]) / (0.5 * config.voxel_size)
        raw = torch.atanh(offset.clamp(-_REACH, _REACH)) - bias[octant::8]
        places_fit = _fit(x, raw.flatten(1), present[:, octant])
        for repeat in range(repeats):
            number = octant + 8 * repeat
            three = slice(3 * number, 3 * number + 3)
            groups[0][three] = places_fit[3 * repeat : 3 * repeat + 3]
            groups[1][three] = shown[3 * octant : 3 * octant + 3]
            groups[4][number] = shown[24 + octant]
    decoder.skip.weight.copy_(weight[:, :-1])
    decoder.skip.bias.copy_(weight[:, -1])


def _fit(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Weights [C, F] that minimise sum_n w_n |y_n - W x_n|^2 + ridge, for x [N, F], y [N, C], w [N]."""
    weighted = x * weight[:, None]
    gram = weighted.T @ x
    gram.diagonal().add_(_RIDGE * len(x))
    solution: Tensor = torch.linalg.solve(gram, weighted.T @ y)
    return solution.T


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
