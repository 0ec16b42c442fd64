"""Packed batches of random visuals, the same every time, for steps of any task.

Pictures differ in shape, so that attention meets segments of several lengths, if they need not be alike. A clip is one
tile. An asset is a piece of a shell of voxels: as on a real surface, its windows hold anything from one voxel to a few
dozen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.tokenizer import MIXED
from tokenizer.cameras import Cameras, sphere_cameras
from tokenizer.errors import InputError
from tokenizer.gaussians.config import GaussianDecoderConfig
from tokenizer.model.config import ATokenConfig
from tokenizer.patches import visuals_to_tokens
from tokenizer.sparse import SparseTokens
from tokenizer.training.curriculum.preparation import Patches, Prepared, Texts, Totals
from tokenizer.training.curriculum.tasks import (
    ASSET_RECONSTRUCTION,
    IMAGE_RECONSTRUCTION,
    IMAGE_UNDERSTANDING,
    is_understanding,
    is_video,
)
from tokenizer.voxels import ASSET_TIME, VIEW_SIZE

CLIP = (8, 8)
"""Rows and columns of a clip, in patches; with 4 steps in time it has 256 tokens."""

SQUARE = (16, 16)
"""Rows and columns of pictures that are all alike, in patches: 256 pixels a side, of 16 each."""

ASSET_TOKENS = 2048
VIEWS = 2
"""Views of an asset that its reconstruction is compared with."""


@dataclass(frozen=True)
class MadeViews:
    """What `tokenizer.training.feeding.StepViews` asks for."""

    pictures: Tensor
    cameras: Cameras


def make_step(
    task: str,
    budget: int,
    micro_batches: int,
    sizes: ATokenConfig,
    device: torch.device,
    resolution: int = 64,
    *,
    alike: bool = False,
) -> list[Prepared]:
    """The micro-batches of a step, each of at most `budget` tokens, as engines take them.

    Args:
        resolution: voxels along an edge of the grid of assets.
        alike: all pictures are `SQUARE`; clips and assets always are of one size.

    Raises:
        InputError: a budget that holds not one visual.
    """
    batches = [_tokens(task, budget, sizes, resolution, seed, alike).to(device) for seed in range(micro_batches)]
    items = [batch.batch_size for batch in batches]
    seen = task == ASSET_RECONSTRUCTION
    totals = Totals(
        tokens=sum(batch.num_tokens for batch in batches),
        items=sum(items),
        pictures=sum(items) if task == IMAGE_RECONSTRUCTION else 0,
        views=sum(items) if seen else 0,
    )
    return [
        Prepared(
            task=task,
            patches=Patches(partial(_ready, tokens)),
            ids=tuple(f"item {number}" for number in range(tokens.batch_size)),
            share=1.0,
            totals=totals,
            texts=_texts(task, tokens.batch_size, sizes.encoder.width, device) if is_understanding(task) else None,
            views=tuple(_views(number) if seen else None for number in range(tokens.batch_size)),
            seed=seed,
        )
        for seed, tokens in enumerate(batches)
    ]


def _ready(tokens: SparseTokens) -> SparseTokens:
    """Making them is no part of what is timed."""
    return tokens


def _tokens(task: str, budget: int, sizes: ATokenConfig, resolution: int, seed: int, alike: bool) -> SparseTokens:
    generator = torch.Generator().manual_seed(seed)
    if task.startswith("asset"):
        return _assets(budget, sizes, resolution, generator)
    _, height, width = sizes.patch_size
    shapes: list[tuple[int, ...]]
    if is_video(task):
        count = budget // (sizes.tile_steps * CLIP[0] * CLIP[1])
        shapes = [(sizes.tile_frames, CLIP[0] * height, CLIP[1] * width)] * count
    else:
        grids = [SQUARE] * (budget // math.prod(SQUARE)) if alike else pictures_within(budget)
        shapes = [(rows * height, columns * width) for rows, columns in grids]
    if not shapes:
        raise InputError(f"{budget} tokens hold not one visual of {task}; give more --tokens")
    pixels = [torch.rand(*shape, 3, generator=generator) * 2 - 1 for shape in shapes]
    return visuals_to_tokens(pixels, sizes.patch_size)[0]


def pictures_within(budget: int) -> list[tuple[int, int]]:
    """Rows and columns of pictures of at most `budget` tokens in all, taken from a list that repeats."""
    grids: list[tuple[int, int]] = []
    left = budget
    while any(rows * columns <= left for rows, columns in MIXED):
        for rows, columns in MIXED:
            if rows * columns <= left:
                grids.append((rows, columns))
                left -= rows * columns
    return grids


def _assets(budget: int, sizes: ATokenConfig, resolution: int, generator: torch.Generator) -> SparseTokens:
    centre = (resolution - 1) / 2
    axis = torch.arange(resolution) - centre
    distance = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2).sqrt()
    shell = ((distance - 0.8 * centre).abs() < 0.5).nonzero().int()
    count = math.ceil(budget / min(ASSET_TOKENS, len(shell)))
    frames, height, width = sizes.patch_size
    parts = []
    for _ in range(count):
        voxels = shell[: budget // count]
        features = torch.zeros(len(voxels), sizes.patch_features)
        features[:, : sizes.patch_features // frames] = (
            torch.rand(len(voxels), 3 * height * width, generator=generator) * 2 - 1
        )
        time = torch.full((len(voxels), 1), ASSET_TIME, dtype=torch.int32)
        parts.append(SparseTokens(features, torch.cat([time, voxels], dim=1), [len(voxels)]))
    return SparseTokens.cat(parts)


def _views(seed: int) -> MadeViews:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (VIEWS, VIEW_SIZE, VIEW_SIZE, 4), generator=generator, dtype=torch.uint8)
    return MadeViews(pictures, sphere_cameras(VIEWS, math.sqrt(0.75)))


def _texts(task: str, items: int, width: int, device: torch.device) -> Texts:
    """A text for each item, of vectors as wide as the model's: alignment needs no projection then."""
    generator = torch.Generator().manual_seed(0)
    texts = normalize(torch.randn(items, width, generator=generator), dim=1).to(device)
    matches = torch.eye(items, dtype=torch.bool, device=device)
    return Texts(texts, matches, texts if task == IMAGE_UNDERSTANDING else None)


def gaussian_sizes(sizes: ATokenConfig) -> GaussianDecoderConfig:
    """The released decoder of Gaussians, or nano's for a model as narrow as nano."""
    inputs = sizes.patch_features // sizes.patch_size[0]
    if sizes.encoder.width >= 512:
        return GaussianDecoderConfig(inputs=inputs)
    return GaussianDecoderConfig(
        inputs=inputs, width=192, depth=4, heads=4, mlp_width=768, resolution=32, gaussians=16, skip=True
    )
