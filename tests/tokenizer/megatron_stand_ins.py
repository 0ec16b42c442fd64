"""Layers that take the place of Transformer Engine's on a CPU: same arguments, names of parameters and results."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from tokenizer.model.transformer import make_norm


class LayerNormLinear(ColumnParallelLinear):  # type: ignore[misc]
    """A norm and a column-parallel layer, with the norm's parameters beside the layer's."""

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        super().__init__(input_size, output_size, **options)
        self.layer_norm_weight = nn.Parameter(torch.ones(input_size))
        bias = nn.Parameter(torch.zeros(input_size)) if options["config"].normalization == "LayerNorm" else None
        self.register_parameter("layer_norm_bias", bias)
        self.history = torch.zeros(4)

    def get_extra_state(self) -> Tensor:
        """As Transformer Engine's FP8 histories: in checkpoints of such layers, and in no others."""
        return self.history

    def set_extra_state(self, state: Tensor) -> None:
        self.history = state

    def forward(self, x: Tensor) -> Any:
        shape, weight, eps = self.layer_norm_weight.shape, self.layer_norm_weight, self.config.layernorm_epsilon
        if self.layer_norm_bias is None:
            return super().forward(F.rms_norm(x, shape, weight, eps))
        return super().forward(F.layer_norm(x, shape, weight, self.layer_norm_bias, eps))

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: Any = None,  # noqa: ARG002
    ) -> ShardedStateDict:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


class PackedAttention(nn.Module):
    """Attention sequence by sequence, as the cumulative lengths say."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, packed_seq_params: Any, **_: Any
    ) -> Tensor:
        assert attention_mask is None
        assert packed_seq_params.qkv_format == "thd"
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True)
        outputs = [F.scaled_dot_product_attention(*part).transpose(0, 1) for part in parts]
        return torch.cat(outputs).flatten(1)


class Norm:
    """Builds the norm that the options name."""

    def __new__(cls, config: Any, hidden_size: int, eps: float) -> Any:  # noqa: ARG004
        return make_norm("rms" if config.normalization == "RMSNorm" else "layer", hidden_size)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Megatron's names for Transformer Engine's layers mean the stand-ins in here."""
    module = importlib.import_module("megatron.core.extensions.transformer_engine")
    layers = {
        "TELayerNormColumnParallelLinear": LayerNormLinear,
        "TERowParallelLinear": RowParallelLinear,
        "TEDotProductAttention": PackedAttention,
        "TENorm": Norm,
    }
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(patch.object(module, name, layer, create=True))
        yield
