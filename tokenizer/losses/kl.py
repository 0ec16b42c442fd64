"""KL: how far the posterior is from a standard normal (FORMAT 7, PAPER 2).

    KL_i = sum over channels of (m^2 + v - 1 - log v) / 2,  0 or more, in nats

One value for each token. It is summed over channels, as the divergence of the token's posterior is, not averaged: a
channel then weighs the same in stage 1, with 32 of them, as in stage 2, with 48.
"""

from __future__ import annotations

from torch import Tensor

from tokenizer.model.posterior import Posterior


def kl(posterior: Posterior) -> Tensor:
    """Divergence of each token's posterior, [N] float32 (float64 for float64); the loss is its mean over tokens."""
    return posterior.kl()
