"""How many operations a step takes, and how many a device can do: the utilisation that logs show.

Counted are matrix products, two operations for each multiply-add: linear layers, convolutions, position tables, linear
codes, and attention over whole segments or inside windows. A layer's backward pass is twice its forward pass; of what
reads pixels it is once, since nobody asks for the gradient of a pixel. Counted is what a task needs: what is
reconstructed is pooled as well, and what no loss reads is left out. So are frozen networks (text towers, LPIPS)
and rasterising: what is shown is the share of the device that works on the model.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenizer.gaussians.windows import window_plan
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import TransformerConfig
from tokenizer.model.plan import tile_plan
from tokenizer.model.positions import GRID
from tokenizer.model.transformer import Transformer
from tokenizer.sparse import SparseTokens
from tokenizer.training.curriculum.model import TrainedModel
from tokenizer.training.curriculum.tasks import ASSET_RECONSTRUCTION, is_understanding, is_video

PASSES = 3
"""A forward and a backward pass, in forward passes."""

OF_INPUTS = 2
"""The same for a product with what needs no gradient: pixels, positions."""


@dataclass(frozen=True, slots=True)
class Count:
    """Operations, forward and backward: of products with weights, and of attention's products of tokens with tokens."""

    weights: float
    attention: float

    @property
    def total(self) -> float:
        return self.weights + self.attention


class Work:
    """Operations of training steps of one model.

    Args:
        model: before its parameters are shared out.
    """

    def __init__(self, model: TrainedModel) -> None:
        network = model.network
        self.config = network.config
        encoder, decoder, pool = network.encoder, network.decoder, network.encoder.pool
        self._encode = _stack_work(encoder.transformer, reads_pixels=True)
        # Latents need a gradient, so that the decoder's input layer is like any other.
        self._reconstruct = PASSES * _weights(encoder.to_posterior)
        if decoder is not None:
            rest = _weights(decoder) - _weights(decoder.transformer)
            self._reconstruct += _stack_work(decoder.transformer) + PASSES * rest
        # Linear codes of single frames and of clips differ, and so does what their tokens cost.
        self._codes = dict.fromkeys((False, True), 0)
        if network.skip is not None:
            self._codes = {clips: _codes_work(network, clips) for clips in self._codes}
        self._refine = PASSES * _refiner_work(network)
        self._pool = PASSES * _weights(pool.key_value)
        # The query of the pool runs once a batch, its output and MLP once an item.
        self._batch = PASSES * _weights(pool.query)
        item_layers: tuple[nn.Module | None, ...] = (pool.out, pool.mlp, model.alignment, model.imitation)
        self._item = PASSES * sum(_weights(layer) for layer in item_layers if layer is not None)
        self.gaussians = model.gaussians.config if model.gaussians is not None else None
        self._gaussians = PASSES * _weights(model.gaussians) if model.gaussians is not None else 0

    def of(self, tokens: SparseTokens, task: str) -> float:
        """Operations of a micro-batch, forward and backward."""
        return self.count(tokens, task).total

    def count(self, tokens: SparseTokens, task: str) -> Count:
        """The same by what they are spent on."""
        rows, config = tokens.num_tokens, self.config
        runs = tile_plan(tokens, config.tile_steps).segments.runs
        pairs = sum(count * queries * keys for count, queries, keys in runs)
        weights, attention = rows * self._encode, pairs * _per_pair(config.encoder)
        if is_understanding(task):
            weights += rows * self._pool + tokens.batch_size * self._item + self._batch
            attention += rows * PASSES * 2 * config.encoder.width
        else:
            weights += rows * (self._reconstruct + self._codes[is_video(task)] + self._frames(task) * self._refine)
            attention += pairs * (_per_pair(config.decoder) if config.decoder is not None else 0)
        if task == ASSET_RECONSTRUCTION and self.gaussians is not None:
            weights += rows * self._gaussians
            attention += self._window_pairs(tokens) * PASSES * 2 * self.gaussians.width
        return Count(2.0 * weights, 2.0 * attention)

    def _frames(self, task: str) -> int:
        """Frames of a token that are refined."""
        return self.config.patch_size[0] if is_video(task) else 0 if task == ASSET_RECONSTRUCTION else 1

    def _window_pairs(self, tokens: SparseTokens) -> int:
        """Pairs of voxels in a window, in all blocks of the Gaussian decoder; windows of odd blocks are shifted."""
        assert self.gaussians is not None
        window, depth = self.gaussians.window, self.gaussians.depth
        plans = (window_plan(tokens, window, window // 2 * parity) for parity in (0, 1))
        pairs = [int(plan.lengths.square().sum()) for plan in plans]
        return pairs[0] * ((depth + 1) // 2) + pairs[1] * (depth // 2)


def _stack_work(stack: Transformer, *, reads_pixels: bool = False) -> int:
    """Multiply-adds of a token in the linear layers and position table of a transformer."""
    table = GRID * GRID * stack.config.width if stack.positions is not None else 0
    embed = _weights(stack.embed)
    blocks = _weights(stack) - embed
    return PASSES * blocks + (OF_INPUTS if reads_pixels else PASSES) * embed + OF_INPUTS * table


def _per_pair(config: TransformerConfig) -> int:
    """Multiply-adds of a query and a key that it sees, in all blocks: their score, and the value that it weighs."""
    return PASSES * 2 * config.width * config.depth


def _weights(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def _refiner_work(network: ATokenNetwork) -> int:
    """Multiply-adds of a frame of a token in the refiner's convolutions."""
    if network.refiner is None:
        return 0
    cells = network.refiner.place[0].numel()
    return cells * sum(layer.weight.numel() for layer in network.refiner.convolutions())


def _codes_work(network: ATokenNetwork, clips: bool) -> int:
    """Multiply-adds of a token in the linear codes, counted by torch: what two tokens take more than one.

    Which codes there are, and how the best is found, is theirs to know; what does not grow with the tokens is small.
    """
    one, two = (_counted_codes(network, rows, clips) for rows in (1, 2))
    return (two - one) // 2


def _counted_codes(network: ATokenNetwork, rows: int, clips: bool) -> int:
    # A copy, whose gradients nobody sees.
    skip, config, like = copy.deepcopy(network.skip), network.config, network.encoder.to_posterior.weight
    assert skip is not None
    patches = like.new_full((rows, config.patch_features), float(clips))
    parameters = like.new_zeros(rows, 2 * config.latent_channels, requires_grad=True)
    features = like.new_zeros(rows, config.encoder.width, requires_grad=True)
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        written = skip.add_to_parameters(parameters, patches, features)
        latents = written.detach()[:, : config.latent_channels].requires_grad_()
        outputs = [written, skip.made_consistent(skip.decode(latents), latents), skip.read(latents)]
        torch.stack([output.sum() for output in outputs if output is not None]).sum().backward()
    return int(counter.get_total_flops())


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on this device now, the best of five.

    Of random numbers: a GPU multiplies equal ones faster, for they cost less power. On a CPU smaller products are tried
    first: without instructions for bfloat16 a large one takes a quarter of a minute.
    """
    generator = torch.Generator(device).manual_seed(0)
    sizes = (8192,) if device.type == "cuda" else (128, 256, 512, 1024)
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
        taken = _seconds(a, b)
        if taken > 0.1:
            break
    return 2.0 * size**3 / min(taken, *(_seconds(a, b) for _ in range(5)))


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    _wait(a.device)
    start = time.perf_counter()
    torch.mm(a, b)
    _wait(a.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
