"""The whole network: encode and decode sparse tokens of any modality in three calls.

    encoding = network.encode(tokens)            # patches [N, 3072]
    latents = encoding.posterior.mean            # or encoding.latents: quantised where the model is discrete
    patches = network.decode(latents)            # [N, 3072]

There is no branch for a modality here: it is what happens before `encode` and after `decode`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.model.config import ATokenConfig
from tokenizer.model.context import Tiling, context_tiles
from tokenizer.model.decoder import Decoder
from tokenizer.model.encoder import Encoder
from tokenizer.model.piecewise import make_skip
from tokenizer.model.plan import Plan, item_segments, tile_plan
from tokenizer.model.positions import PositionTable
from tokenizer.model.posterior import Posterior
from tokenizer.model.refiner import finished, make_refiner
from tokenizer.model.transformer import Block, BlockCache, Observer, Transformer
from tokenizer.quantizers import Quantized, Quantizer, make_quantizer
from tokenizer.sparse import SparseTokens, built_for_all


@dataclass(frozen=True)
class Encoding:
    """What the encoder says about a batch.

    features: [N, D] tokens for understanding, after the final norm.
    pooled: [B, D] one vector an item, not normalised (use torch.nn.functional.normalize to compare with text).
    posterior: the Gaussian over latents.
    quantizer: the model's, or None for continuous models.
    """

    features: SparseTokens
    pooled: Tensor
    posterior: Posterior
    quantizer: Quantizer | None

    @functools.cached_property
    def quantized(self) -> Quantized | None:
        """Quantised means, or None for a continuous model."""
        return None if self.quantizer is None else built_for_all(self._quantize)

    def _quantize(self) -> Quantized:
        assert self.quantizer is not None
        # Kept for all who ask, so with a gradient if there can be one: the first may ask for indices within no_grad.
        with torch.set_grad_enabled(self.posterior.parameters.features.requires_grad):
            return self.quantizer.quantize(self.posterior.mean.features)

    @property
    def indices(self) -> SparseTokens | None:
        """[N, codebooks] int32 tokens, or None for a continuous model."""
        return None if self.quantized is None else self.features.with_features(self.quantized.indices)

    @property
    def latents(self) -> SparseTokens:
        """[N, C]: what to decode. The quantised values of a discrete model, the mean of a continuous one."""
        mean = self.posterior.mean
        if self.quantized is None:
            return mean
        values = self.quantized.values
        return mean.with_features(values if torch.is_grad_enabled() else values.detach())


def draw_linear(layer: nn.Linear, generator: torch.Generator) -> None:
    """Draw a layer anew: weights truncated normal with std 1 / sqrt(inputs), biases zero."""
    nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class ATokenNetwork(nn.Module):
    """Encoder, posterior, quantiser and decoder.

    Args:
        config: sizes; see `tokenizer.model.config` for the named ones.

    Parameters are drawn by `reset_parameters(generator)`; right after construction they are torch's defaults.
    """

    def __init__(self, config: ATokenConfig) -> None:
        super().__init__()
        self.config = config
        patch, latent = config.patch_features, config.latent_channels
        self.encoder = Encoder(config.encoder, patch, latent)
        self.decoder = Decoder(config.decoder, latent, patch) if config.decoder is not None else None
        self.skip = make_skip(config)
        self.refiner = make_refiner(config)
        self.quantizer: Quantizer | None = (
            make_quantizer(config.quantizer, config.latent_channels) if config.quantizer is not None else None
        )

    @property
    def device(self) -> torch.device:
        return self.encoder.to_posterior.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.to_posterior.weight.dtype

    def encode(self, patches: SparseTokens, observe: Observer | None = None) -> Encoding:
        """Encode a batch of any sizes and modalities.

        Tiles of `config.tile_frames` frames are encoded independently; the pooled vector sees all of them.

        Args:
            patches: [N, P] with pixel values in [-1, 1] (see `tokenizer.patches`). Cast to the model's dtype.
            observe: see `Transformer.forward`.

        Raises:
            InputError: no tokens, an item without tokens, a wrong feature count, another device, or (on a CPU) values
                that `SparseTokens.validate` refuses.
        """
        patches = self._checked(patches, self.config.patch_features, "patches")
        plan = tile_plan(patches, self.config.tile_steps)
        features, parameters = self.encoder(patches.features, plan, observe)
        if self.skip is not None:
            parameters = self.skip.add_to_parameters(parameters, patches.features, features)
        pooled = self.encoder.pool(features, item_segments(patches), patches.batch_size)
        return Encoding(
            features=patches.with_features(features),
            pooled=pooled,
            posterior=Posterior(patches.with_features(parameters)),
            quantizer=self.quantizer,
        )

    def pooled(self, patches: SparseTokens) -> Tensor:
        """The pooled vectors [B, D] that `encode` gives, without posteriors, which cost a small model more.

        Raises:
            InputError: as `encode`.
        """
        patches = self._checked(patches, self.config.patch_features, "patches")
        features = self.encoder.transformer(patches.features, tile_plan(patches, self.config.tile_steps))
        vectors: Tensor = self.encoder.pool(features, item_segments(patches), patches.batch_size)
        return vectors

    def decode(
        self, latents: SparseTokens, tiling: Tiling | None = None, observe: Observer | None = None
    ) -> SparseTokens:
        """Decode a batch of latents to patches [N, P].

        Args:
            latents: [N, C], continuous or quantised values; or [N, codebooks] integer indices of a discrete model.
            tiling: tile stride and context in frames; the default is the released one, independent tiles.
            observe: see `Transformer.forward`; for independent tiles only.

        Raises:
            InputError: as for `encode`, a model without a decoder, or an illegal tiling.
        """
        latents = self.checked_latents(latents)
        assert self.decoder is not None
        tiling = tiling or Tiling(stride=self.config.tile_frames)
        stride, context = tiling.steps(self.config.patch_size[0], self.config.tile_frames)
        if context == 0:
            return latents.with_features(
                self.decode_tile(latents.features, tile_plan(latents, stride), observe=observe)
            )
        caches: list[BlockCache] = []
        rows, parts = [], []
        for tile, plan in context_tiles(latents, stride, context):
            rows.append(tile)
            parts.append(self.decode_tile(latents.features[tile], plan, caches))
        return latents.with_features(torch.cat(parts)[torch.argsort(torch.cat(rows))])

    def decode_tile(
        self, latents: Tensor, plan: Plan, caches: list[BlockCache] | None = None, observe: Observer | None = None
    ) -> Tensor:
        """Latents [N, C] of one plan -> patches [N, P]; see `Decoder.forward`."""
        assert self.decoder is not None
        read = self.skip.read(latents) if self.skip is not None else None
        patches: Tensor = self.decoder(latents, plan, caches, observe, read)
        return finished(patches, latents, plan, self.skip, self.refiner)

    def checked_latents(self, latents: SparseTokens) -> SparseTokens:
        """`latents` as the decoder reads them: indices turned into values, cast to the model's dtype, checked."""
        if self.decoder is None:
            raise InputError(f"{self.config.name} has no decoder; load a configuration with one")
        if not latents.features.is_floating_point():
            latents = latents.with_features(self.values_of(latents.features))
        return self._checked(latents, self.config.latent_channels, "latents")

    def values_of(self, indices: Tensor) -> Tensor:
        """Codebook indices [N, codebooks] -> latent values [N, C].

        Raises:
            InputError: the model is continuous, or the indices are not its.
        """
        if self.quantizer is None:
            raise InputError(f"{self.config.name} is continuous and has no codebook; give it latents, not indices")
        return self.quantizer.decode(indices)

    def _checked(self, tokens: SparseTokens, channels: int, what: str) -> SparseTokens:
        if tokens.num_tokens == 0:
            raise InputError(f"the batch of {what} holds no tokens; give at least one item with one token")
        if bool((tokens.lengths == 0).any()):
            item = int((tokens.lengths == 0).int().argmax())
            raise InputError(f"item {item} of the batch has no tokens; leave it out")
        if tokens.num_channels != channels:
            raise InputError(f"{self.config.name} takes {what} of {channels} channels, got {tokens.num_channels}")
        if tokens.device != self.device:
            raise InputError(
                f"the {what} are on {tokens.device}, the model on {self.device}; use tokens.to(model.device)"
            )
        tokens = tokens.to(dtype=self.dtype)
        # On a device the check would make the host wait; there it is the caller's choice.
        return tokens.validate() if tokens.device.type == "cpu" and not torch.compiler.is_compiling() else tokens

    def transformers(self) -> list[Transformer]:
        """The encoder's, and the decoder's if there is one."""
        return [part.transformer for part in (self.encoder, self.decoder) if part is not None]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw every parameter anew.

        Linear weights are truncated normal with std 1 / sqrt(inputs), position tables and the pool's probe normal with
        std 0.02, biases zero, norms one. Layers that write into the residual stream are scaled by 1 / sqrt(2 depth).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                draw_linear(module, generator)
            elif isinstance(module, PositionTable):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
        for stack in self.transformers():
            for block in stack.blocks:
                assert isinstance(block, Block)
                for layer in (block.attention.out, block.mlp.down):
                    layer.weight.mul_((2 * stack.config.depth) ** -0.5)
        nn.init.normal_(self.encoder.pool.probe, std=0.02, generator=generator)
        if self.refiner is not None:
            self.refiner.reset_parameters(generator)
