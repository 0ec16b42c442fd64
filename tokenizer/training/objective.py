"""The reconstruction objective: L1, squared error, PSNR, LPIPS and KL, summed over a mixed batch of stills and clips.

Reconstruction terms are averaged over the pixels that exist (the three zero frames behind a still do not count);
stills and clips weigh equally. The PSNR term is the mean over items of the PSNR itself: every item counts by its
relative error, so smooth pictures are not drowned by rough ones. The KL term is averaged over tokens and channels are
summed (FORMAT 7).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenizer.model.atoken import ATokenNetwork
from tokenizer.patches import unpatchify
from tokenizer.training.config import LossConfig
from tokenizer.training.store import CropBatch


class Objective:
    """Loss of a step.

    Args:
        config: weights.
        perceptual: maps two [n, 3, H, W] pictures in [-1, 1] to [n] distances; needed if config.lpips is not zero.
    """

    def __init__(self, config: LossConfig, perceptual: nn.Module | None) -> None:
        self.config = config
        self.perceptual = perceptual

    def __call__(
        self, network: ATokenNetwork, batch: CropBatch, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss, and every term unweighted.

        Latents are sampled from the posterior, or quantised by a discrete network. If they are not finite, the loss is
        not either, and there are no terms.
        """
        config = self.config
        encoding = network.encode(batch.patches)
        latents = encoding.latents if network.quantizer is not None else encoding.posterior.sample(generator)
        if not bool(torch.isfinite(latents.features).all()):
            return latents.features.sum(), {}
        decoded = network.decode(latents).features.float()

        frame = network.config.patch_features // network.config.patch_size[0]
        rows = batch.image_tokens
        target = batch.patches.features
        pairs = {
            "image": (decoded[:rows, :frame], target[:rows, :frame]) if batch.images else None,
            "video": (decoded[rows:], target[rows:]) if batch.clips else None,
        }
        terms: dict[str, Tensor] = {"kl": encoding.posterior.kl().mean()}
        loss = config.kl * terms["kl"]
        for name, pair in pairs.items():
            if pair is not None:
                difference = pair[0] - pair[1]
                terms[f"{name} l1"] = difference.abs().mean()
                terms[f"{name} l2"] = difference.square().mean()
                items = batch.images if name == "image" else batch.clips
                terms[f"{name} psnr"] = _psnr(difference, items).mean()
                loss = loss + config.l1 * terms[f"{name} l1"] + config.l2 * terms[f"{name} l2"]
                loss = loss - config.psnr * terms[f"{name} psnr"]
        if config.lpips and step >= config.lpips_from and batch.images and self.perceptual is not None:
            terms["image lpips"] = self._lpips(network, batch, decoded, frame)
            loss = loss + config.lpips * terms["image lpips"]
        return loss, {name: term.detach() for name, term in terms.items()}

    def _lpips(self, network: ATokenNetwork, batch: CropBatch, decoded: Tensor, frame: int) -> Tensor:
        count = min(self.config.lpips_images, batch.images)
        rows = batch.image_tokens // batch.images * count
        assert self.perceptual is not None
        ours = _pictures(decoded[:rows, :frame], count, network)
        real = _pictures(batch.patches.features[:rows, :frame], count, network)
        distance: Tensor = self.perceptual(ours, real)
        return distance.mean()


def _psnr(difference: Tensor, items: int) -> Tensor:
    """PSNR in dB of each of `items` equal-sized items, [items]; errors below 60 dB count as 60."""
    squared = difference.square().reshape(items, -1).mean(dim=1)
    return 10 * torch.log10(4 / (squared + 4e-6))


def _pictures(features: Tensor, count: int, network: ATokenNetwork) -> Tensor:
    """[count * side^2, Pf] of equal square stills -> [count, 3, H, W]."""
    side = round((features.shape[0] // count) ** 0.5)
    pixels = unpatchify(features, (count, side, side), (1, *network.config.patch_size[1:]))
    return pixels.permute(0, 3, 1, 2)


def psnr_by_kind(network: ATokenNetwork, batches: list[CropBatch]) -> dict[str, float]:
    """Validation PSNR in dB, from the mean squared error over all pixels of each kind; pixels clamped to [-1, 1]."""
    errors: dict[str, list[Tensor]] = {"image": [], "video": []}
    frame = network.config.patch_features // network.config.patch_size[0]
    with torch.no_grad():
        for batch in batches:
            decoded = network.decode(network.encode(batch.patches).latents).features.float().clamp(-1, 1)
            rows, target = batch.image_tokens, batch.patches.features
            if batch.images:
                errors["image"].append((decoded[:rows, :frame] - target[:rows, :frame]).square().mean())
            if batch.clips:
                errors["video"].append((decoded[rows:] - target[rows:]).square().mean())
    return {kind: float(10 * torch.log10(4 / torch.stack(found).mean())) for kind, found in errors.items() if found}
