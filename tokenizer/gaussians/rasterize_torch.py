"""The torch engine: alpha compositing of projected Gaussians in tiles, forward and backward by hand.

How it is fast without a kernel of its own. Lists of Gaussians, one for each small tile, are cut across: layer k holds
the k-th Gaussian of every tile, and as tiles are sorted by the length of their lists, the tiles of a layer are always
the first n. So there is next to no padding, the loop runs over layers and not over tiles or Gaussians, and each step
works on thousands of pixels at once:

    weight = alpha * transmittance        transmittance = transmittance - weight

The exponents of a block of layers are one matrix product: seen from the middle of a tile the exponent is a quadratic
polynomial of the pixel, six coefficients for each Gaussian against six monomials for each pixel.

Memory. A block holds at most `_BLOCK` alphas and stays in the processor's cache. Lists are made for a range of depths
at a time, of at most `_RANGE` alphas (or one Gaussian); tiles that became opaque get none any more. Nothing grows with
pixels times Gaussians.

The backward pass goes front to back, too: what lies behind a layer is the finished picture less what lies before, so
it needs no more than the forward pass: transmittance and remaining light of each pixel.

Threads. The steps are many and short. On cores that have other work too, OpenMP threads that spin while they wait for
each other make it many times slower; with OMP_WAIT_POLICY=passive in the environment, or one thread, they do not.

Rules, as is customary (Kerbl et al. 2023, appendix C): alpha is at most `MAX_ALPHA`, nothing is drawn where it is not
above `MIN_ALPHA`, and a pixel is finished before the Gaussian that would bring its transmittance to
`MIN_TRANSMITTANCE`. Where alpha is cut or clamped it has no gradient.

Shape legend: G Gaussians front to back, P pixels of a tile, K layers of a block, n tiles, C channels.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenizer.cameras import Cameras
from tokenizer.gaussians.projection import Splats, axes_of, project
from tokenizer.gaussians.tiles import MIN_ALPHA, SORTABLE, Footprints, TileGrid, TileLists, tile_lists

MAX_ALPHA = 0.999
MIN_TRANSMITTANCE = 1e-4

_TILES = (4, 8)
"""Edges of tiles to choose from: small ones waste fewer pixels, large ones make fewer pairs (16 never paid)."""

_PAIR_COST = 8.0
"""Time to list and fetch one pair of a tile and a Gaussian, in units of the time for one pixel of it (measured)."""

_BLOCK = 1 << 18
"""Alphas of a block: as many as the cache holds."""

_LAYERS = 8
"""Layers of a block, or more: a block takes so many tiles that as many fit, as layers share what is done for tiles."""

_RANGE = 1 << 22
"""Alphas of a range of depths, unless one Gaussian has more: fewer would pass over opaque tiles sooner, but slower."""

_KEPT = 1 << 22
"""Pairs whose lists are kept for the backward pass; beyond, they are made again."""

_GEOMETRY = 6
"""Rows of a table before its channels: logarithm of the opacity, centre x, y, conic xx, xy, yy."""

_LEAST_EXPONENT = -10.0
"""Of alpha; far below `MIN_ALPHA`."""


def draw(
    means: Tensor,
    scales: Tensor,
    rotations: Tensor,
    opacities: Tensor,
    colours: Tensor,
    cameras: Cameras,
    size: tuple[int, int],
    *,
    kernel_size: float,
    near: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Colours [V, H, W, 3] over black, mean depth [V, H, W] and alpha [V, H, W].

    Arguments are those of `rasterize_tensors`, checked there; opacities are [M].
    """
    axes, centres, shown = axes_of(scales, rotations), means.T.contiguous(), colours.T.contiguous()
    views = []
    for view in range(len(cameras)):
        camera = cameras[view : view + 1]
        splats = project(centres, axes, opacities, camera, size, kernel_size=kernel_size, near=near)
        views.append(composite(splats, torch.cat([shown, splats.depths[None]]), size))
    layers = torch.stack(views) if views else means.new_zeros(0, 5, *size)
    alpha = layers[:, 4]
    return layers[:, :3].movedim(1, -1), layers[:, 3] / torch.where(alpha > 0, alpha, 1.0), alpha


