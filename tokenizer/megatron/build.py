"""From a configuration to a model on this process: process groups, layers, weights, data parallelism.

    torch.distributed.init_process_group(...)
    initialise_parallel(config, parallel)
    model = data_parallel(build_model(config, parallel, weights, device=device), parallel)

On a CPU everything after the first line happens inside `tokenizer.megatron.cpu.on_cpu()`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenizer.megatron.config import ParallelConfig, check_layout
from tokenizer.megatron.engine import load_megatron
from tokenizer.megatron.exchange import load_native, mark_shares
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import ATokenConfig

if TYPE_CHECKING:
    from tokenizer.megatron.model import MegatronAToken


def initialise_parallel(config: ATokenConfig, parallel: ParallelConfig) -> None:
    """Check the layout and make Megatron's process groups, replacing those of an earlier layout.

    torch.distributed must be initialised. Ranks are numbered as Megatron does: tensor ranks next to each other, then
    data-parallel ones, then pipeline stages.

    Raises:
        InputError: an impossible layout, or Megatron or Transformer Engine missing or broken.
    """
    check_layout(config, parallel, dist.get_world_size())
    load_megatron(parallel.transformer_impl == "transformer_engine")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
    )
    if parallel.sequence_parallel:
        # Blocks fork this state for dropout inside their layers. There is none, so the seed changes nothing.
        model_parallel_cuda_manual_seed(0)


def build_model(
    config: ATokenConfig,
    parallel: ParallelConfig,
    weights: Mapping[str, Tensor] | torch.Generator,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> MegatronAToken:
    """The model, or this process's share and stage of it, with its weights.

    Args:
        weights: all weights of the native model; or a generator that draws them as `ATokenNetwork.reset_parameters`
            does. From one state of the generator come the same weights at every layout.
        dtype: of the parameters; by default bfloat16 if `parallel.bf16`, else float32.

    Raises:
        InputError: weights of another model.
    """
    from megatron.core import parallel_state

    from tokenizer.megatron.model import MegatronAToken

    if isinstance(weights, torch.Generator):
        native = ATokenNetwork(config)
        native.reset_parameters(weights)
        weights = native.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Megatron's defaults for graphs, which we do not use
        model = MegatronAToken(
            config,
            parallel,
            dtype or (torch.bfloat16 if parallel.bf16 else torch.float32),
            torch.device(device),
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
    load_native(model, weights)
    mark_shares(model)
    return model


def data_parallel(model: MegatronAToken, parallel: ParallelConfig) -> Any:
    """The model in Megatron's DistributedDataParallel, which averages gradients over data-parallel ranks in float32.

    Gradients appear as `parameter.main_grad`, complete after `finalize_model_grads([wrapped])`.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    return DistributedDataParallel(model.config, options, model)
