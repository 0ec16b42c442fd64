"""Attention inside cubic windows of voxels, without padding (FORMAT 11).

A window is what voxels of one item share after `(coordinate + shift) // size`. Windows hold anything from one voxel to
size^3. As in `tokenizer.model.plan`, they are put side by side by length, so that equal ones run as one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.model.attention import attend, attention_backend, varlen_attention
from tokenizer.model.plan import Segments
from tokenizer.model.precision import at_least_float32, no_autocast
from tokenizer.sparse import SparseTokens

SOFT_CAP = 30.0
"""Attention scores s become 30 tanh(s / 30)."""

_MAX_SCORES = 1 << 25
"""Score matrices made at once hold at most this many numbers; longer runs of windows are cut."""


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of a batch for one shift.

    number: [N] int64 on the CPU, the rank of each voxel's window among those that hold a voxel; windows are ordered by
        item, then x, y, z.
    lengths: [W] int64 on the CPU, voxels of each window.
    items: [W] int64 on the CPU, the item each window belongs to.
    rows / inverse: [N] batch order -> window order (shortest windows first) and back, on the device.
    segments: the windows in that order.
    soft_cap: None if every window holds exactly as many voxels as a window has along an edge: the reference takes a
        kernel without soft cap then.
    """

    number: Tensor
    lengths: Tensor
    items: Tensor
    rows: Tensor
    inverse: Tensor
    segments: Segments
    soft_cap: float | None


def window_plan(tokens: SparseTokens, size: int, shift: int) -> Windows:
    """The windows of `tokens` by their x, y, z; computed once for the positions and shared by all layers.

    Args:
        tokens: at least one voxel.
        size: voxels along the edge of a window.
        shift: added to the coordinates before they are divided; there is no wrap-around.
    """
    return tokens.shared(("windows", size, shift, tokens.device), lambda: _make_windows(tokens, size, shift))


def _make_windows(tokens: SparseTokens, size: int, shift: int) -> Windows:
    if tokens.num_tokens == 0:
        raise InputError("the batch holds no voxels; give at least one item with one voxel")
    cell = (tokens.host_positions[:, 1:].long() + shift) // size
    x, y, z = cell.unbind(1)
    _, y_count, z_count = (cell.amax(dim=0) + 1).tolist()
    per_item = (int(x.max()) + 1) * y_count * z_count
    item = torch.repeat_interleave(torch.arange(tokens.batch_size, device="cpu"), tokens.lengths)
    key = item * per_item + (x * y_count + y) * z_count + z
    present, number, lengths = torch.unique(key, return_inverse=True, return_counts=True)

    by_length = torch.argsort(lengths, stable=True)
    rank = torch.empty_like(by_length)
    rank[by_length] = torch.arange(len(by_length), device="cpu")
    rows = torch.argsort(rank[number], stable=True)
    inverse = torch.empty_like(rows)
    inverse[rows] = torch.arange(len(rows), device="cpu")
    ordered = lengths[by_length]
    return Windows(
        number=number,
        lengths=lengths,
        items=present // per_item,
        rows=rows.to(tokens.device, non_blocking=True),
        inverse=inverse.to(tokens.device, non_blocking=True),
        segments=Segments.from_lengths(ordered, ordered, tokens.device),
        soft_cap=None if bool((lengths == size).all()) else SOFT_CAP,
    )


def attend_windows(query: Tensor, key: Tensor, value: Tensor, windows: Windows) -> Tensor:
    """softmax(cap(q k^T / sqrt(Dh))) v inside each window.

    Args:
        query, key, value: [N, H, Dh] in window order.
        windows: which rows belong together, and whether scores are capped.

    Returns:
        [N, H, Dh], the dtype of `query`. Scores are computed in float32 at least.
    """
    if windows.soft_cap is None:
        return attend(query, key, value, windows.segments)
    backend = attention_backend(query.device, query.dtype)
    if backend == "flash-attn":  # torch's own kernel knows no soft cap
        return varlen_attention(backend, query, key, value, windows.segments, softcap=windows.soft_cap)
    outputs = []
    start = 0
    for count, length in _batches(windows.segments, query.shape[1]):
        rows = slice(start, start + count * length)
        q, k, v = (x[rows].unflatten(0, (count, length)).transpose(1, 2) for x in (query, key, value))
        outputs.append(_capped_attention(q, k, v, windows.soft_cap).transpose(1, 2).flatten(0, 1))
        start += count * length
    return torch.cat(outputs)


def _batches(segments: Segments, heads: int) -> Iterator[tuple[int, int]]:
    """(windows, voxels of each) of consecutive equal windows, cut so that the scores fit in memory."""
    for count, length, _ in segments.runs:
        most = max(1, _MAX_SCORES // (heads * length * length))
        for first in range(0, count, most):
            yield min(most, count - first), length


def _capped_attention(query: Tensor, key: Tensor, value: Tensor, cap: float) -> Tensor:
    """[W, H, L, Dh] each -> [W, H, L, Dh]."""
    # Autocast, under which decoders are trained, would round the scores to half precision.
    with no_autocast(query.device):
        scores = at_least_float32(query) @ at_least_float32(key).transpose(-1, -2) * query.shape[-1] ** -0.5
        weights = torch.softmax(cap * torch.tanh(scores / cap), dim=-1)
        return weights.to(value.dtype) @ value
