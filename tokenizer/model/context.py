"""Tiles decoded one after the other, each seeing keys and values cached from the tiles before it (FORMAT 10).

`ContextPlanner` decides, from positions alone, which cached tokens each query sees and which tokens are cached next. It
is fed one tile at a time, so the whole-batch decode and the streaming decode are the same code.

As released, with C cached steps: the first tile has local time from 0, every later one from C; after a tile, the tokens
of the last C local steps of [cached, current] are kept and their time is rebased so that they end right before C. The
"last" step is that of the whole batch, so an item that has ended leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.model.plan import Carry, Plan, Segments, segment_extent
from tokenizer.sparse import SparseTokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How a video is decoded: tiles of `stride` frames, each seeing up to `context` frames decoded before it.

    The released defaults are 16 and 0: independent tiles.
    """

    stride: int = 16
    context: int = 0

    def steps(self, patch_frames: int, tile_frames: int) -> tuple[int, int]:
        """Latent steps (stride, context) for patches of `patch_frames`.

        Raises:
            InputError: a stride or context that is not a multiple of the patch, or a tile with its context that is
                longer than the `tile_frames` the model was trained with.
        """
        if self.stride < patch_frames or self.stride % patch_frames:
            raise InputError(f"tile stride must be a positive multiple of {patch_frames} frames, got {self.stride}")
        if self.context < 0 or self.context % patch_frames:
            raise InputError(f"tile context must be a multiple of {patch_frames} frames, got {self.context}")
        if self.stride + self.context > tile_frames:
            raise InputError(
                f"tile stride {self.stride} + context {self.context} is more than the {tile_frames} frames "
                "that attend to each other in this model; make one of them smaller"
            )
        return self.stride // patch_frames, self.context // patch_frames


class ContextPlanner:
    """Plans for successive tiles.

    Args:
        context: cached latent steps, at least 1.
        device: where the tables of the plans go.
    """

    def __init__(self, context: int, device: torch.device) -> None:
        self.context = context
        self.device = device
        self._started = False
        self._cached_item = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._cached_positions = torch.zeros(0, 4, dtype=torch.int64, device="cpu")

    def next(self, positions: Tensor, item: Tensor) -> Plan:
        """The plan of the next tile.

        Args:
            positions: [n, 4] int64 on the CPU, time counted from the start of the tile.
            item: [n] int64 on the CPU, the batch item of each token; n is at least 1.

        Returns:
            A plan for the n tokens of the tile in the order given.
        """
        local = positions.clone()
        if self._started:
            local[:, 0] += self.context
        self._started = True

        # Cached tokens of items beyond the last one present are dropped by the released code; it changes which step
        # counts as the newest.
        present = self._cached_item <= item.max()
        cached_rows = torch.nonzero(present).flatten()
        all_item = torch.cat([self._cached_item[present], item])
        all_positions = torch.cat([self._cached_positions[present], local])
        all_rows = torch.cat([cached_rows, torch.arange(len(item), device="cpu") + len(self._cached_item)])

        plan = self._plan(local, item, all_item, all_positions, all_rows)
        self._remember(all_item, all_positions)
        return plan

    def _plan(self, local: Tensor, item: Tensor, all_item: Tensor, all_positions: Tensor, all_rows: Tensor) -> Plan:
        count = int(item.max()) + 1
        queries = torch.bincount(item, minlength=count)
        keys = torch.bincount(all_item, minlength=count)
        keys[queries == 0] = 0

        # Items ordered by their counts, so that equal ones form one batched attention; items without queries drop out.
        order = torch.argsort(queries * (int(keys.max()) + 1) + keys, stable=True)
        order = order[queries[order] > 0]
        rank = torch.full((count,), count, device="cpu")
        rank[order] = torch.arange(len(order), device="cpu")
        rows = torch.argsort(rank[item], stable=True)
        inverse = torch.empty_like(rows)
        inverse[rows] = torch.arange(len(rows), device="cpu")
        seen = torch.argsort(rank[all_item], stable=True)
        seen = seen[rank[all_item[seen]] < count]

        newest = int(all_positions[:, 0].max())
        keep = torch.nonzero(all_positions[:, 0] >= newest - self.context + 1).flatten()
        return Plan(
            rows=self._send(rows),
            inverse=self._send(inverse),
            positions=self._send(local[rows].int()),
            extent=self._send(segment_extent(local, item, count)[rows].int()),
            segments=Segments.from_lengths(queries[order], keys[order], self.device),
            carry=Carry(
                keys=self._send(all_rows[seen]),
                keep=self._send(all_rows[keep]),
                key_positions=self._send(all_positions[seen].int()),
            ),
        )

    def _remember(self, all_item: Tensor, all_positions: Tensor) -> None:
        first = int(all_positions[:, 0].max()) - self.context + 1
        keep = all_positions[:, 0] >= first
        self._cached_item = all_item[keep]
        self._cached_positions = all_positions[keep].clone()
        self._cached_positions[:, 0] -= first

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def context_tiles(tokens: SparseTokens, stride: int, context: int) -> Iterator[tuple[Tensor, Plan]]:
    """Cut a batch into tiles of `stride` steps in order of time.

    Yields:
        The rows of a tile, [n] int64 on the device of `tokens`, and the plan for these rows. Empty tiles are left out.
    """
    positions = tokens.host_positions.long()
    if not len(positions):
        return
    item = torch.repeat_interleave(torch.arange(tokens.batch_size, device="cpu"), tokens.lengths)
    time = positions[:, 0] - positions[:, 0].min()
    tile = time // stride
    order = torch.argsort(tile, stable=True)
    numbers, counts = torch.unique_consecutive(tile[order], return_counts=True)
    planner = ContextPlanner(context, tokens.device)
    for number, rows in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
        local = positions[rows].clone()
        local[:, 0] = time[rows] - number * stride
        yield rows.to(tokens.device, non_blocking=True), planner.next(local, item[rows])
