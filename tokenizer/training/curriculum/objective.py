"""What every step minimises, task by task (PAPER 2 and 3); it knows no engine.

    image_understanding     1.0 distillation
    image_reconstruction    0.2 (L1 + 10 LPIPS + 1e3 Gram + CLIP) + 1e-8 KL
    video_understanding     1.0 sigmoid
    video_reconstruction    0.2 L1 + 1e-8 KL
    asset_understanding     1.0 sigmoid
    asset_reconstruction    0.2 (L1 of voxels + L1 + L2 + 0.5 coverage of drawn views) + 1e-8 KL

Where `loss.psnr` and `loss.cosine` ask for it, every reconstruction has the PSNR of its items besides, and every
understanding the cosine to the own text; where `loss.imitation` does, the imitation of what an image network sees.

The loss of a micro-batch is its part of the step's: sums over its own units, divided by the units of all
(`Prepared.totals`). Adding up the losses, or the gradients, of all micro-batches in all processes gives those of the
step. The same holds for the terms, which are logged unweighted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokenizer.errors import InputError
from tokenizer.gaussians.decoder import GaussianDecoder
from tokenizer.gaussians.rasterize import rasterize
from tokenizer.losses.clip import clip
from tokenizer.losses.distillation import distillation
from tokenizer.losses.gaussians import rendering_terms
from tokenizer.losses.gram import gram
from tokenizer.losses.imitation import imitation
from tokenizer.losses.kl import kl
from tokenizer.losses.l1 import l1
from tokenizer.losses.lpips import LPIPS, unit_length
from tokenizer.losses.networks import ImageNetwork, make_clip_network
from tokenizer.losses.pictures import squares
from tokenizer.losses.psnr import psnr
from tokenizer.losses.sigmoid import sigmoid
from tokenizer.losses.similarity import SimilarityScale
from tokenizer.losses.weights import LossChoices, LossWeights
from tokenizer.model.posterior import Posterior
from tokenizer.patches import PatchSize, tokens_to_pixels
from tokenizer.sparse import SparseTokens
from tokenizer.training.curriculum.config import RenderingWeights, RunConfig, network_config
from tokenizer.training.curriculum.model import Outputs
from tokenizer.training.curriculum.preparation import Prepared
from tokenizer.training.curriculum.tasks import (
    ASSET_RECONSTRUCTION,
    IMAGE_RECONSTRUCTION,
    IMAGE_UNDERSTANDING,
    is_understanding,
    is_video,
)

Terms = dict[str, Tensor]
"""Parts of the step's means by the name of the term, detached scalars."""


