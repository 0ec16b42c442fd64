"""One layer of the network as Megatron specs: local, or Transformer Engine.

Three things differ from the layers Megatron ships for vision:

- The core attention does the QK norm and the 4D rotation as well. Megatron's QK norm has one weight for all heads (and
  its `finalize_model_grads` would sum ours over tensor ranks, which hold different heads); its rotation of packed
  sequences waits for the device once a sequence and layer, and rotates in bfloat16.
- Attention is bidirectional over packed sequences (`no_mask`); Megatron's own local attention refuses packed ones.
- Norms are the native ones, and tell `finalize_model_grads` when tokens are split over tensor ranks.

Imports Megatron: call `tokenizer.megatron.engine.load_megatron` first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig as MegatronConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from tokenizer.megatron.names import ENGINE_NAMES
from tokenizer.megatron.packing import PackedTiles
from tokenizer.model.attention import attend
from tokenizer.model.config import TransformerConfig
from tokenizer.model.rope import rotate
from tokenizer.model.transformer import HeadNorm, RMSNorm


def block_spec(stack: TransformerConfig, transformer_impl: str) -> TransformerBlockSubmodules:
    """All layers of a stack and its final norm.

    Args:
        transformer_impl: "local" or "transformer_engine".
    """
    make = _engine_layer if transformer_impl == "transformer_engine" else _local_layer
    layer, norm = make(stack)
    return TransformerBlockSubmodules(layer_specs=[layer] * stack.depth, layer_norm=norm)


def _local_layer(stack: TransformerConfig) -> tuple[ModuleSpec, type]:
    norm = LocalRMSNorm if stack.norm == "rms" else LocalLayerNorm
    layer = _layer(
        input_layernorm=norm,
        linear_qkv=ColumnParallelLinear,
        core_attention=_core(LocalAttention, stack),
        linear_proj=RowParallelLinear,
        pre_mlp_layernorm=norm,
        mlp=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        # Files of both kinds of layer have the same names, those of Transformer Engine's fused norms.
        sharded_state_dict_keys_map={f"{local}.": f"{fused}_" for local, fused in ENGINE_NAMES.items()},
    )
    return layer, norm


def _engine_layer(stack: TransformerConfig) -> tuple[ModuleSpec, type]:
    from megatron.core.extensions import transformer_engine as te

    layer = _layer(
        input_layernorm=IdentityOp,
        linear_qkv=te.TELayerNormColumnParallelLinear,
        core_attention=_core(EngineAttention, stack),
        linear_proj=te.TERowParallelLinear,
        pre_mlp_layernorm=IdentityOp,
        mlp=MLPSubmodules(linear_fc1=te.TELayerNormColumnParallelLinear, linear_fc2=te.TERowParallelLinear),
        sharded_state_dict_keys_map={},
    )
    return layer, te.TENorm


def _layer(
    *,
    input_layernorm: type,
    linear_qkv: type,
    core_attention: type,
    linear_proj: type,
    pre_mlp_layernorm: type,
    mlp: MLPSubmodules,
    sharded_state_dict_keys_map: dict[str, str],
) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear_qkv, core_attention=core_attention, linear_proj=linear_proj
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=input_layernorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=pre_mlp_layernorm,
            mlp=mlp_spec(mlp),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=sharded_state_dict_keys_map,
        ),
    )


def mlp_spec(submodules: MLPSubmodules) -> Any:
    """The MLP as a layer's submodule: a ModuleSpec up to Megatron 0.18, a builder from 0.19 on."""
    if hasattr(MLP, "as_mlp_submodule"):
        return partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def _core(kind: type, stack: TransformerConfig) -> Any:
    return partial(kind, qk_norm=stack.qk_norm)


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """QK norm, rotation, then attention over packed sequences; the heads of one tensor rank."""

    def __init__(self, config: MegatronConfig, qk_norm: bool) -> None:
        super().__init__(config=config)
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.query_norm = ShardedHeadNorm(heads, config.kv_channels) if qk_norm else None
        self.key_norm = ShardedHeadNorm(heads, config.kv_channels) if qk_norm else None

    def prepared(self, query: Tensor, key: Tensor, packed: PackedTiles) -> tuple[Tensor, Tensor]:
        """Queries and keys [T, H, Dh], normalised and rotated."""
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if packed.rotary is not None:
            query, key = rotate(query, packed.rotary), rotate(key, packed.rotary)
        return query, key


class LocalAttention(CoreAttention):
    """Attention by the native kernels: whatever `tokenizer.model.attention` chooses for device and dtype."""

    def __init__(self, config: MegatronConfig, *, qk_norm: bool, **_: Any) -> None:
        super().__init__(config, qk_norm)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,  # noqa: ARG002
        *,
        packed_seq_params: PackedTiles,
        **_: Any,
    ) -> Tensor:
        """[T, H, Dh] each -> [T, H, Dh]."""
        query, key = self.prepared(query, key, packed_seq_params)
        assert packed_seq_params.segments is not None
        return attend(query, key, value, packed_seq_params.segments)


class EngineAttention(CoreAttention):
    """Attention by Transformer Engine, in bfloat16 (it turns `no_mask` into padding for packed sequences)."""

    def __init__(self, config: MegatronConfig, *, qk_norm: bool, **options: Any) -> None:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        super().__init__(config, qk_norm)
        self.inner = TEDotProductAttention(config=config, **options)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: PackedTiles,
        **options: Any,
    ) -> Tensor:
        """[T, H, Dh] each -> [T, H, Dh] or [T, H Dh], as Transformer Engine likes."""
        query, key = self.prepared(query, key, packed_seq_params)
        output: Tensor = self.inner(query, key, value, attention_mask, packed_seq_params=packed_seq_params, **options)
        return output


class ShardedHeadNorm(HeadNorm):
    """The native QK norm over the heads of one tensor rank; in checkpoints its heads are joined."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> Any:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"scale": 0}, sharded_offsets)


class LocalLayerNorm(nn.LayerNorm):
    """LayerNorm for tokens that may be split over tensor ranks."""

    def __init__(self, config: MegatronConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        _mark_split_tokens(self, config)


class LocalRMSNorm(RMSNorm):
    """The native RMSNorm for tokens that may be split over tensor ranks."""

    def __init__(self, config: MegatronConfig, hidden_size: int, **_: Any) -> None:
        super().__init__(hidden_size)
        _mark_split_tokens(self, config)


def _mark_split_tokens(module: nn.Module, config: MegatronConfig) -> None:
    """With sequence parallelism each rank sees its tokens' part of a gradient; `finalize_model_grads` adds them up."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
