"""Encoder and attention-pool head (FORMAT 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenizer.model.attention import attend
from tokenizer.model.config import TransformerConfig
from tokenizer.model.plan import Plan, Segments
from tokenizer.model.transformer import MLP, NORM_EPS, Observer, Transformer


class AttentionPool(nn.Module):
    """One vector for an item: a learned probe attends to all tokens of the item, then a residual MLP.

    No residual from the probe, no rotation, no QK norm.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, bias = config.width, config.bias
        self.heads, self.head_width = config.heads, config.head_width
        self.probe = nn.Parameter(torch.zeros(width))
        self.query = nn.Linear(width, width, bias=bias)
        self.key_value = nn.Linear(width, 2 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, config.mlp_width, bias)

    def forward(self, x: Tensor, segments: Segments, items: int) -> Tensor:
        """x [N, D] in batch order, one segment an item -> [B, D]; without tokens, what biases make of zeros."""
        query = self.query(self.probe).view(1, self.heads, self.head_width).expand(items, -1, -1)
        key, value = self.key_value(x).unflatten(-1, (2, self.heads, self.head_width)).unbind(1)
        pooled = self.out(attend(query, key, value, segments).flatten(1))
        output: Tensor = pooled + self.mlp(self.norm(pooled))
        return output


class Encoder(nn.Module):
    """Patches -> token features.

    Args:
        config: sizes of the transformer.
        patch_features: features of an input token.
        latent_channels: channels of a latent; `to_posterior` writes mean and log-variance, so twice as many.
    """

    def __init__(self, config: TransformerConfig, patch_features: int, latent_channels: int) -> None:
        super().__init__()
        self.transformer = Transformer(config, patch_features)
        self.pool = AttentionPool(config)
        self.to_posterior = nn.Linear(config.width, 2 * latent_channels, bias=False)

    def forward(self, patches: Tensor, plan: Plan, observe: Observer | None = None) -> tuple[Tensor, Tensor]:
        """patches [N, P] -> features [N, D] after the final norm, and posterior parameters [N, 2C]."""
        features = self.transformer(patches, plan, observe=observe)
        return features, self.to_posterior(features)
