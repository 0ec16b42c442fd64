"""What a run is measured on: held-out sources, with averaged weights and posterior means.

    reconstruction     psnr in dB: of each item, from its mean squared error over all pixels (of stills and voxels those
                       of the first frame), then the mean; of 3D with Gaussians also "view psnr" of drawn views
    understanding      "accuracy" of naming the class of each item where all have labels, beside "majority", what
                       naming the most frequent class reaches; "retrieval" where captions are there: how often a text
                       finds its item among all (recall at 1, different texts alone)

The score that decides which checkpoint is the best is the mean PSNR over sources, or without any the mean accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.gaussians.decoder import GaussianDecoder
from tokenizer.gaussians.rasterize import rasterize
from tokenizer.losses.gaussians import rendering_terms
from tokenizer.patches import PatchSize
from tokenizer.sparse import SparseTokens
from tokenizer.text.protocol import TextTower
from tokenizer.text.zero_shot import ASSET_PROMPTS, IMAGE_PROMPTS, VIDEO_PROMPTS, class_vectors, classify, retrieve
from tokenizer.training.curriculum.engine import Engine
from tokenizer.training.curriculum.model import Outputs
from tokenizer.training.curriculum.pictures import Pair, pairs_of
from tokenizer.training.curriculum.processes import Processes
from tokenizer.training.curriculum.tasks import ASSET_RECONSTRUCTION, is_understanding, is_video
from tokenizer.training.feeding import StepBatch

PROMPTS = {"image": IMAGE_PROMPTS, "video": VIDEO_PROMPTS, "asset": ASSET_PROMPTS}
"""Sentences for class names, by the kind of visual."""

WORST_ERROR = 4e-10
"""Squared errors below it count as it: 100 dB."""


@dataclass(frozen=True, slots=True)
class _Texts:
    """Of a source of understanding: vectors of its classes and the class of each item; vectors of its captions."""

    classes: Tensor | None
    labels: list[int]
    captions: Tensor | None


class Validation:
    """Measures a model on held-out sources; all processes call it together and share the batches.

    Args:
        held_out: batches by source.
        engine: of the run.
        processes: all of it.
        patch_size: of the model.
        tower: of texts; without one, understanding is not measured.
        gaussians: the model's decoder of Gaussians.
    """

    def __init__(
        self,
        held_out: Mapping[str, Sequence[StepBatch]],
        engine: Engine,
        processes: Processes,
        patch_size: PatchSize,
        tower: TextTower | None,
        gaussians: GaussianDecoder | None,
    ) -> None:
        self.engine, self.processes, self.patch_size, self.gaussians = engine, processes, patch_size, gaussians
        self.sources = {
            name: batches
            for name, batches in held_out.items()
            if tower is not None or not is_understanding(batches[0].task)
        }
        self.texts = {
            name: _texts(batches, tower)
            for name, batches in self.sources.items()
            if tower is not None and is_understanding(batches[0].task)
        }

    def __call__(self) -> dict[str, float]:
        """ "validation/SOURCE/METRIC" for all sources."""
        found: dict[str, float] = {}
        with self.engine.averaged():
            for name, batches in self.sources.items():
                measured = self._understood(name, batches) if name in self.texts else self._rebuilt(batches)
                found.update({f"validation/{name}/{metric}": value for metric, value in measured.items()})
        return found

    @staticmethod
    def score(found: Mapping[str, float]) -> float | None:
        """What the best checkpoint has most of; None where nothing was measured."""
        for metric in ("/psnr", "/accuracy"):
            values = [value for name, value in found.items() if name.endswith(metric)]
            if values:
                return sum(values) / len(values)
        return None

    def pictures(self, count: int) -> dict[str, list[Pair]]:
        """Originals and reconstructions by source, with averaged weights."""
        found = {}
        with self.engine.averaged():
            for name, batches in self.sources.items():
                batch = batches[0]
                if not is_understanding(batch.task):
                    tokens, outputs = self._outputs(batch)
                    views = [item.views for item in batch.items]
                    found[name] = pairs_of(batch.task, tokens, views, outputs, self.patch_size, count, self.gaussians)
        return {name: pairs for name, pairs in found.items() if pairs}

    def _rebuilt(self, batches: Sequence[StepBatch]) -> dict[str, float]:
        sums = [0.0] * 5  # PSNR, L1, items, PSNR of views, assets with views
        for batch, counts in self._shared(batches):
            tokens, outputs = self._outputs(batch)
            psnr, l1 = _errors(batch.task, tokens, outputs["decoded"], self.patch_size)
            views = self._views(batch, tokens, outputs)
            part = [float(psnr.sum()), float(l1.sum()), len(psnr), sum(views), len(views)]
            sums = [total + value * counts for total, value in zip(sums, part, strict=True)]
        total_psnr, total_l1, items, view_psnr, assets = self.processes.sum(sums)
        found = {"psnr": total_psnr / items, "l1": total_l1 / items}
        return {**found, "view psnr": view_psnr / assets} if assets else found

    def _views(self, batch: StepBatch, tokens: SparseTokens, outputs: Outputs) -> list[float]:
        if batch.task != ASSET_RECONSTRUCTION or self.gaussians is None or "gaussians" not in outputs:
            return []
        raw = outputs["gaussians"]
        if not bool(torch.isfinite(raw).all()):
            return [float("nan") for item in batch.items if item.views is not None]
        every = self.gaussians.interpret(tokens.with_features(raw))
        found = []
        for number, item in enumerate(batch.items):
            if item.views is not None:
                size = (int(item.views.pictures.shape[1]), int(item.views.pictures.shape[2]))
                terms = rendering_terms(rasterize(every[number], item.views.cameras, size), item.views.pictures)
                found.append(float(-10 * torch.log10(terms.l2.clamp_min(WORST_ERROR / 4))))
        return found

    def _understood(self, name: str, batches: Sequence[StepBatch]) -> dict[str, float]:
        texts = self.texts[name]
        mine = []
        for batch, counts in self._shared(batches):
            vectors = self._outputs(batch)[1]["vectors"]
            mine.append(F.normalize(vectors.float(), dim=1).cpu() if counts else None)
        # Batch number i was the business of process i modulo their number.
        everyone = self.processes.gather(mine)
        world = self.processes.world
        vectors = torch.cat([everyone[number % world][number // world] for number in range(len(batches))])
        found: dict[str, float] = {}
        if not bool(torch.isfinite(vectors).all()):
            return {"accuracy": float("nan")}
        if texts.classes is not None:
            result = classify(vectors, texts.classes.cpu(), torch.tensor(texts.labels))
            found = {"accuracy": result.top[1], "majority": result.majority}
        if texts.captions is not None:
            owners = torch.arange(len(vectors))
            found["retrieval"] = retrieve(vectors, texts.captions.cpu(), owners, at=(1,)).text_to_image[1]
        return found

    def _shared(self, batches: Sequence[StepBatch]) -> list[tuple[StepBatch, int]]:
        """This process's batches, and 1; as many for each, since they meet in the model: a spare one counts 0."""
        rank, world = self.processes.rank, self.processes.world
        mine = [(batch, 1) for batch in batches[rank::world]]
        missing = -(-len(batches) // world) - len(mine)
        return [*mine, *[(batches[0], 0)] * missing]

    def _outputs(self, batch: StepBatch) -> tuple[SparseTokens, Outputs]:
        tokens = batch.tokens(self.engine.device, torch.float32, self.patch_size)
        return tokens, self.engine.infer(tokens, batch.task)


def _errors(task: str, tokens: SparseTokens, decoded: Tensor, patch_size: PatchSize) -> tuple[Tensor, Tensor]:
    """PSNR in dB and L1 of each item, [B]; values are clamped to [-1, 1] first."""
    wide = tokens.num_channels if is_video(task) else patch_size[1] * patch_size[2] * 3
    difference = decoded[:, :wide].float().clamp(-1, 1) - tokens.features[:, :wide].float()
    lengths = tokens.lengths.tolist()
    squared = torch.stack([part.square().mean() for part in difference.split(lengths)])
    l1 = torch.stack([part.abs().mean() for part in difference.split(lengths)])
    return 10 * torch.log10(4 / squared.clamp_min(WORST_ERROR)), l1


def _texts(batches: Sequence[StepBatch], tower: TextTower) -> _Texts:
    items = [item for batch in batches for item in batch.items]
    labels = [str(item.facts["label"]) for item in items if item.facts.get("label")]
    names = sorted(set(labels))
    classes = None
    if len(labels) == len(items) and len(names) > 1:
        classes = class_vectors(tower, names, PROMPTS[batches[0].task.split("_")[0]])
    captions = [item.caption for item in items if item.caption]
    # Of equal captions none could find its item.
    different = len(captions) == len(items) and len(set(captions)) == len(captions) and len(captions) > 1
    return _Texts(classes, [names.index(label) for label in labels], tower.encode(captions) if different else None)
