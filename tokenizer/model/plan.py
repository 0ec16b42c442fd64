"""What attention and positions need to know about a batch, computed once and shared by all layers.

A plan is made on the host from the host copy of the positions, with sorts and scatters and no loop over tokens, and
sent to the device without waiting. It puts the tokens into *segment order*: a segment is the set of tokens that attend
to each other, one temporal tile of one item (FORMAT 10), and segments of equal length lie side by side so that a CPU
can run them as one batched attention without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenizer.sparse import SparseTokens, built_for_all


@dataclass(frozen=True, slots=True)
class Segments:
    """Which queries see which keys: consecutive segments, queries and keys in the same segment order.

    runs: (count, queries, keys) of consecutive segments with equal lengths, host numbers.
    query_offsets / key_offsets: cumulative lengths, [S + 1] int32 on the device, as varlen kernels want them.
    max_queries / max_keys: the longest segment.
    alike: whether all have one length; a fact of its own, for compilers take the number of runs for a constant.
    """

    runs: tuple[tuple[int, int, int], ...]
    query_offsets: Tensor
    key_offsets: Tensor
    max_queries: int
    max_keys: int
    alike: bool

    @classmethod
    def from_lengths(cls, queries: Tensor, keys: Tensor, device: torch.device) -> Segments:
        """From the query and key counts of each segment, [S] int64 on the CPU."""
        pairs = torch.stack([queries, keys], dim=1)
        kinds, counts = torch.unique_consecutive(pairs, dim=0, return_counts=True)
        runs = tuple((c, q, k) for (q, k), c in zip(kinds.tolist(), counts.tolist(), strict=True))
        return cls(
            runs=runs,
            query_offsets=_send(_cumulative(queries), device),
            key_offsets=_send(_cumulative(keys), device),
            max_queries=max((q for _, q, _ in runs), default=0),
            max_keys=max((k for _, _, k in runs), default=0),
            alike=len(runs) == 1,
        )


@dataclass(frozen=True, slots=True)
class Carry:
    """How a tile of a decode with context uses the keys and values cached from earlier tiles (FORMAT 10).

    Both index the concatenation [cached, current].

    keys: rows that the queries see, in segment order.
    keep: rows that become the cache of the next tile.
    key_positions: [K, 4] positions of `keys`, tile-local.
    """

    keys: Tensor
    keep: Tensor
    key_positions: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything position-dependent that a transformer needs for one forward pass.

    rows: [N] rows of the batch in segment order, or None if the batch is in that order already.
    inverse: [N] the way back, or None.
    positions: [N, 4] tile-local positions in segment order.
    extent: [N, 2] rows and columns (largest x + 1, largest y + 1) of the segment a token belongs to.
    segments: who attends to whom.
    carry: only for tiles decoded with cached context.
    """

    rows: Tensor | None
    inverse: Tensor | None
    positions: Tensor
    extent: Tensor
    segments: Segments
    carry: Carry | None = None
    _tables: dict[Hashable, Tensor] = field(default_factory=dict)

    def table(self, key: Hashable, build: Callable[[], Tensor]) -> Tensor:
        """A tensor that depends on the plan alone, built on first use and then shared by all layers and networks."""
        if key not in self._tables:
            self._tables[key] = built_for_all(build)
        return self._tables[key]

    def gather(self, features: Tensor) -> Tensor:
        """Rows of the batch [N, C] -> segment order."""
        return features if self.rows is None else features[self.rows]

    def scatter(self, features: Tensor) -> Tensor:
        """Segment order [N, C] -> rows of the batch."""
        return features if self.inverse is None else features[self.inverse]


def tile_plan(tokens: SparseTokens, steps: int) -> Plan:
    """The plan of a batch cut into independent tiles of `steps` latent time steps.

    Windows start at the smallest t of the whole batch, as released. Shared through the cache of `tokens`, so that
    encode and decode of the same positions compute it once.
    """
    key = ("tiles", steps, tokens.device)
    return tokens.shared(key, lambda: _make_tile_plan(tokens, steps))


def item_segments(tokens: SparseTokens) -> Segments:
    """One query for each item, seeing all its tokens in batch order: what attention pooling needs."""
    return tokens.shared(
        ("pool", tokens.device),
        lambda: Segments.from_lengths(torch.ones_like(tokens.lengths), tokens.lengths, tokens.device),
    )


def _make_tile_plan(tokens: SparseTokens, steps: int) -> Plan:
    positions = tokens.host_positions.long()
    if not tokens.num_tokens:
        empty = torch.zeros(0, dtype=torch.int64, device="cpu")
        segments = Segments.from_lengths(empty, empty, tokens.device)
        return Plan(None, None, tokens.positions, tokens.positions[:, :2], segments)
    time = positions[:, 0] - positions[:, 0].min()
    tile = time // steps
    local = positions.clone()
    local[:, 0] = time - tile * steps
    item = torch.repeat_interleave(torch.arange(tokens.batch_size, device="cpu"), tokens.lengths)
    _, segment, lengths = torch.unique(item * (int(tile.max()) + 1) + tile, return_inverse=True, return_counts=True)

    by_length = torch.argsort(lengths, stable=True)
    rank = torch.empty_like(by_length)
    rank[by_length] = torch.arange(len(by_length), device="cpu")
    rows = torch.argsort(rank[segment], stable=True)
    extent = segment_extent(local, segment, len(lengths))

    in_order = bool((rows[1:] > rows[:-1]).all())
    inverse = torch.empty_like(rows)
    inverse[rows] = torch.arange(len(rows), device="cpu")
    device, sorted_lengths = tokens.device, lengths[by_length]
    return Plan(
        rows=None if in_order else _send(rows, device),
        inverse=None if in_order else _send(inverse, device),
        positions=_send(local[rows].int(), device),
        extent=_send(extent[rows].int(), device),
        segments=Segments.from_lengths(sorted_lengths, sorted_lengths, device),
    )


def segment_extent(positions: Tensor, segment: Tensor, count: int) -> Tensor:
    """[N, 2] for each token: largest x + 1 and largest y + 1 in its segment (segments numbered 0..count-1)."""
    largest = positions.new_zeros(count, 2)
    largest.scatter_reduce_(0, segment[:, None].expand(-1, 2), positions[:, 1:3], "amax")
    return largest[segment] + 1


def host_rows(mask: Tensor, *, wait: bool = False) -> Tensor | None:
    """Rows where bool [N] is true, on a CPU, where each sort of row is worth computing alone.

    None where finding them would make the host wait for a device, or a compiler stop, and on "meta", where there are
    none.

    Args:
        wait: let the host wait, once: a training step does so anyway.
    """
    if mask.is_meta or (mask.device.type != "cpu" and not wait) or torch.compiler.is_compiling():
        return None
    return mask.nonzero()[:, 0]


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