def composite(splats: Splats, channels: Tensor, size: tuple[int, int]) -> Tensor:
    """Composite Gaussians front to back over nothing.

    Args:
        splats: M projected Gaussians.
        channels: [C, M] what each Gaussian shows.
        size: (height, width).

    Returns:
        [C + 1, height, width]: the channels weighted by alpha and transmittance, then the sum of the weights.
        Differentiable once, with respect to centres, conics, log_opacities and channels.
    """
    with torch.no_grad():
        plan = _plan(splats, size)
    table = torch.cat([splats.log_opacities[None], splats.centres, splats.conics, channels])
    image: Tensor = _Composite.apply(table, plan)  # type: ignore[no-untyped-call]
    return image


@dataclass(slots=True)
class _Plan:
    """What does not depend on the pass: order, tiles, and the ranges of depth whose lists are made together.

    order: [G] rows of the Gaussians that are drawn, front to back.
    ranges: first and last + 1 of each range of `order`.
    """

    order: Tensor
    footprints: Footprints
    grid: TileGrid
    ranges: list[tuple[int, int]]
    clamped: bool
    kept: dict[int, TileLists] = field(default_factory=dict)

    def lists(self, number: int, live: Tensor) -> TileLists:
        """Lists of one range, from its first pass if they were kept; both passes find the same tiles live."""
        if number in self.kept:
            return self.kept[number]
        first, last = self.ranges[number]
        lists = tile_lists(self.footprints[first:last], self.grid, live)
        lists.gaussians.add_(first)
        if sum(len(other.gaussians) for other in self.kept.values()) + len(lists.gaussians) <= _KEPT:
            self.kept[number] = lists
        return lists


