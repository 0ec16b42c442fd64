"""Which Gaussians touch which tiles of the picture, in order of depth.

A Gaussian is cut where its alpha falls to `MIN_ALPHA`: an ellipse, the smaller the fainter it is. Its box gives the
rows of tiles it can touch, and the extent of the ellipse within each row gives the columns, exactly.

Shape legend: G Gaussians in order of depth, P pixels of a tile, L pairs of a tile and a Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ALPHA = 1.0 / 255.0
"""Where the alpha of a Gaussian is not above this, it is cut."""

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

    centres: [G, 2] in pixels.
    covariances: [G, 3] xx, xy, yy.
    reach: [G] square of the Mahalanobis distance at which alpha falls to `MIN_ALPHA`; not positive where it never rises
        above.
    """

    centres: Tensor
    covariances: Tensor
    reach: Tensor

    @staticmethod
    def of(centres: Tensor, covariances: Tensor, log_opacities: Tensor) -> Footprints:
        return Footprints(centres, covariances, 2.0 * (log_opacities - math.log(MIN_ALPHA)))

    def __getitem__(self, rows: slice | Tensor) -> Footprints:
        return Footprints(self.centres[rows], self.covariances[rows], self.reach[rows])

    def box(self, grid: TileGrid) -> tuple[Tensor, Tensor]:
        """First and last [G, 2] column and row of tiles; a last before the first where nothing is drawn."""
        reach = self.reach.clamp_min(0.0)[:, None]
        half = (reach * self.covariances[:, ::2]).sqrt() + _SLACK
        first, last = tile_range(self.centres - half, self.centres + half, grid)
        return first, torch.where(self.reach[:, None] > 0, last, -1)

    def box_tiles(self, grid: TileGrid) -> Tensor:
        """[G] int64: tiles of each box, no fewer than the Gaussian touches."""
        first, last = self.box(grid)
        return (last - first + 1).clamp_min(0).prod(dim=1)


def tile_range(low: Tensor, high: Tensor, grid: TileGrid) -> tuple[Tensor, Tensor]:
    """First and last column and row of the tiles with a pixel centre between low and high [..., 2] (x, y)."""
    most = torch.tensor([grid.columns, grid.rows], device=low.device)
    first = torch.ceil((low + 0.5) / grid.tile - 1.0).clamp_min(0.0)
    last = torch.floor((high - 0.5) / grid.tile).clamp_min(-1.0)
    return torch.minimum(first, most).long(), torch.minimum(last, most - 1).long()


