"""A network with one block on each side, and steps of plain gradient descent, for the tests of FP8."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from tests.tokenizer.networks import visuals
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import ATokenConfig, TransformerConfig


def tiny_config(width: int = 32, mlp_width: int = 48, depth: int = 1, heads: int = 2) -> ATokenConfig:
    stack = TransformerConfig(
        width=width, depth=depth, heads=heads, mlp_width=mlp_width, norm="layer", bias=True, qk_norm=False
    )
    decoder = replace(stack, norm="rms", bias=False, qk_norm=True)
    return ATokenConfig(name="tiny", patch_size=(4, 4, 4), latent_channels=12, encoder=stack, decoder=decoder)


def tiny_network(config: ATokenConfig | None = None) -> ATokenNetwork:
    network = ATokenNetwork(config or tiny_config())
    network.reset_parameters(torch.Generator().manual_seed(1))
    return network


def step(network: ATokenNetwork, seed: int) -> float:
    """A training step with plain gradient descent; the loss before it."""
    tokens = visuals((12, 20), (16, 8), seed=seed, dtype=torch.float32).to(network.device)
    decoded = network.decode(network.encode(tokens).latents)
    loss = F.mse_loss(decoded.features, tokens.features)
    loss.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None
    return loss.item()
