"""A small convolutional network over decoded pixels, for small models (released ones have none).

A few transformer blocks over 16 x 16 patches learn slowly to draw a sharp edge at every place inside a patch, and what
they draw ends at the patch's border. What a pixel should be given the pixels around it is the same everywhere, so a few
convolutions learn it from few pictures. They see each decoded frame alone, across the borders of its patches.

Tokens stay packed: each is a square of its own, and before each convolution its border is copied from its neighbours,
found by position. So batches of any sizes run without padding, an item comes out the same alone and among others, and a
stream of tiles is refined tile by tile. Assets pass unchanged: the features of a voxel are no picture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.model.config import ATokenConfig, RefinerConfig
from tokenizer.model.piecewise import PiecewiseLinearCode
from tokenizer.model.plan import Plan, host_rows

_SIDE = 4096
"""Positions lie below this (`SparseTokens`)."""


class Refiner(nn.Module):
    """Adds to each frame what convolutions say that it lacks.

    Args:
        config: sizes.
        patch_size: frames, rows and columns of a patch.
    """

    def __init__(self, config: RefinerConfig, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size, self.fold = patch_size, config.fold
        cells = [side // config.fold for side in patch_size[1:]]
        channels = 3 * config.fold**2
        self.read = nn.Conv2d(channels, config.width, 3)
        self.place = nn.Parameter(torch.zeros(config.width, *cells))
        self.layers = nn.ModuleList(nn.Conv2d(config.width, config.width, 3) for _ in range(config.depth))
        self.write = nn.Conv2d(config.width, channels, 3)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw every parameter anew; the last layer is zero, so that nothing is added at first."""
        for layer in (self.read, *self.layers):
            assert isinstance(layer, nn.Conv2d)
            nn.init.trunc_normal_(layer.weight, std=layer.weight[0].numel() ** -0.5, generator=generator)
        for parameter in (self.place, self.write.weight, *(layer.bias for layer in self.convolutions())):
            assert parameter is not None
            nn.init.zeros_(parameter)

    def convolutions(self) -> list[nn.Conv2d]:
        return [layer for layer in self.modules() if isinstance(layer, nn.Conv2d)]

    def forward(self, patches: Tensor, plan: Plan, still: Tensor | None) -> Tensor:
        """Patches [N, P] in batch order -> the same, refined.

        Args:
            still: bool [N], tokens whose later frames mean nothing (stills); those are left as they are.
        """
        frames, height, width = self.patch_size
        seen = plan.table("refined", lambda: _flat_tokens(plan))  # [N] in segment order
        shown = _shown(seen, None if still is None else plan.gather(still), frames).flatten()
        neighbours = _neighbours_of_frames(plan.table("neighbours", lambda: neighbours_of(plan)), frames)
        pixels = plan.gather(patches).reshape(-1, height, width, 3)
        # Stills are a quarter of the work then; without gradients nobody waits for anything.
        rows = host_rows(shown, wait=patches.requires_grad)
        if rows is not None and not len(rows):
            return patches
        # A frame that is not shown is nobody's neighbour, so that a still next to a clip sees none of its later frames.
        number = torch.where(shown, torch.arange(len(shown), device=shown.device), len(shown))
        if rows is not None:
            number = torch.full_like(number, len(rows)).scatter_(0, rows, torch.arange(len(rows), device=rows.device))
            neighbours = neighbours[rows]
        count = len(shown) if rows is None else len(rows)
        number = torch.cat([number, number.new_full((1,), count)])
        change = self._change(pixels if rows is None else pixels[rows], number[neighbours])
        if rows is not None:
            refined = pixels.index_add(0, rows, change)
        else:
            refined = torch.where(shown[:, None, None, None], pixels + change, pixels)
        return plan.scatter(refined.reshape(len(patches), -1))

    def _change(self, pixels: Tensor, neighbours: Tensor) -> Tensor:
        """[M, H, W, 3] and the rows above, below, left and right of each, M where there is none -> [M, H, W, 3]."""
        x = F.pixel_unshuffle(pixels.permute(0, 3, 1, 2), self.fold)
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.gelu(self.read(_bordered(x, neighbours)) + self.place)
        for layer in self.layers:
            x = x + F.gelu(layer(_bordered(x, neighbours)))
        x = self.write(_bordered(x, neighbours))
        return F.pixel_shuffle(x, self.fold).permute(0, 2, 3, 1)


