"""What a run trains, as one Megatron model: the network in parallel, and beside it what aligns it with texts and what
makes 3D Gaussians.

They are the native modules, whole on every tensor rank: they see pooled vectors and decoded patches, which all ranks
have, so their gradients agree without being sent. Of two pipeline stages the last has them: pooled vectors travel there
beside the posterior, since losses are computed there. They stay float32 when the network is bfloat16: a scale in
bfloat16 has an error of a percent.

Imports Megatron: call `tokenizer.megatron.engine.load_megatron` first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from tokenizer.gaussians.decoder import GaussianDecoder
from tokenizer.megatron.model import MegatronAToken
from tokenizer.megatron.names import from_megatron
from tokenizer.model.config import ATokenConfig
from tokenizer.sparse import SparseTokens
from tokenizer.text.alignment import TextAlignment
from tokenizer.training.curriculum.model import Imitation, Outputs, understood
from tokenizer.training.curriculum.optimization import averaging_weight
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


class ShareAverage:
    """Exponential moving average of the parameters on this process, as `tokenizer.training.curriculum` defines it.

    Float32 whatever the parameters are: a ten-thousandth of a change is lost in bfloat16. Each data-parallel rank keeps
    its own copy, 4 bytes a parameter.

    Args:
        parameters: by name. decay: how much of the average stays in each step.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters after step number `step`, from 0."""
        values = list(self.values.values())
        now = [self.parameters[name].detach().to(value.dtype) for name, value in self.values.items()]
        torch._foreach_lerp_(values, now, averaging_weight(self.decay, step))

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, the parameters are the averages; afterwards they are as before, bit for bit."""
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
