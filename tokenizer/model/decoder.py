"""Decoder: latents -> patches (FORMAT 9)."""

from __future__ import annotations

from torch import Tensor, nn

from tokenizer.model.config import TransformerConfig
from tokenizer.model.plan import Plan
from tokenizer.model.transformer import BlockCache, Observer, Transformer


class Decoder(nn.Module):
    """Latents -> patches; no squashing at the end, values lie nominally in [-1, 1].

    Args:
        config: sizes of the transformer.
        latent_channels: channels of a latent.
        patch_features: features of an output token.
    """

    def __init__(self, config: TransformerConfig, latent_channels: int, patch_features: int) -> None:
        super().__init__()
        self.transformer = Transformer(config, latent_channels)
        self.to_patches = nn.Linear(config.width, patch_features, bias=False)

    def forward(
        self,
        latents: Tensor,
        plan: Plan,
        caches: list[BlockCache] | None = None,
        observe: Observer | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """latents [N, C] -> patches [N, P]. `caches` and `added` as in `Transformer.forward`."""
        patches: Tensor = self.to_patches(self.transformer(latents, plan, caches, observe, added))
        return patches
