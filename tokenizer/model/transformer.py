"""The transformer that encoder and decoder share: pre-norm blocks over packed tokens (FORMAT 5).

It differs from a textbook one in three ways: tokens of all items are packed without a batch axis and a `Plan` says who
attends to whom; positions are a resized learned table plus 4D rotation; and in a tile decoded with context, keys and
values of earlier tiles stand in front of the current ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.model.attention import attend
from tokenizer.model.config import TransformerConfig
from tokenizer.model.fused import linear_gelu
from tokenizer.model.plan import Plan
from tokenizer.model.positions import PositionTable
from tokenizer.model.precision import at_least_float32, full_precision
from tokenizer.model.rope import rotary_table, rotate

NORM_EPS = 1e-6

BlockCache = tuple[Tensor, Tensor]
"""Keys [M, H, Dh] (after QK norm, before rotation) and values [M, H, Dh] of one block."""

Rotary = tuple[Tensor, Tensor]
"""Rotation tables of queries and keys; one and the same unless cached keys stand in front."""

Observer = Callable[[int, Tensor], None]
"""Called with the number of blocks done and the tokens [N, D] in segment order; for parity checks and plots."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32 at least."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)
        return normed


class HeadNorm(nn.Module):
    """QK norm: each head L2-normalised, times a learned scale for each head and channel, times sqrt(Dh)."""

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(heads, head_width))

    def forward(self, x: Tensor) -> Tensor:
        """[N, H, Dh] -> the same shape and dtype; computed in float32 at least."""
        full = at_least_float32(x)
        length = torch.linalg.vector_norm(full, dim=-1, keepdim=True).clamp_min(1e-12)
        normed: Tensor = full / length * (at_least_float32(self.scale) * math.sqrt(x.shape[-1]))
        return normed.to(x.dtype)


def make_norm(kind: str, width: int) -> nn.Module:
    return RMSNorm(width) if kind == "rms" else nn.LayerNorm(width, eps=NORM_EPS)


class Attention(nn.Module):
    """Multi-head attention over the segments of a plan.

    Attributes:
        cudnn: see `tokenizer.model.attention.attend`.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.head_width = config.heads, config.head_width
        self.cudnn = False
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)
        self.query_norm = HeadNorm(config.heads, config.head_width) if config.qk_norm else None
        self.key_norm = HeadNorm(config.heads, config.head_width) if config.qk_norm else None

    def forward(
        self, x: Tensor, plan: Plan, rotary: Rotary | None, cache: BlockCache | None = None
    ) -> tuple[Tensor, BlockCache | None]:
        """x [N, D] in segment order -> [N, D] and, for a plan with context, the cache for the next tile."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, self.head_width)).unbind(1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        next_cache = None
        if plan.carry is not None:
            key, value, next_cache = _with_context(key, value, plan, cache)
        if rotary is not None:
            query, key = rotate(query, rotary[0]), rotate(key, rotary[1])
        attended = attend(query, key, value, plan.segments, cudnn=self.cudnn)
        return self.out(attended.flatten(1)), next_cache


def _with_context(
    key: Tensor, value: Tensor, plan: Plan, cache: BlockCache | None
) -> tuple[Tensor, Tensor, BlockCache]:
    """Put cached keys and values in front of the current ones; pick those seen now and those kept for later."""
    assert plan.carry is not None
    # The carry counts the current tokens in batch order, the block works in segment order.
    key, value = plan.scatter(key), plan.scatter(value)
    if cache is not None:
        key, value = torch.cat([cache[0], key]), torch.cat([cache[1], value])
    keep, seen = plan.carry.keep, plan.carry.keys
    return key[seen], value[seen], (key[keep], value[keep])


class MLP(nn.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(linear_gelu(self.up, x))
        return output


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config.norm, config.width)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config.norm, config.width)
        self.mlp = MLP(config.width, config.mlp_width, config.bias)

    def forward(
        self, x: Tensor, plan: Plan, rotary: Rotary | None, cache: BlockCache | None = None
    ) -> tuple[Tensor, BlockCache | None]:
        update, next_cache = self.attention(self.attention_norm(x), plan, rotary, cache)
        x = x + update
        return x + self.mlp(self.mlp_norm(x)), next_cache


class Transformer(nn.Module):
    """Input layer, positions, blocks and final norm.

    Args:
        config: sizes.
        inputs: features of a token coming in.
    """

    def __init__(self, config: TransformerConfig, inputs: int) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(inputs, config.width, bias=config.bias)
        self.positions = PositionTable(config.width) if config.learned_positions else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = make_norm(config.norm, config.width)

    def forward(
        self,
        features: Tensor,
        plan: Plan,
        caches: list[BlockCache] | None = None,
        observe: Observer | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """[N, inputs] in batch order -> [N, D] in batch order.

        Args:
            caches: for a plan with context: one entry for each block, replaced in place; empty before the first tile.
            observe: called after the positions were added (0) and after each block (1, 2, ...).
            added: [N, D] in batch order, what tokens are besides what the input layer makes of them.
        """
        rotary = self._rotary(plan) if self.config.rotary else None
        x = self.embed(plan.gather(features))
        if added is not None:
            x = x + plan.gather(added).to(x.dtype)
        if self.positions is not None:
            x = x + self.positions(plan).to(x.dtype)
        if observe is not None:
            observe(0, x)
        kept: list[BlockCache] = []
        for number, block in enumerate(self.blocks):
            x, cache = block(x, plan, rotary, caches[number] if caches else None)
            if cache is not None:
                kept.append(cache)
            if observe is not None:
                observe(number + 1, x)
        if caches is not None:
            caches[:] = kept
        return plan.scatter(self.norm(x))

    def _rotary(self, plan: Plan) -> Rotary:
        kind, width = full_precision(self.embed.weight.dtype), self.config.head_width
        queries = plan.table(("rotary", width, kind), lambda: rotary_table(plan.positions, width, kind))
        if plan.carry is None:
            return queries, queries
        return queries, rotary_table(plan.carry.key_positions, width, kind)