def _bordered(x: Tensor, neighbours: Tensor) -> Tensor:
    """[M, C, h, w] -> [M, C, h + 2, w + 2] with the cells of the neighbours around, zero where there are none."""
    above, below, left, right = neighbours.unbind(1)
    x = torch.cat([_edge(x[:, :, -1:], above), x, _edge(x[:, :, :1], below)], dim=2)
    # Rows above and below are there already: the corners come along.
    return torch.cat([_edge(x[..., -1:], left), x, _edge(x[..., :1], right)], dim=3)


def _edge(cells: Tensor, rows: Tensor) -> Tensor:
    return F.pad(cells, (0, 0, 0, 0, 0, 0, 0, 1)).index_select(0, rows)


def _shown(seen: Tensor, still: Tensor | None, frames: int) -> Tensor:
    """bool [N, frames]: the frames that a picture or clip has; of a still, the first."""
    shown = seen[:, None].expand(-1, frames)
    if still is None:
        return shown
    return shown & ~(still[:, None] & (torch.arange(frames, device=still.device) > 0))


def _segment_numbers(plan: Plan) -> Tensor:
    """[N] in segment order: the segment that a token belongs to."""
    rows = torch.arange(len(plan.positions), device=plan.positions.device, dtype=torch.int32)
    return torch.searchsorted(plan.segments.query_offsets, rows, right=True) - 1


def _flat_tokens(plan: Plan) -> Tensor:
    """bool [N] in segment order: tokens of pictures and clips, which lie in the plane z = 0."""
    segment = _segment_numbers(plan)
    depth = torch.zeros(len(segment) + 1, dtype=plan.positions.dtype, device=segment.device)
    depth.scatter_reduce_(0, segment, plan.positions[:, 3], "amax")
    return depth[segment] == 0


def neighbours_of(plan: Plan) -> Tensor:
    """[N, 4] int64 in segment order: tokens one row above and below, one column left and right; N where there is none.

    Neighbours are tokens of the same segment, time and depth. Nothing here waits for a device.
    """
    position = plan.positions.long()
    count = len(position)
    times = position[:, 0].amax() + 1
    plane = (_segment_numbers(plan).long() * times + position[:, 0]) * _SIDE + position[:, 3]
    key = (plane * _SIDE + position[:, 1]) * _SIDE + position[:, 2]
    ordered, order = key.sort()
    found = []
    for row, column in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        x, y = position[:, 1] + row, position[:, 2] + column
        wanted = (plane * _SIDE + x) * _SIDE + y
        place = torch.searchsorted(ordered, wanted).clamp_max(count - 1)
        inside = (x >= 0) & (x < _SIDE) & (y >= 0) & (y < _SIDE)
        found.append(torch.where((ordered[place] == wanted) & inside, order[place], count))
    return torch.stack(found, dim=1)


def _neighbours_of_frames(neighbours: Tensor, frames: int) -> Tensor:
    """The same for frames [N * frames, 4]: frame f of a token borders on frame f of its neighbours."""
    count = len(neighbours)
    frame = torch.arange(frames, device=neighbours.device)[None, :, None]
    rows = torch.where(neighbours == count, count * frames, neighbours * frames)[:, None]
    return torch.where(rows == count * frames, rows, rows + frame).flatten(0, 1)


def finished(
    patches: Tensor, latents: Tensor, plan: Plan, skip: PiecewiseLinearCode | None, refiner: Refiner | None
) -> Tensor:
    """What the decoder's transformer wrote [N, P], with what small models add to it; in batch order.

    Args:
        latents: [N, C] that were decoded.
    """
    if skip is not None:
        patches = patches + skip.decode(latents)
    if refiner is not None:
        patches = refiner(patches, plan, skip.is_still(latents) if skip is not None else None)
    return patches if skip is None else skip.made_consistent(patches, latents)


def make_refiner(config: ATokenConfig) -> Refiner | None:
    """The refiner that a network of these sizes has behind its decoder, if any."""
    if config.refiner is None or config.decoder is None:
        return None
    return Refiner(config.refiner, config.patch_size)
