"""Reconstructions from every checkpoint of a run, measured by networks that the run was not trained with.

    psnr, ssim                      of whole held-out pictures, stored as 8-bit pixels
    lpips_vgg16, lpips_alexnet      the same
    gram                            1000 times the Gram distance of VGG16 features at 224 x 224, the published setting
    fd-lite0                        Fréchet distance over EfficientNet-Lite0 features of pieces of the pictures

The loss sees Gram and LPIPS through a small network at a low resolution, where runs are short; what it gains there is
worth something only if others see it too. RUN/measured.jsonl keeps what was found: a line for each checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from tokenizer.atomic import atomic_path
from tokenizer.config import parse_config
from tokenizer.errors import InputError
from tokenizer.evaluation.features import FrechetMeter, load_features
from tokenizer.evaluation.metrics import PairMetrics
from tokenizer.losses.gram import gram
from tokenizer.losses.lpips import BACKBONES, LPIPS
from tokenizer.losses.pictures import squares
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.patches import uint8_to_float
from tokenizer.training.curriculum.checkpoint import CHECKPOINTS, read_weights
from tokenizer.training.curriculum.config import RunConfig, network_config
from tokenizer.training.curriculum.model import TrainedModel
from tokenizer.training.curriculum.pictures import Pair, Picture, pairs_of
from tokenizer.training.curriculum.tasks import IMAGE_RECONSTRUCTION
from tokenizer.training.feeding import StepBatch, find_held_out

MEASURED = "measured.jsonl"
"""File of a run."""

FIGURES = ("psnr", "ssim", "lpips_vgg16", "lpips_alexnet", "gram", "fd-lite0")

PIECE = 64
"""Pixels on a side of what the Fréchet distance compares: a handful of whole pictures has no covariance."""


class Perception:
    """The networks that measure.

    Args:
        device: where they, and the models, compute.

    Raises:
        InputError: a package that brings their weights is not installed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        networks = {f"lpips_{name}": LPIPS.from_package(name).to(device) for name in BACKBONES}
        self.pairs, self.vgg16 = PairMetrics(networks, device), networks["lpips_vgg16"]
        self.lite0 = load_features("lite0", device=device)

    def measure_run(self, config: RunConfig) -> None:
        """Measure every checkpoint of a run that has not been measured.

        Raises:
            InputError: held-out pictures that are missing, or none at all.
        """
        folder = Path(config.out)
        out = folder / MEASURED
        known = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.is_file() else []
        done = {int(line["step"]) for line in known}
        paths = {int(path.name.removeprefix("step-")): path for path in (folder / CHECKPOINTS).glob("step-*")}
        missing = sorted(paths.keys() - done)
        pictures = _held_out(config) if missing else []
        for step in missing:
            known.append({"step": step, **self.figures(self.reconstruct(paths[step], pictures))})
            with atomic_path(out) as temporary:
                lines = [json.dumps(line) + "\n" for line in sorted(known, key=lambda line: int(line["step"]))]
                temporary.write_text("".join(lines), encoding="utf-8")

    def reconstruct(self, checkpoint: Path, batches: Sequence[StepBatch]) -> list[Pair]:
        """Pictures and what the averaged weights of a checkpoint make of them, uint8 [H, W, 3] each."""
        weights = read_weights(checkpoint)
        network = ATokenNetwork(network_config(parse_config(RunConfig, weights.settings, str(checkpoint))))
        prefix = "network."
        network.load_state_dict(
            {name.removeprefix(prefix): value for name, value in weights.average.items() if name.startswith(prefix)}
        )
        model = TrainedModel(network).to(self.device).eval().requires_grad_(False)
        pairs: list[Pair] = []
        for batch in batches:
            tokens = batch.tokens(self.device, torch.float32, network.config.patch_size)
            outputs, views = model(tokens, batch.task), [None] * len(batch.items)
            pairs += pairs_of(batch.task, tokens, views, outputs, network.config.patch_size, len(views), None)
        return pairs

    @torch.inference_mode()
    def figures(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """Means over pairs of originals and copies, uint8 [H, W, 3] each, sides from 64 pixels up: `FIGURES`."""
        originals, copies = ([pair[side] for pair in pairs] for side in (0, 1))
        rows = self.pairs.measure([p[None] for p in originals], [p[None] for p in copies])
        found = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        # One after the other: VGG16 takes much memory for many.
        found["gram"] = 1000 * sum(self._gram(*pair) for pair in pairs) / len(pairs)
        meter = FrechetMeter(self.lite0.provenance)
        pieces = [[piece[None] for p in side for piece in pieces_of(p)] for side in (originals, copies)]
        meter.add(*(self.lite0.measure(side) for side in pieces))
        found["fd-lite0"] = float(meter.result()["value"])
        return {name: found[name] for name in FIGURES}

    def _gram(self, original: Picture, copy: Picture) -> float:
        a, b = (
            self.vgg16.activations(squares([uint8_to_float(torch.from_numpy(p))]).to(self.device))
            for p in (original, copy)
        )
        return float(gram(a, b))


def _held_out(config: RunConfig) -> list[StepBatch]:
    """The pictures that a run is validated on."""
    settings = config.validation
    sources = [source for source in settings.sources if source["task"] == IMAGE_RECONSTRUCTION]
    if not sources:
        raise InputError(f"{config.out}: its validation has no pictures to measure; add a source of them")
    batches = find_held_out(config.loader)(sources, budget=settings.budget, limit=settings.limit)
    return [batch for found in batches.values() for batch in found]


def pieces_of(picture: Picture, side: int = PIECE) -> Iterator[Picture]:
    """Squares of a picture [H, W, 3], side by side from its corner; what is left at the other borders is left out."""
    for row in range(0, picture.shape[0] - side + 1, side):
        for column in range(0, picture.shape[1] - side + 1, side):
            yield np.ascontiguousarray(picture[row : row + side, column : column + side])
