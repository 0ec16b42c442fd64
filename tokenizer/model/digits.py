"""Linear codes whose coefficients are written as base-4 digits, for models that quantise with FSQ of 4 levels.

Two bits say little about a strong coefficient and too much about a weak one, so a strong coefficient owns several
channels: its decoding vector stands in the code once for each of its digits, every time a quarter as long. Decoding
stays linear in the values that FSQ gives. Coding finds the levels channel by channel, strongest first, each time for
what the channels before it left over (a successive approximation), with the channels to come at the middle of their
range.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVEL_VALUES = (-1.0, -0.5, 0.0, 0.5)
"""What FSQ makes of the digits 0..3 (FORMAT 8)."""

MIDDLE = -0.25
"""The middle of the range of a channel."""


@torch.no_grad()
def code_in_digits(x: Tensor, decoder: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The digits of the best code for each row.

    Args:
        x: [N, F] float32 or float64.
        decoder: [K, c, F] decoding vectors, channels of a coefficient in order of weight.
        mean: [K, F].

    Returns:
        Digits [N, c] int64 in 0..3, and the number of the code [N] int64 with the least squared error.
    """
    codes, channels, features = decoder.shape
    gram = decoder @ decoder.transpose(1, 2)
    strength = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-12)
    projected = (x @ decoder.reshape(-1, features).T).unflatten(1, (codes, channels)) - (decoder * mean[:, None]).sum(
        -1
    )
    values = torch.full_like(projected, MIDDLE)
    rest = projected - MIDDLE * gram.sum(dim=1)
    for channel in range(channels):
        wanted = values[:, :, channel] + rest[:, :, channel] / strength[:, channel]
        level = (wanted * 2).round().clamp(-2, 1) / 2
        step = level - values[:, :, channel]
        values[:, :, channel] = level
        rest -= step[:, :, None] * gram[:, channel]
    # |x - m - D^T v|^2 = |x - m|^2 - v (D (x - m) + rest), since rest = D (x - m) - G v.
    distance = mean.square().sum(dim=-1) - 2 * x @ mean.T - (values * (projected + rest)).sum(dim=-1)
    best = distance.argmin(dim=1)
    chosen = values.gather(1, best[:, None, None].expand(-1, 1, channels))[:, 0]
    return (chosen * 2 + 2).round().long(), best