@dataclass(frozen=True, slots=True)
class TileLists:
    """The Gaussians of every tile that has any, front to back; tiles with longer lists come first.

    gaussians: [L] int32 rows of the footprints, list after list in the order of tiles.
    tiles: [n] int64 numbers of tiles, by falling length of their lists.
    starts / lengths: [n] int64, where the list of each begins in `gaussians`, and how long it is.
    host_lengths: `lengths` as numbers.
    """

    gaussians: Tensor
    tiles: Tensor
    starts: Tensor
    lengths: Tensor
    host_lengths: list[int]

    def layers(self, pixels: int, elements: int, least: int) -> Iterator[tuple[int, int, int]]:
        """Cut the lists into blocks (first, count, n): entries first .. first + count of the n longest lists.

        A block holds about `elements` alphas, but at least `least` layers. Tiles whose lists are no longer than `first`
        drop out, so that no more than a block is ever padded.
        """
        first, count = 0, len(self.host_lengths)
        while count and (deepest := self.host_lengths[0]) > first:
            while self.host_lengths[count - 1] <= first:
                count -= 1
            layers = min(max(least, elements // (pixels * count)), deepest - first)
            yield first, layers, count
            first += layers

    def entries(self, first: int, layers: int, count: int, nothing: int) -> Tensor:
        """[layers * count] int64 rows of a block, layer after layer; `nothing` beyond the end of a list."""
        layer = torch.arange(first, first + layers, device=self.starts.device)[:, None]
        places = (self.starts[:count] + layer).clamp_max_(len(self.gaussians) - 1)
        rows = self.gaussians[places].long()
        if self.host_lengths[count - 1] < first + layers:
            rows = torch.where(layer < self.lengths[:count], rows, nothing)
        return rows.flatten()


def tile_lists(footprints: Footprints, grid: TileGrid, live: Tensor) -> TileLists:
    """List the Gaussians of each tile.

    Args:
        footprints: G Gaussians, front to back.
        grid: the tiles.
        live: [tiles] bool; tiles that nothing behind can change get no list.
    """
    gaussian, row = _spread(*(ends[:, 1] for ends in footprints.box(grid)))
    first, last = _columns(footprints, grid, gaussian, row)
    pair, column = _spread(first, last)
    tile = row[pair] * grid.columns + column
    gaussian = gaussian[pair]
    if not bool(live.all()):
        kept = live[tile]
        tile, gaussian = tile[kept], gaussian[kept]
    lengths, tiles = torch.sort(torch.bincount(tile, minlength=grid.tiles), descending=True, stable=True)
    rank = torch.empty_like(tiles)
    rank[tiles] = torch.arange(len(tiles), device=tiles.device)
    host_lengths = [length for length in lengths.tolist() if length]
    lengths = lengths[: len(host_lengths)]
    return TileLists(
        gaussians=gaussian[_stable_order(rank[tile], grid.tiles)].int(),
        tiles=tiles[: len(host_lengths)],
        starts=lengths.cumsum(0) - lengths,
        lengths=lengths,
        host_lengths=host_lengths,
    )


def _spread(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges [n] -> (range, number) [sum of lengths]: every number of each range, first to last."""
    counts = (last - first + 1).clamp_min(0)
    owner = torch.repeat_interleave(counts)
    shift = first - (counts.cumsum(0) - counts)
    return owner, shift[owner] + torch.arange(len(owner), device=owner.device)


def _columns(footprints: Footprints, grid: TileGrid, gaussian: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """First and last column of tiles that Gaussian `gaussian` [n] touches in the row `row` [n] of tiles.

    Over the line y (from its centre) the ellipse (x, y) C^-1 (x, y)^T = reach spans
    x = y xy / yy +- sqrt((reach - y^2 / yy) det C / yy). Its right edge is concave in y with the tip at
    y = xy sqrt(reach / xx), its left edge convex with the tip opposite, so within a row of pixels the widest line is
    the one nearest to the tip.
    """
    xx, xy, yy = footprints.covariances.unbind(1)
    reach = footprints.reach.clamp_min(0.0)
    parts = [*footprints.centres.unbind(1), xy / yy, 1.0 / yy, xx - xy * xy / yy]
    parts += [reach, (reach * yy).sqrt(), xy * (reach / xx).sqrt()]
    x, y, slope, narrow, wide, reach, half, tip = torch.stack(parts, 1)[gaussian].unbind(1)
    top = row * grid.tile + 0.5 - y
    lowest, highest = top - _SLACK, top + (grid.tile - 1 + _SLACK)
    lowest, highest = torch.maximum(lowest, -half), torch.minimum(highest, half)

    def edge(side: float) -> Tensor:
        line = torch.minimum(torch.maximum(side * tip, lowest), highest)
        span = ((reach - line * line * narrow).clamp_min(0.0) * wide.clamp_min(0.0)).sqrt()
        return x + slope * line + side * (span + _SLACK)

    ends = [torch.stack([edge(side), y], 1) for side in (-1.0, 1.0)]
    first, last = tile_range(ends[0], ends[1], grid)
    return first[:, 0], last[:, 0]


def _stable_order(keys: Tensor, bound: int) -> Tensor:
    """Stable argsort of keys [L] in 0 .. bound - 1."""
    if keys.device.type == "cpu" and bound <= 1 << 16:
        # numpy sorts 16 bits by radix, several times faster than torch compares.
        return torch.from_numpy(np.argsort(keys.numpy().astype(np.uint16), kind="stable"))
    return torch.sort(keys.int(), stable=True).indices