class Objective:
    """Loss and terms of a micro-batch.

    Args:
        weights, choices, rendering: see there.
        patch_size: of the model.
        discrete: whether it quantises; it has no KL term then, unless `choices` says so.
        lpips: needed for the weights lpips and gram. clip_network: for clip.
        perceptual_images: pictures of a batch that these look at, the first ones.

    Raises:
        InputError: a weight without the network that it needs.
    """

    def __init__(
        self,
        weights: LossWeights,
        choices: LossChoices,
        rendering: RenderingWeights,
        patch_size: PatchSize,
        *,
        discrete: bool,
        lpips: LPIPS | None = None,
        clip_network: ImageNetwork | None = None,
        perceptual_images: int | None = None,
    ) -> None:
        if (weights.lpips or weights.gram) and lpips is None:
            raise InputError("the loss weights lpips and gram need the network of LPIPS")
        if weights.clip and clip_network is None:
            raise InputError("the loss weight clip needs an image network")
        self.weights, self.choices, self.rendering, self.patch_size = weights, choices, rendering, patch_size
        self.kl_weight = weights.kl if choices.kl_when_discrete or not discrete else 0.0
        self.lpips, self.clip_network, self.perceptual_images = lpips, clip_network, perceptual_images
        # Both sides of the distillation have the scale that is stated for it, whatever the sigmoid loss learns.
        self.distillation_scale = SimilarityScale(choices.sigmoid_scale, choices.sigmoid_bias)

    @torch.no_grad()
    def try_networks(self, device: torch.device) -> None:
        """Show the frozen networks a black square of `choices.side`, so that one they do not take is known at once.

        Raises:
            InputError: too small, or no whole number of patches.
        """
        black = [torch.zeros(1, 1, 3, device=device)]
        try:
            if self.lpips is not None:
                self.lpips.activations(squares(black, self.choices.side))
            if self.clip_network is not None:
                self.clip_network(squares(black, self._clip_side(self.clip_network)))
        except InputError as error:
            raise InputError(f"choices.side is {self.choices.side}: {error}") from None

    def _clip_side(self, network: ImageNetwork) -> int:
        """Of the squares that the CLIP loss compares: some networks take one size alone."""
        return self.choices.side if getattr(network, "naflex", True) else network.side

    def names(self, task: str) -> list[str]:
        """The terms of a task, for logs: "task/term"."""
        if is_understanding(task):
            return [f"{task}/semantic", *([f"{task}/imitation"] if self.weights.imitation else [])]
        names = ["l1", *(["kl"] if self.kl_weight else []), *(["psnr"] if self.weights.psnr else [])]
        if task == IMAGE_RECONSTRUCTION:
            names += [name for name in ("lpips", "gram", "clip") if getattr(self.weights, name)]
        if task == ASSET_RECONSTRUCTION:
            names += ["view l1", "view l2", "coverage"]
        return [f"{task}/{name}" for name in names]

    def __call__(
        self,
        prepared: Prepared,
        outputs: Outputs,
        scale: SimilarityScale | None = None,
        gaussians: GaussianDecoder | None = None,
    ) -> tuple[Tensor, Terms]:
        """The micro-batch's part of the step's loss, and of its terms.

        Args:
            outputs: of `TrainedModel.forward`, or of another engine's model.
            scale: of the sigmoid loss. gaussians: whose raw output is interpreted.
        """
        if is_understanding(prepared.task):
            loss, terms = self._understanding(prepared, outputs["vectors"], scale)
            if self.weights.imitation:
                terms["imitation"] = self._imitation(prepared, outputs["imitated"])
                loss = loss + self.weights.semantic * self.weights.imitation * terms["imitation"]
        else:
            loss, terms = self._reconstruction(prepared, outputs, gaussians)
        return prepared.share * loss, {f"{prepared.task}/{name}": term.detach() for name, term in terms.items()}

    def _understanding(
        self, prepared: Prepared, vectors: Tensor, scale: SimilarityScale | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        texts = prepared.texts
        assert texts is not None
        kind = torch.promote_types(vectors.dtype, torch.float32)
        every = texts.every.to(kind)
        if prepared.task == IMAGE_UNDERSTANDING:
            assert texts.teacher is not None
            fixed = self.distillation_scale.to(vectors.device)
            values = distillation(fixed(texts.teacher.to(kind), every), fixed(vectors, every), self.choices.temperature)
        else:
            assert scale is not None
            values = sigmoid(scale(vectors, every) + scale.bias, texts.matches)
        if self.weights.cosine:
            # Texts that match are equal, so that their sum points where the own one does.
            own = texts.matches.to(kind) @ every
            values = values + self.weights.cosine * (1 - cosine_similarity(vectors.to(kind), own))
        term = values.sum() / prepared.totals.items
        return self.weights.semantic * term, {"semantic": term}

    def _imitation(self, prepared: Prepared, made: Tensor) -> Tensor:
        """Zero, and no gradient but zero, where no network has seen any of these samples."""
        if prepared.taught is None:
            return made.sum() * 0.0
        rows, features = prepared.taught
        return imitation(made[rows], features).sum() / prepared.totals.taught

    def _reconstruction(
        self, prepared: Prepared, outputs: Outputs, gaussians: GaussianDecoder | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        task, totals, weights = prepared.task, prepared.totals, self.weights
        existing = None if is_video(task) else self.patch_size[1] * self.patch_size[2] * 3
        terms = {"l1": l1(outputs["decoded"], prepared.tokens.features, existing).sum() / totals.tokens}
        factor = self.rendering.voxels if task == ASSET_RECONSTRUCTION else weights.l1
        reconstruction = factor * terms["l1"]
        if weights.psnr:
            found = psnr(outputs["decoded"], prepared.tokens.features, prepared.tokens.lengths, existing)
            terms["psnr"] = found.sum() / totals.items
            reconstruction = reconstruction - weights.psnr * terms["psnr"]
        if task == IMAGE_RECONSTRUCTION:
            for name, values in self._perceptual(prepared, outputs["decoded"]).items():
                terms[name] = values.sum() / totals.pictures
                reconstruction = reconstruction + getattr(weights, name) * terms[name]
        if task == ASSET_RECONSTRUCTION and "gaussians" in outputs and gaussians is not None and totals.views:
            views = self._views(prepared, outputs["gaussians"], gaussians)
            factors = {"view l1": self.rendering.l1, "view l2": self.rendering.l2, "coverage": self.rendering.coverage}
            for name, value in views.items():
                terms[name] = value / totals.views
                reconstruction = reconstruction + factors[name] * terms[name]
        loss = weights.reconstruction * reconstruction + outputs["fault"]
        # Nothing trains the variances of a discrete model: they may overflow, and zero times infinity is no zero.
        if self.kl_weight:
            terms["kl"] = kl(Posterior(prepared.tokens.with_features(outputs["parameters"]))).sum() / totals.tokens
            loss = loss + self.kl_weight * terms["kl"]
        return loss, terms

    def _perceptual(self, prepared: Prepared, decoded: Tensor) -> dict[str, Tensor]:
        """LPIPS, Gram and CLIP of the first pictures, each [n]; those that weigh nothing are left out."""
        weights, patch_size = self.weights, self.patch_size
        if not (weights.lpips or weights.gram or weights.clip):
            return {}
        count = min(len(prepared.ids), self.perceptual_images or len(prepared.ids))
        tokens = first_items(prepared.tokens, count)
        rows = tokens.num_tokens
        ours = [frames[0] for frames in tokens_to_pixels(tokens.with_features(decoded[:rows]), None, patch_size)]
        real = [frames[0] for frames in tokens_to_pixels(tokens, None, patch_size)]
        found = {}
        if self.lpips is not None and (weights.lpips or weights.gram):
            made = self.lpips.activations(squares(ours, self.choices.side))
            with torch.no_grad():
                wanted = self.lpips.activations(squares(real, self.choices.side))
            if weights.lpips:
                found["lpips"] = self.lpips.distance([unit_length(x) for x in made], [unit_length(x) for x in wanted])
            if weights.gram:
                found["gram"] = gram(made, wanted)
        if self.clip_network is not None and weights.clip:
            side = self._clip_side(self.clip_network)
            with torch.no_grad():
                goal = self.clip_network(squares(real, side))
            found["clip"] = clip(self.clip_network(squares(ours, side)), goal)
        return found

    def _views(self, prepared: Prepared, raw: Tensor, decoder: GaussianDecoder) -> dict[str, Tensor]:
        """Sums over the assets of this batch that have views; NaN where the network's output is not finite."""
        zero = raw.sum() * 0.0
        sums = {"view l1": zero, "view l2": zero, "coverage": zero}
        # The rasteriser refuses Gaussians that are not finite with an error; a step must fail in all processes alike.
        if not bool(torch.isfinite(zero)):
            return sums
        every = decoder.interpret(prepared.tokens.with_features(raw))
        for number, views in enumerate(prepared.views):
            if views is not None:
                size = (int(views.pictures.shape[1]), int(views.pictures.shape[2]))
                terms = rendering_terms(rasterize(every[number], views.cameras, size), views.pictures)
                for name, value in (("view l1", terms.l1), ("view l2", terms.l2), ("coverage", terms.coverage)):
                    sums[name] = sums[name] + value
        return sums


def first_items(tokens: SparseTokens, count: int) -> SparseTokens:
    """The first items of a batch; the batch itself where these are all."""
    return tokens if count >= tokens.batch_size else tokens[:count]


def make_objective(config: RunConfig, device: torch.device) -> Objective:
    """The objective that a configuration asks for, with its frozen networks on the device.

    Raises:
        InputError: packages or weights that are not there.
    """
    sizes, weights = network_config(config), config.loss
    lpips = LPIPS.from_package(config.choices.lpips_backbone).to(device) if weights.lpips or weights.gram else None
    network = make_clip_network(config.choices, device) if weights.clip else None
    objective = Objective(
        weights,
        config.choices,
        config.rendering,
        sizes.patch_size,
        discrete=sizes.quantizer is not None,
        lpips=lpips,
        clip_network=network,
        perceptual_images=config.perceptual_images,
    )
    objective.try_networks(device)
    return objective
