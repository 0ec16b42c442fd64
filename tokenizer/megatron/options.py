"""Megatron's TransformerConfig from ours. Imports Megatron: call `tokenizer.megatron.engine.load_megatron` first."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig as MegatronConfig
from torch import Tensor

from tokenizer.megatron.config import ParallelConfig, stacks
from tokenizer.model.config import ATokenConfig, TransformerConfig
from tokenizer.model.transformer import NORM_EPS


def stack_options(
    stack: TransformerConfig, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device
) -> MegatronConfig:
    """Options of one transformer.

    A stack lies on one pipeline stage as a whole, so as far as its layers know there is one stage.
    """
    return MegatronConfig(
        num_layers=stack.depth,
        hidden_size=stack.width,
        num_attention_heads=stack.heads,
        kv_channels=stack.head_width,
        ffn_hidden_size=stack.mlp_width,
        normalization="RMSNorm" if stack.norm == "rms" else "LayerNorm",
        layernorm_epsilon=NORM_EPS,
        add_bias_linear=stack.bias,
        activation_func=gelu_tanh,
        # The QK norm is in our core attention; Megatron's would be one weight for all heads.
        qk_layernorm=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights come from the native model, the same ones at every layout.
        perform_initialization=False,
        **_fusions(device),
        **_fp8(parallel),
        **_recompute(parallel),
    )


def schedule_options(
    config: ATokenConfig, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device
) -> MegatronConfig:
    """Options of the whole model, as pipeline schedules and gradient reduction read them."""
    options = dataclasses.replace(
        stack_options(config.encoder, parallel, dtype, device), num_layers=sum(s.depth for s in stacks(config).values())
    )
    # Set afterwards: the constructor would divide the blocks of both stacks evenly between the stages.
    options.pipeline_model_parallel_size = parallel.pipeline_model_parallel_size
    options.pipeline_dtype = dtype
    # Every batch has its own number of tokens, so stages tell each other the shape first.
    options.variable_seq_lengths = parallel.pipeline_model_parallel_size > 1
    return options


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation, as in the native MLP."""
    return F.gelu(x, approximate="tanh")


def _fusions(device: torch.device) -> dict[str, Any]:
    on_cuda = device.type == "cuda"
    return {
        "use_cpu_initialization": not on_cuda,
        # Jitted on CUDA, useless elsewhere.
        "bias_dropout_fusion": on_cuda,
        # Needs apex or Transformer Engine's kernels, and the exact (not the tanh) GELU, and Megatron's own rotation.
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }


def _fp8(parallel: ParallelConfig) -> dict[str, Any]:
    if parallel.fp8_format is None:
        return {}
    return {
        "fp8": parallel.fp8_format,
        "fp8_recipe": parallel.fp8_recipe,
        "fp8_margin": parallel.fp8_margin,
        "fp8_amax_history_len": parallel.fp8_amax_history_len,
        "fp8_amax_compute_algo": parallel.fp8_amax_compute_algo,
        "fp8_dot_product_attention": False,
        "fp8_multi_head_attention": False,
        "first_last_layers_bf16": bool(parallel.num_layers_at_start_in_bf16 or parallel.num_layers_at_end_in_bf16),
        "num_layers_at_start_in_bf16": parallel.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": parallel.num_layers_at_end_in_bf16,
    }


def _recompute(parallel: ParallelConfig) -> dict[str, Any]:
    return {
        "recompute_granularity": parallel.recompute_granularity,
        "recompute_method": parallel.recompute_method,
        "recompute_num_layers": parallel.recompute_num_layers,
    }