def _plan(splats: Splats, size: tuple[int, int]) -> _Plan:
    footprints = Footprints.of(splats.centres, splats.covariances, splats.log_opacities)
    grids = [TileGrid(*size, tile) for tile in _TILES]
    boxes = [box.mul_(splats.in_front) for box in footprints.boxes(grids)]
    costs = [float(box.sum()) * (grid.pixels + _PAIR_COST) for box, grid in zip(boxes, grids, strict=True)]
    best = costs.index(min(costs))
    drawn = boxes[best].nonzero()[:, 0]
    order = drawn[torch.sort(splats.depths[drawn], stable=True).indices]
    ends = boxes[best][order].double().cumsum(0).tolist()
    return _Plan(
        order=order,
        footprints=footprints.select(order),
        grid=grids[best],
        ranges=list(_ranges(ends, _RANGE // grids[best].pixels)),
        clamped=bool((splats.log_opacities[order] > math.log(MAX_ALPHA)).any()),
    )


def _ranges(ends: list[float], most: int) -> Iterator[tuple[int, int]]:
    """Cut running sums into ranges (first, last + 1) that sum to at most `most`, or hold one entry."""
    first, before = 0, 0.0
    while first < len(ends):
        last = min(max(bisect_right(ends, before + most), first + 1), first + SORTABLE)
        yield first, last
        first, before = last, ends[last - 1]


@dataclass(slots=True)
class _Block:
    """Layers of the lists of n tiles.

    tiles: which of the tiles of a range of depths.
    gaussians: [K * n] rows of the table.
    middle: [2, K, n] middle of the tile less centre of the Gaussian.
    curves: [3, K, n] xx, xy, yy of the conic, times -1/2, -1, -1/2.
    channels: [C, K, n].
    alphas: [P, K, n].
    weights: [P, K, n] alpha times transmittance, zero where nothing is drawn.
    after: [P, K, n] transmittance behind each layer, zero once the pixel is finished.
    """

    tiles: slice
    gaussians: Tensor
    middle: Tensor
    curves: Tensor
    channels: Tensor
    alphas: Tensor
    weights: Tensor
    after: Tensor


class _Sweep:
    """One pass over all layers, front to back."""

    def __init__(self, table: Tensor, plan: _Plan) -> None:
        # One more Gaussian that draws nothing fills up blocks.
        nothing = table.new_zeros(len(table), 1)
        nothing[0] = _LEAST_EXPONENT
        self.table = torch.cat([table.index_select(1, plan.order), nothing], 1)
        self.table[3:6] *= table.new_tensor([[-0.5], [-1.0], [-0.5]])
        self.plan = plan
        x, y = plan.grid.offsets(table.dtype, table.device)
        self.monomials = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y])
        inside = table.new_ones(1, plan.grid.height, plan.grid.width)
        # Pixels of a tile outside the picture are finished from the start.
        self.transmittance = plan.grid.split(inside)[0]

    def __iter__(self) -> Iterator[tuple[Tensor, Iterator[_Block]]]:
        """For each range of depths its tiles [n] and their blocks, which must all be taken."""
        for number in range(len(self.plan.ranges)):
            live = self.transmittance.amax(0) > MIN_TRANSMITTANCE
            lists = self.plan.lists(number, live)
            if len(lists.tiles):
                yield lists.tiles, self._blocks(lists)

    def _blocks(self, lists: TileLists) -> Iterator[_Block]:
        transmittance = self.transmittance.index_select(1, lists.tiles)
        middles = self.plan.grid.middles(lists.tiles, self.table.dtype)
        for part in lists.blocks(self.plan.grid.pixels, _BLOCK, _LAYERS):
            gaussians = lists.entries(part, self.table.shape[1] - 1)
            block = self._block(part.tiles, gaussians, middles[:, part.tiles], transmittance[:, part.tiles])
            transmittance[:, part.tiles] = block.after[:, -1]
            yield block
        self.transmittance[:, lists.tiles] = transmittance

    def _block(self, tiles: slice, gaussians: Tensor, middles: Tensor, before: Tensor) -> _Block:
        count = middles.shape[1]
        polynomial = self.table.index_select(1, gaussians).unflatten(1, (-1, count))
        constant, x, y, xx, xy, yy = polynomial[:_GEOMETRY]
        middle = middles[:, None] - polynomial[1:3]
        # In place: seen from the middle of the tile, the centre becomes the slope of the exponent there.
        torch.mul(xy, middle[1], out=x).addcmul_(xx, middle[0], value=2.0)
        torch.mul(xy, middle[0], out=y).addcmul_(yy, middle[1], value=2.0)
        constant.addcmul_(x, middle[0], value=0.5).addcmul_(y, middle[1], value=0.5)
        exponents = self.monomials.T @ polynomial[:_GEOMETRY].flatten(1)
        # Exponentials too small for a normal number take ten times as long.
        alphas = exponents.clamp_(_LEAST_EXPONENT, math.log(MAX_ALPHA)).exp_().unflatten(1, (-1, count))
        torch.threshold_(alphas, MIN_ALPHA, 0.0)

        passing = alphas.new_empty(len(alphas), alphas.shape[1] + 1, count)
        weights = torch.empty_like(alphas)
        passing[:, 0] = before
        step = passing.unbind(1)
        for k, (alpha, weight) in enumerate(zip(alphas.unbind(1), weights.unbind(1), strict=True)):
            torch.mul(step[k], alpha, out=weight)
            torch.sub(step[k], weight, out=step[k + 1])
        after = passing[:, 1:]
        if float(step[-1].min()) <= MIN_TRANSMITTANCE:
            torch.threshold_(after, MIN_TRANSMITTANCE, 0.0)
            # As alpha is at most MAX_ALPHA, a weight is less than 1000 times what is left, unless that was set to zero.
            torch.minimum(weights, after * (1.001 / (1.0 - MAX_ALPHA)), out=weights)
        return _Block(tiles, gaussians, middle, polynomial[3:6], polynomial[_GEOMETRY:], alphas, weights, after)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, plan: _Plan) -> Tensor:
        channels = len(table) - _GEOMETRY
        grid = plan.grid
        picture = table.new_zeros(channels + 1, grid.pixels, grid.tiles)
        for tiles, blocks in _Sweep(table, plan):
            part = table.new_zeros(channels + 1, grid.pixels, len(tiles))
            for block in blocks:
                shown = part[:-1, :, block.tiles]
                for weight, channel in zip(block.weights.unbind(1), block.channels.unbind(1), strict=True):
                    shown.addcmul_(weight[None], channel[:, None])
                part[-1, :, block.tiles] += block.weights.sum(1)
            picture[:, :, tiles] += part
        image = grid.join(picture)
        ctx.save_for_backward(table, image)
        ctx.plan = plan
        return image

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, image_gradient: Tensor) -> tuple[Tensor, None]:
        table, image = ctx.saved_tensors
        plan: _Plan = ctx.plan
        gradients = plan.grid.split(image_gradient)
        remaining = plan.grid.split((image * image_gradient).sum(0, keepdim=True))[0]
        # A loss often looks at some channels only.
        used = [number for number, channel in enumerate(image_gradient[:-1]) if bool(channel.any())]
        sweep = _Sweep(table, plan)
        result = torch.zeros_like(sweep.table)
        for tiles, blocks in sweep:
            gradient, behind = gradients.index_select(2, tiles), remaining.index_select(1, tiles)
            for block in blocks:
                part = gradient[:, :, block.tiles]
                rows = _block_gradient(block, sweep.monomials, part, used, behind[:, block.tiles], plan.clamped)
                result.scatter_add_(1, block.gaussians.expand(len(rows), -1), rows.flatten(1))
            remaining[:, tiles] = behind
        full = torch.zeros_like(table)
        full[:, plan.order] = result[:, :-1]
        return full, None


