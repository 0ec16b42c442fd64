"""Which Gaussians touch which tiles of the picture, in order of depth.

A Gaussian is cut where its alpha falls to `MIN_ALPHA`: an ellipse, the smaller the fainter it is. Its box gives the
rows of tiles it can touch, and the extent of the ellipse within each row gives the columns, exactly.

Shape legend: G Gaussians in order of depth, P pixels of a tile, L pairs of a tile and a Gaussian, n tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ALPHA = 1.0 / 255.0
"""Where the alpha of a Gaussian is not above this, it is cut."""

SORTABLE = 1 << 16
"""Lists of at most so many tiles and Gaussians are sorted by numbers of 32 bits, which numpy does fastest."""

_SLACK = 1e-3
"""Pixels added to every extent, more than the rounding of float32 and far less than the distance of two pixels."""


@dataclass(frozen=True, slots=True)
class TileGrid:
    """A picture of height x width pixels in square tiles, row after row; the last of a row or column may reach out."""

    height: int
    width: int
    tile: int

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile)

    @property
    def columns(self) -> int:
        return -(-self.width // self.tile)

    @property
    def tiles(self) -> int:
        return self.rows * self.columns

    @property
    def pixels(self) -> int:
        """P, pixels of a tile."""
        return self.tile**2

    def split(self, image: Tensor) -> Tensor:
        """[C, H, W] -> [C, P, tiles]; zero outside the picture."""
        beyond = (0, self.columns * self.tile - self.width, 0, self.rows * self.tile - self.height)
        cells = F.pad(image, beyond).unflatten(1, (self.rows, self.tile)).unflatten(3, (self.columns, self.tile))
        tiles: Tensor = cells.permute(0, 2, 4, 1, 3).reshape(len(image), self.pixels, self.tiles)
        return tiles

    def join(self, tiles: Tensor) -> Tensor:
        """[C, P, tiles] -> [C, H, W], the inverse of `split`."""
        cells = tiles.reshape(len(tiles), self.tile, self.tile, self.rows, self.columns).permute(0, 3, 1, 4, 2)
        image: Tensor = cells.reshape(len(tiles), self.rows * self.tile, self.columns * self.tile)
        inside: Tensor = image[:, : self.height, : self.width]
        return inside

    def middles(self, tiles: Tensor, dtype: torch.dtype) -> Tensor:
        """[2, n] x and y of the middles of tiles [n], in pixels."""
        corner = torch.stack([tiles % self.columns, tiles // self.columns]) * self.tile
        return corner.to(dtype) + self.tile / 2

    def offsets(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """x and y [P] of the centres of a tile's pixels, from the middle of the tile."""
        steps = torch.arange(self.tile, dtype=dtype, device=device) + (0.5 - self.tile / 2)
        return steps.repeat(self.tile), steps.repeat_interleave(self.tile)


@dataclass(frozen=True, slots=True)
class Footprints:
    """The ellipses that are drawn of G Gaussians.

    centres: [2, G] in pixels.
    covariances: [3, G] xx, xy, yy.
    reach: [G] square of the Mahalanobis distance at which alpha falls to `MIN_ALPHA`; negative where it is never above.
    """

    centres: Tensor
    covariances: Tensor
    reach: Tensor

    @staticmethod
    def of(centres: Tensor, covariances: Tensor, log_opacities: Tensor) -> Footprints:
        return Footprints(centres, covariances, 2.0 * (log_opacities - math.log(MIN_ALPHA)))

    def __getitem__(self, rows: slice) -> Footprints:
        return Footprints(self.centres[:, rows], self.covariances[:, rows], self.reach[rows])

    def select(self, rows: Tensor) -> Footprints:
        """The Gaussians `rows` [any] in that order."""
        return Footprints(
            self.centres.index_select(1, rows), self.covariances.index_select(1, rows), self.reach.index_select(0, rows)
        )

    def halves(self) -> tuple[Tensor, Tensor]:
        """Half the width and height [G] of each ellipse; not a number where nothing is drawn."""
        return (self.reach * self.covariances[0]).sqrt(), (self.reach * self.covariances[2]).sqrt()

    def boxes(self, grids: list[TileGrid]) -> list[Tensor]:
        """For each grid [G] floating: tiles of the ellipses' boxes, no fewer than they touch."""
        counts = []
        (x, y), (across, down) = self.centres, self.halves()
        for grid in grids:
            left, right = _tile_range(x - across, x + across, grid.tile, grid.columns)
            top, bottom = _tile_range(y - down, y + down, grid.tile, grid.rows)
            tiles = (right - left + 1.0).clamp_min_(0.0) * (bottom - top + 1.0).clamp_min_(0.0)
            counts.append(tiles.nan_to_num_(0.0))
        return counts


def _tile_range(low: Tensor, high: Tensor, tile: int, most: int) -> tuple[Tensor, Tensor]:
    """First and last (floating) of `most` tiles in a row that have a pixel centre in low..high."""
    first = ((low + (0.5 - _SLACK)) / tile - 1.0).ceil_().clamp_(0.0, most)
    last = ((high + (_SLACK - 0.5)) / tile).floor_().clamp_(-1.0, most - 1.0)
    return first, last


