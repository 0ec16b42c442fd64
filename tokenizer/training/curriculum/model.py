"""What is trained: the network, what aligns it with texts, and what makes 3D Gaussians, as one module.

State-dict prefixes: `network.` (an `ATokenNetwork`), `alignment.` (a `TextAlignment`), `gaussians.` (a
`GaussianDecoder`), `imitation.` (an `Imitation`, of training alone). One call of `forward` does all that a batch of one
task needs, so that an engine may wrap it whole (FSDP2 gathers parameters around calls). It returns plain tensors for
the same reason.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tokenizer.checkpoints import save_network
from tokenizer.gaussians.checkpoints import SUBFOLDER, save_gaussian_decoder
from tokenizer.gaussians.decoder import GaussianDecoder
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.sparse import SparseTokens
from tokenizer.text.alignment import TextAlignment, save_text_alignment
from tokenizer.training.curriculum.tasks import ASSET_RECONSTRUCTION, is_understanding
from tokenizer.voxels import voxel_features

Outputs = dict[str, Tensor]
"""By name: of understanding `vectors` [B, D], and `imitated` [B, F] where a teacher is imitated; of reconstruction
`parameters` [N, 2C] of the posterior, `decoded` patches [N, P], `gaussians` [N, 14 G] raw where they are made, and
`fault`, a scalar that is zero, or NaN where latents were not finite."""

PARTS = ("encoder", "decoder", "head", "gaussians")
"""What gradients are measured of: see `part_of`."""


class Imitation(nn.Linear):
    """Pooled vectors [B, width] to what an image network sees, [B, features]; nothing that a trained model needs."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__(width, features)


class TrainedModel(nn.Module):
    """Everything with parameters that a run trains.

    Args:
        network: the autoencoder.
        alignment: to train understanding.
        gaussians: to train 3D by its pictures.
        imitation: to learn what a teacher sees, beside the alignment.
    """

    def __init__(
        self,
        network: ATokenNetwork,
        alignment: TextAlignment | None = None,
        gaussians: GaussianDecoder | None = None,
        imitation: Imitation | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.alignment = alignment
        self.gaussians = gaussians
        self.imitation = imitation

    def forward(self, tokens: SparseTokens, task: str, generator: torch.Generator | None = None) -> Outputs:
        """What the objective of `task` compares.

        Args:
            tokens: patches [N, P].
            generator: samples the posterior; without one its mean is decoded. A discrete network quantises the mean.
        """
        if is_understanding(task):
            return understood(self.network.pooled(tokens), self.alignment, self.imitation)
        encoding = self.network.encode(tokens)
        sampled = self.network.quantizer is None and generator is not None
        latents = (encoding.posterior.sample(generator) if sampled else encoding.latents).features
        # The decoder refuses what is not finite, with an error; a step must fail in all processes alike instead.
        finite = encoding.features.with_features(latents.nan_to_num(0.0, 0.0, 0.0))
        decoded = self.network.decode(finite)
        outputs = {
            "parameters": encoding.posterior.parameters.features,
            "decoded": decoded.features,
            "fault": 0.0 * latents.sum(),
        }
        if task == ASSET_RECONSTRUCTION and self.gaussians is not None:
            outputs["gaussians"] = self.gaussians(voxel_features(decoded, self.network.config.patch_size)).features
        return outputs

    def stacks(self) -> list[nn.Module]:
        """The blocks of all transformers: what FSDP2 gathers one after the other."""
        blocks = [block for stack in self.network.transformers() for block in stack.blocks]
        return [*blocks, *(self.gaussians.blocks if self.gaussians is not None else ())]


def understood(pooled: Tensor, alignment: TextAlignment | None, imitation: Imitation | None) -> Outputs:
    """What the objective compares of pooled vectors [B, width]."""
    assert alignment is not None
    outputs = {"vectors": alignment(pooled)}
    return outputs if imitation is None else {**outputs, "imitated": imitation(pooled)}


def part_of(name: str) -> str:
    """The part of `PARTS` that a parameter belongs to: the pool and what reads its vectors are the head."""
    if name.startswith(("alignment.", "imitation.", "network.encoder.pool.")):
        return "head"
    if name.startswith("gaussians."):
        return "gaussians"
    return "encoder" if name.startswith("network.encoder.") else "decoder"


def save_trained(model: TrainedModel, folder: Path) -> None:
    """Write a model's folder as `AToken.from_pretrained` reads it, with `gaussians/` and `text_alignment/`."""
    save_network(model.network, folder)
    if model.gaussians is not None:
        save_gaussian_decoder(model.gaussians, folder / SUBFOLDER)
    if model.alignment is not None:
        save_text_alignment(model.alignment, folder)
