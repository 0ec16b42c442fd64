"""What a run trains, as one Megatron model: the network in parallel, and beside it what aligns it with texts and what
makes 3D Gaussians.

They are the native modules, whole on every tensor rank: they see pooled vectors and decoded patches, which all ranks
have, so their gradients agree without being sent. Of two pipeline stages the last has them: pooled vectors travel there
beside the posterior, since losses are computed there. They stay float32 when the network is bfloat16: a scale in
bfloat16 has an error of a percent.

Imports Megatron: call `tokenizer.megatron.engine.load_megatron` first.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from tokenizer.gaussians.decoder import GaussianDecoder
from tokenizer.megatron.model import MegatronAToken
from tokenizer.megatron.names import from_megatron
from tokenizer.model.config import ATokenConfig
from tokenizer.sparse import SparseTokens
from tokenizer.text.alignment import TextAlignment
from tokenizer.training.curriculum.model import Imitation, Outputs, understood
from tokenizer.training.curriculum.tasks import ASSET_RECONSTRUCTION, is_understanding
from tokenizer.voxels import voxel_features

NETWORK = "network."
"""Prefix of the network's weights, as in `tokenizer.training.curriculum.model.TrainedModel`."""


class MegatronTrained(MegatronModule):  # type: ignore[misc]
    """The parts of a `TrainedModel` on this process.

    Args:
        network: this process's share and stage.
        alignment, gaussians, imitation: None where the run has none, and on the first of two stages.
    """

    def __init__(
        self,
        network: MegatronAToken,
        alignment: TextAlignment | None,
        gaussians: GaussianDecoder | None,
        imitation: Imitation | None = None,
    ) -> None:
        super().__init__(config=network.config)
        self.network = network
        self.alignment = alignment
        self.gaussians = gaussians
        self.imitation = imitation
        # Megatron's schedules and gradient reductions read these.
        self.model_type, self.share_embeddings_and_output_weights = network.model_type, False
        self.pre_process, self.post_process = network.pre_process, network.post_process

    @property
    def network_config(self) -> ATokenConfig:
        """Sizes of the network."""
        return self.network.network_config

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """What the stage before has sent; pipeline schedules call it before `forward`."""
        self.network.set_input_tensor(input_tensor)

    def forward(self, tokens: SparseTokens, task: str, generator: torch.Generator | None = None) -> Outputs | Tensor:
        """What `TrainedModel.forward` gives; on the first of two stages the tensor for the second."""
        output = self.network(tokens, generator, decode=not is_understanding(task))
        if isinstance(output, Tensor):
            return output
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=self.network.parallel.bf16):
            if is_understanding(task):
                return understood(output.encoding.pooled, self.alignment, self.imitation)
            decoded = output.patches
            outputs: Outputs = {
                "parameters": output.encoding.posterior.parameters.features,
                "decoded": decoded.features,
                # Latents that are not finite make the patches so: this decoder does not refuse them.
                "fault": decoded.features.new_zeros(()),
            }
            if task == ASSET_RECONSTRUCTION and self.gaussians is not None:
                voxels = voxel_features(decoded, self.network_config.patch_size)
                outputs["gaussians"] = self.gaussians(voxels).features
            return outputs


def trained_name(name: str) -> str:
    """The name in a `TrainedModel` of a parameter of a `MegatronTrained`, in DistributedDataParallel or not."""
    name = name.removeprefix("module.")
    return NETWORK + from_megatron(name.removeprefix(NETWORK)).native if name.startswith(NETWORK) else name