def _block_gradient(
    block: _Block, monomials: Tensor, gradient: Tensor, used: list[int], behind: Tensor, clamped: bool
) -> Tensor:
    """Gradient [6 + C, K, n] of a block's entries of the table.

    Args:
        gradient: [C + 1, P, n] of the picture.
        used: the channels whose gradient is not zero everywhere.
        behind: [P, n] what this block and all behind it show, times `gradient`; on return without this block.
        clamped: whether an alpha may have been clamped.

    With T the transmittance before a Gaussian and B what is shown behind it, alpha adds T (channels . gradient) and
    takes away B / (1 - alpha). As the logarithm of alpha is what has a simple derivative, both are times alpha here.
    """
    weights, after = block.weights, block.after
    rows = weights.new_zeros(_GEOMETRY + len(block.channels), *weights.shape[1:])
    shown = torch.empty_like(weights)
    shown[:] = gradient[-1][:, None]
    product = torch.empty_like(weights)
    for number in used:
        of_pixel = gradient[number][:, None]
        shown.addcmul_(block.channels[number], of_pixel)
        torch.sum(torch.mul(weights, of_pixel, out=product), 0, out=rows[_GEOMETRY + number])
    shown.mul_(weights)
    left, before = product, behind
    for layer, now in zip(left.unbind(1), shown.unbind(1), strict=True):
        torch.sub(before, now, out=layer)
        before = layer
    behind.copy_(before)
    # alpha / (1 - alpha) = weight / transmittance after it, also where both are zero.
    of_log_alpha = shown.addcmul_(left, weights.div_(after.clamp_min(MIN_TRANSMITTANCE)), value=-1.0)
    if clamped:
        of_log_alpha.mul_(block.alphas < MAX_ALPHA - 1e-6)  # the exponential of its logarithm may be a little less
    constant, by_x, by_y, by_xx, by_xy, by_yy = (monomials @ of_log_alpha.flatten(1)).view(-1, *weights.shape[1:])
    xx, xy, yy = block.curves
    x, y = block.middle
    # The exponent is a polynomial of the pixel with coefficients made of conic and middle: the chain rule, by term.
    moved_x, moved_y = torch.addcmul(by_x, constant, x), torch.addcmul(by_y, constant, y)
    rows[0] = constant
    rows[1] = -2.0 * xx * moved_x - xy * moved_y
    rows[2] = -xy * moved_x - 2.0 * yy * moved_y
    rows[3] = -0.5 * (x * (moved_x + by_x) + by_xx)
    rows[4] = -(y * moved_x + x * by_y + by_xy)
    rows[5] = -0.5 * (y * (moved_y + by_y) + by_yy)
    return rows
