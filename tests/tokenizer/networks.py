"""Small random networks and batches for the tokenizer's tests."""

from __future__ import annotations

import functools

import torch

from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import ATokenConfig, FSQConfig, TransformerConfig
from tokenizer.patches import visuals_to_tokens
from tokenizer.sparse import SparseTokens


def small_config(discrete: bool = False) -> ATokenConfig:
    """The shape of the released models with everything small: two blocks, 32 channels, patches of 4 x 4 x 4."""
    return ATokenConfig(
        name="small-d" if discrete else "small-c",
        patch_size=(4, 4, 4),
        latent_channels=12,
        encoder=TransformerConfig(width=32, depth=2, heads=2, mlp_width=48, norm="layer", bias=True, qk_norm=False),
        decoder=TransformerConfig(width=32, depth=2, heads=2, mlp_width=48, norm="rms", bias=False, qk_norm=True),
        quantizer=FSQConfig(codebook_size=4096, codebooks=2) if discrete else None,
    )


@functools.cache
def random_network(discrete: bool = False, dtype: torch.dtype = torch.float64) -> ATokenNetwork:
    """Weights large enough that every part matters to the output. In float64 equalities hold to 1e-12."""
    network = ATokenNetwork(small_config(discrete))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    return network.to(dtype).eval().requires_grad_(False)


def visuals(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> SparseTokens:
    """A batch of random images (H, W) and videos (T, H, W) for the small network."""
    generator = torch.Generator().manual_seed(seed)
    pixels = [torch.rand(*shape, 3, generator=generator) * 2 - 1 for shape in shapes]
    return visuals_to_tokens(pixels, small_config().patch_size)[0].to(dtype=dtype)


def random_latents(tokens: SparseTokens, channels: int = 12, seed: int = 5) -> SparseTokens:
    """Random latents at the positions of `tokens`."""
    generator = torch.Generator().manual_seed(seed)
    return tokens.with_features(torch.randn(tokens.num_tokens, channels, generator=generator).to(tokens.dtype))


def shuffled(tokens: SparseTokens, seed: int = 7) -> tuple[SparseTokens, torch.Tensor]:
    """The tokens of each item in random order, and the rows they came from."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat(
        [
            start + torch.randperm(int(length), generator=generator)
            for start, length in zip(tokens.offsets, tokens.lengths, strict=False)
        ]
    )
    return SparseTokens(tokens.features[rows], tokens.positions[rows], tokens.lengths), rows
