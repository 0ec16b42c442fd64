"""Pictures of a run: originals on the left, what the model makes of them on the right, one below another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokenizer.atomic import atomic_path
from tokenizer.gaussians.decoder import GaussianDecoder
from tokenizer.gaussians.rasterize import rasterize
from tokenizer.patches import PatchSize, float_to_uint8, tokens_to_pixels
from tokenizer.sparse import SparseTokens
from tokenizer.training.curriculum.model import Outputs
from tokenizer.training.curriculum.objective import first_items
from tokenizer.training.curriculum.tasks import ASSET_RECONSTRUCTION, is_understanding
from tokenizer.training.feeding import StepViews

Picture = NDArray[np.uint8]
Pair = tuple[Picture, Picture]

GAP = 4
"""Pixels between two pictures."""


@torch.no_grad()
def pairs_of(
    task: str,
    tokens: SparseTokens,
    views: Sequence[StepViews | None],
    outputs: Outputs,
    patch_size: PatchSize,
    count: int,
    decoder: GaussianDecoder | None,
) -> list[Pair]:
    """Originals and reconstructions of the first items of a batch, uint8 [H, W, 3] each.

    Of a clip its middle frame; of an asset its first view, where it has views and Gaussians are made.
    """
    if is_understanding(task):
        return []
    if task == ASSET_RECONSTRUCTION:
        if decoder is None or "gaussians" not in outputs:
            return []
        return [_view_pair(g, v) for g, v in _assets(tokens, views, outputs["gaussians"], decoder, count)]
    few = first_items(tokens, count)
    decoded = few.with_features(outputs["decoded"][: few.num_tokens].float())
    return [
        (_shown(real, task), _shown(ours, task))
        for real, ours in zip(
            tokens_to_pixels(few, None, patch_size), tokens_to_pixels(decoded, None, patch_size), strict=True
        )
    ]


def save_sheet(pairs: Sequence[Pair], path: Path) -> None:
    """Write pairs as one PNG, whole or not at all."""
    width = max(left.shape[1] for left, _ in pairs)
    height = sum(left.shape[0] + GAP for left, _ in pairs) - GAP
    sheet = np.full((height, 2 * width + GAP, 3), 255, np.uint8)
    top = 0
    for left, right in pairs:
        sheet[top : top + left.shape[0], : left.shape[1]] = left
        sheet[top : top + right.shape[0], width + GAP : width + GAP + right.shape[1]] = right
        top += left.shape[0] + GAP
    with atomic_path(path) as temporary:
        Image.fromarray(sheet).save(temporary)


def _shown(frames: Tensor, task: str) -> Picture:
    middle = len(frames) // 2 if task.startswith("video") else 0
    return float_to_uint8(frames[middle]).cpu().numpy()


def _assets(
    tokens: SparseTokens, views: Sequence[StepViews | None], raw: Tensor, decoder: GaussianDecoder, count: int
) -> list[tuple[Tensor, Tensor]]:
    """Drawn and real first views, colours over black in 0..1, of the assets that have some."""
    every = decoder.interpret(tokens.with_features(raw))
    found: list[tuple[Tensor, Tensor]] = []
    for number, seen in enumerate(views):
        if seen is not None and len(found) < count:
            wanted = seen.pictures[0].float() / 255
            drawn = rasterize(every[number], seen.cameras[:1], (wanted.shape[0], wanted.shape[1])).colours[0]
            found.append((drawn, wanted[..., :3] * wanted[..., 3:]))
    return found


def _view_pair(drawn: Tensor, wanted: Tensor) -> Pair:
    left, right = ((x.cpu() * 255).round().clamp(0, 255).to(torch.uint8).numpy() for x in (wanted, drawn))
    return left, right
