"""Weights from the native model into a Megatron model and back, exact at any tensor and pipeline size.

Everything follows from the table in `tokenizer.megatron.names`. It serves whatever has the shape of the weights:
gradients and optimizer moments go the same ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.megatron.config import stacks
from tokenizer.megatron.names import Weight, engine_name, from_megatron, from_native
from tokenizer.model.config import ATokenConfig


def to_megatron(
    config: ATokenConfig, native: Mapping[str, Tensor], rank: int, ranks: int, transformer_impl: str = "local"
) -> dict[str, Tensor]:
    """The share of tensor rank `rank` of `ranks` of all native weights, under Megatron's names. Mostly views.

    Raises:
        InputError: a name that the native model does not have.
    """
    shares = {}
    for name, tensor in native.items():
        weight = from_native(name)
        target = engine_name(weight.megatron) if transformer_impl == "transformer_engine" else weight.megatron
        shares[target] = _share(_heads_first(tensor, weight, config), weight, rank, ranks)
    return shares


def to_native(config: ATokenConfig, shares: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The native weights from the Megatron weights of all tensor ranks, in their order.

    Raises:
        InputError: a name that the Megatron model does not have.
    """
    whole = {}
    for name in shares[0]:
        weight = from_megatron(name)
        whole[weight.native] = _join([share[name] for share in shares], weight, config)
    return whole


@torch.no_grad()
def load_native(model: nn.Module, native: Mapping[str, Tensor]) -> None:
    """Fill a `MegatronAToken` on this process from the weights of a native model, cast to its dtype.

    Args:
        native: all weights, on any device; those of another pipeline stage are left out.

    Raises:
        InputError: missing or unknown weights, or one of another shape.
    """
    config, ranks = _config(model), _tensor_ranks()
    targets = own_tensors(model)
    weights = {name: from_megatron(name) for name in targets}
    parts = {weight.part for weight in weights.values()}
    wanted = {weight.native for weight in weights.values()}
    given = {name for name in native if from_native(name).part in parts}
    for problem, names in (("lack", wanted - given), ("have no place for", given - wanted)):
        if names:
            whose = "weights" if problem == "lack" else "layers"
            raise InputError(f"the {whose} {problem} '{min(names)}' ({len(names)} in all); is it another model's file?")
    for name, target in targets.items():
        weight = weights[name]
        whole = native[weight.native]
        if weight.heads and whole.shape[0] % (3 * stacks(config)[weight.part].heads):
            raise InputError(f"{weight.native} has shape {tuple(whole.shape)}, which is not 3 x heads x width")
        share = _share(_heads_first(whole, weight, config), weight, *ranks)
        if share.shape != target.shape:
            raise InputError(f"{weight.native} has shape {tuple(whole.shape)}, which does not fit {config.name}")
        target.copy_(share)


def native_state(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """All native weights, on every process; every process of a model's copy has to call it.

    Args:
        tensors: what to exchange instead of the model's weights, by the same names: gradients for example. They must
            be there for the same names on all tensor ranks.
    """
    from megatron.core import parallel_state

    config, group = _config(model), parallel_state.get_tensor_model_parallel_group()
    own = own_tensors(model) if tensors is None else tensors
    whole: dict[str, Tensor] = {}
    for name, tensor in own.items():
        weight = from_megatron(name)
        shares = [tensor.detach()]
        if weight.axis is not None and group.size() > 1:
            local = tensor.detach().contiguous()
            shares = [torch.empty_like(local) for _ in range(group.size())]
            dist.all_gather(shares, local, group=group)
        whole[weight.native] = _join(shares, weight, config).clone()
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return whole
    return _of_all_stages({name: tensor.cpu() for name, tensor in whole.items()})


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a `MegatronAToken` on this process, without what Transformer Engine keeps besides."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith("_extra_state")}


def mark_shares(model: nn.Module) -> None:
    """Tell Megatron which parameters are split over tensor ranks; without it gradient norms count them once only.

    Megatron does so when it draws the initial weights, and ours come from the native model.
    """
    for name, parameter in model.named_parameters():
        axis = from_megatron(name).axis
        parameter.tensor_model_parallel = axis is not None  # type: ignore[attr-defined]
        parameter.partition_dim = -1 if axis is None else axis  # type: ignore[attr-defined]
        parameter.partition_stride = 1  # type: ignore[attr-defined]


def _of_all_stages(own: dict[str, Tensor]) -> dict[str, Tensor]:
    from megatron.core import parallel_state

    stages: list[dict[str, Tensor] | None] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, own, group=parallel_state.get_pipeline_model_parallel_group())
    return {name: tensor for stage in stages if stage is not None for name, tensor in stage.items()}


def _share(tensor: Tensor, weight: Weight, rank: int, ranks: int) -> Tensor:
    return tensor if weight.axis is None else tensor.chunk(ranks, dim=weight.axis)[rank]


def _join(shares: Sequence[Tensor], weight: Weight, config: ATokenConfig) -> Tensor:
    whole = shares[0] if weight.axis is None else torch.cat(list(shares), dim=weight.axis)
    if not weight.heads:
        return whole
    heads = stacks(config)[weight.part].heads
    return _swapped(whole, (heads, 3, -1))


def _heads_first(tensor: Tensor, weight: Weight, config: ATokenConfig) -> Tensor:
    """Rows [3, heads, Dh] -> [heads, 3, Dh] of a qkv weight or bias; others as they are."""
    if not weight.heads:
        return tensor
    heads = stacks(config)[weight.part].heads
    return _swapped(tensor, (3, heads, -1))


def _swapped(rows: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """Rows [a, b, Dh] -> rows [b, a, Dh], both flattened."""
    swapped: Tensor = rows.unflatten(0, sizes).transpose(0, 1).flatten(0, 2)
    return swapped


def _config(model: nn.Module) -> ATokenConfig:
    config = model.network_config
    assert isinstance(config, ATokenConfig)
    return config


def _tensor_ranks() -> tuple[int, int]:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