@dataclass(frozen=True, slots=True)
class TileLists:
    """The Gaussians of every tile that has any, front to back; tiles with longer lists come first.

    gaussians: [L] int64 rows of the footprints, list after list in the order of `tiles`.
    tiles: [n] int64 numbers of tiles, by falling length of their lists.
    starts / lengths: [n] int64, where the list of each begins in `gaussians`, and how long it is.
    host_lengths: `lengths` as numbers.
    """

    gaussians: Tensor
    tiles: Tensor
    starts: Tensor
    lengths: Tensor
    host_lengths: list[int]

    def blocks(self, pixels: int, alphas: int, layers: int) -> Iterator[ListBlock]:
        """Cut the lists into blocks of at most `alphas` alphas (or one tile) and mostly at least `layers` layers.

        A block is a range of tiles and a range of layers: entries of their lists, of which the first is as long as any.
        Tiles whose lists have ended drop out, so that no more than a block is ever padded.
        """
        group = max(1, alphas // (pixels * layers))
        for begin in range(0, len(self.host_lengths), group):
            first, end = 0, min(begin + group, len(self.host_lengths))
            while (left := self.host_lengths[begin] - first) > 0:
                while self.host_lengths[end - 1] <= first:
                    end -= 1
                block = ListBlock(slice(begin, end), first, min(max(1, alphas // (pixels * (end - begin))), left))
                yield block
                first += block.layers

    def entries(self, block: ListBlock, nothing: int) -> Tensor:
        """[layers * tiles] int64 rows of a block, layer after layer; `nothing` beyond the end of a list."""
        behind = block.first + block.layers
        layer = torch.arange(block.first, behind, device=self.starts.device)[:, None]
        places = (self.starts[block.tiles] + layer).clamp_max_(len(self.gaussians) - 1)
        rows = self.gaussians.index_select(0, places.flatten())
        if self.host_lengths[block.tiles.stop - 1] < behind:
            rows = torch.where((layer < self.lengths[block.tiles]).flatten(), rows, nothing)
        return rows


class ListBlock(NamedTuple):
    """Entries first .. first + layers - 1 of the lists of some of the tiles."""

    tiles: slice
    first: int
    layers: int


def tile_lists(footprints: Footprints, grid: TileGrid, live: Tensor) -> TileLists:
    """List the Gaussians of each tile.

    Args:
        footprints: G Gaussians, front to back, all of which draw something.
        grid: the tiles.
        live: [tiles] bool; tiles that nothing behind can change get no list.
    """
    gaussian, tile = _pairs(footprints, grid)
    if not bool(live.all()):
        kept = live.index_select(0, tile).nonzero()[:, 0]
        gaussian, tile = gaussian.index_select(0, kept), tile.index_select(0, kept)
    lengths, tiles = torch.sort(torch.bincount(tile, minlength=grid.tiles), descending=True, stable=True)
    rank = torch.empty_like(tiles)
    rank[tiles] = torch.arange(len(tiles), device=tiles.device)
    host_lengths = [length for length in lengths.tolist() if length]
    lengths = lengths[: len(host_lengths)]
    return TileLists(
        gaussians=_grouped(rank.index_select(0, tile), gaussian, max(grid.tiles, len(footprints.reach))),
        tiles=tiles[: len(host_lengths)],
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths,
        host_lengths=host_lengths,
    )


def _pairs(footprints: Footprints, grid: TileGrid) -> tuple[Tensor, Tensor]:
    """Every Gaussian [L] with every tile [L] it touches, in the order of the Gaussians.

    Over the line y (from its centre) the ellipse (x, y) C^-1 (x, y)^T = reach spans
    x = y xy / yy +- sqrt((reach - y^2 / yy) det C / yy). Its right edge is concave in y with the tip at
    y = xy sqrt(reach / xx), its left edge convex with the tip opposite, so within a row of tiles the widest line is
    the one nearest to the tip.
    """
    xx, xy, yy = footprints.covariances
    x, y = footprints.centres
    across, down = footprints.halves()
    gaussian, row = _spread(*_tile_range(y - down, y + down, grid.tile, grid.rows))
    slope = xy / yy
    parts = torch.stack([x, y, slope, 1.0 / yy, xx - slope * xy, footprints.reach, down, xy * across / xx])
    x, y, slope, narrow, wide, reach, down, tip = parts.index_select(1, gaussian)
    top = row.to(y.dtype) * grid.tile + 0.5 - y
    lowest, highest = torch.maximum(top, -down), torch.minimum(top + (grid.tile - 1), down)

    def edge(line: Tensor, side: float) -> Tensor:
        line = torch.minimum(torch.maximum(line, lowest), highest)
        span = (reach - line.square() * narrow).clamp_min_(0.0).mul_(wide.clamp_min(0.0)).sqrt_()
        return torch.addcmul(x, slope, line).add_(span, alpha=side)

    pair, column = _spread(*_tile_range(edge(-tip, -1.0), edge(tip, 1.0), grid.tile, grid.columns))
    tile = (row * grid.columns).index_select(0, pair).add_(column)
    return gaussian.index_select(0, pair), tile


def _spread(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges [n] (floating) -> (range, number) [sum of lengths] int64: every number of each range, first to last."""
    first = first.long()
    counts = (last.long() - first + 1).clamp_min_(0)
    owner = torch.repeat_interleave(counts)
    shift = first - (counts.cumsum(0) - counts)
    return owner, torch.arange(len(owner), device=owner.device).add_(shift.index_select(0, owner))


def _grouped(group: Tensor, gaussian: Tensor, bound: int) -> Tensor:
    """`gaussian` [L], ascending, sorted by `group` [L]; both are below `bound`."""
    if group.device.type == "cpu" and bound <= SORTABLE:
        keys = group.mul(SORTABLE).add_(gaussian).numpy().astype(np.uint32)
        keys.sort()
        return torch.from_numpy((keys & np.uint32(SORTABLE - 1)).astype(np.int64))
    return gaussian.index_select(0, torch.sort(group, stable=True).indices)
