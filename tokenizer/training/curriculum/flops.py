"""How many operations a step takes, and how many a device can do: the utilisation that logs show.

Counted as `benchmarks.tokenizer` counts: two for each multiply-add of linear layers, position tables and attention. A
backward pass is twice a forward pass. Frozen networks (text towers, LPIPS) and rasterising are not counted: what is
shown is the share of the device that works on the model.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from tokenizer.model.config import TransformerConfig
from tokenizer.model.plan import tile_plan
from tokenizer.model.positions import GRID
from tokenizer.sparse import SparseTokens
from tokenizer.training.curriculum.model import TrainedModel
from tokenizer.training.curriculum.tasks import ASSET_RECONSTRUCTION, is_understanding

PASSES = 3
"""A forward and a backward pass, in forward passes."""


class Work:
    """Operations of training steps of one model.

    Args:
        model: before its parameters are shared out.
    """

    def __init__(self, model: TrainedModel) -> None:
        network = model.network
        self.config = network.config
        pool = network.encoder.pool
        once = _linear_weights(pool) - pool.key_value.weight.numel()
        # Query, output and MLP of the pool run once an item, not once a token.
        self.encoder = _linear_weights(network.encoder) - once
        self.decoder = _linear_weights(network.decoder) if network.decoder is not None else 0
        self.gaussians = _linear_weights(model.gaussians) if model.gaussians is not None else 0

    def of(self, tokens: SparseTokens, task: str) -> float:
        """Operations of a micro-batch, forward and backward."""
        runs = tile_plan(tokens, self.config.tile_steps).segments.runs
        pairs = sum(count * queries * keys for count, queries, keys in runs)
        total = self._stack(self.config.encoder, self.encoder, tokens.num_tokens, pairs)
        if not is_understanding(task) and self.config.decoder is not None:
            total += self._stack(self.config.decoder, self.decoder, tokens.num_tokens, pairs)
        if task == ASSET_RECONSTRUCTION:
            total += 2.0 * tokens.num_tokens * self.gaussians
        return PASSES * total

    @staticmethod
    def _stack(config: TransformerConfig, weights: int, tokens: int, pairs: int) -> float:
        table = GRID * GRID * config.width if config.learned_positions else 0
        return 2.0 * tokens * (weights + table) + 4.0 * pairs * config.width * config.depth


def _linear_weights(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on this device now, the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
