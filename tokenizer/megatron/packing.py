"""From a native `Plan` to what Megatron's packed (`thd`) layers take, and padding of packed tokens.

Tokens of a batch lie in segment order, so Megatron's sequences are the plan's segments: one temporal tile of one item
each. Sequence parallelism wants their number to be a multiple of the tensor ranks and FP8 one of 16. Rows of zeros are
added behind the last segment as a segment of their own: they attend to each other only, are cut off again, and so get
and give no gradient. No tensor of the batch is padded inside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from tokenizer.megatron.rows import padded_count
from tokenizer.model.plan import Plan, Segments, tile_plan
from tokenizer.sparse import SparseTokens


@dataclass
class PackedTiles(PackedSeqParams):  # type: ignore[misc]
    """Megatron's parameters, and what our core attention needs besides.

    segments: the same sequences for the native attention kernel, padding included.
    rotary: [T, 1, Dh / 2, 2] cosines and sines of the padded tokens, float32 at least; None without rotation.
    """

    segments: Segments | None = None
    rotary: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Packing:
    """The plan of a batch, the segments of its padded tokens, and how many tokens that makes."""

    plan: Plan
    segments: Segments
    total: int

    def parameters(self, rotary: Tensor | None) -> PackedTiles:
        """What the layers of a block get, from the rotation table of the tokens without padding."""
        segments = self.segments
        return PackedTiles(
            qkv_format="thd",
            cu_seqlens_q=segments.query_offsets,
            cu_seqlens_kv=segments.key_offsets,
            max_seqlen_q=segments.max_queries,
            max_seqlen_kv=segments.max_keys,
            segments=segments,
            rotary=None if rotary is None else _no_rotation_behind(rotary, self.total),
        )


def pack(tokens: SparseTokens, steps: int, multiple: int) -> Packing:
    """The packing of a batch in tiles of `steps` latent time steps, padded to a multiple of `multiple`.

    Shared through the cache of `tokens`, so encoder and decoder compute it once.
    """
    key = ("megatron packing", steps, multiple, tokens.device)
    return tokens.shared(key, lambda: _make_packing(tokens, steps, multiple))


def _make_packing(tokens: SparseTokens, steps: int, multiple: int) -> Packing:
    plan = tile_plan(tokens, steps)
    total = padded_count(tokens.num_tokens, multiple)
    extra = total - tokens.num_tokens
    if not extra:
        return Packing(plan, plan.segments, total)
    lengths = [torch.full((count,), queries) for count, queries, _ in plan.segments.runs]
    padded = torch.cat([*lengths, torch.tensor([extra])])
    return Packing(plan, Segments.from_lengths(padded, padded, tokens.device), total)


def _no_rotation_behind(rotary: Tensor, total: int) -> Tensor:
    """Append rows (1, 0), the angle zero, up to `total` rows."""
    extra = total - rotary.shape[0]
    if not extra:
        return rotary
    none = F.pad(rotary.new_ones(1, 1, rotary.shape[2], 1), (0, 1))
    return torch.cat([rotary, none.expand(extra, -1, -1, -1)])
