"""Two steps in one kernel where CUDA has one: a linear layer and its GELU, without gradients.

cuBLASLt applies the GELU to what it has in registers, so that the widest activations of a block are written once and
not read again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


# For compilers alone, which would take the operation apart otherwise; calling it through here takes longer.
@torch.library.custom_op("atoken::linear_gelu", mutates_args=())
def _opaque(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


@_opaque.register_fake
def _shape(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG001 - the signature is the operation's
    return x.new_empty(x.shape[0], weight.shape[0])


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """gelu(layer(x)) with the tanh approximation, [N, inputs] -> [N, outputs]."""
    if _fits(layer, x):
        assert isinstance(layer, nn.Linear)
        bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(layer.out_features)
        if torch.compiler.is_compiling():
            return _opaque(x, layer.weight, bias)  # type: ignore[no-any-return]
        return torch._addmm_activation(bias, x, layer.weight.t(), use_gelu=True)
    return F.gelu(layer(x), approximate="tanh")


def _fits(layer: nn.Module, x: Tensor) -> bool:
    # Layers of other kinds (FP8) compute otherwise, and autocast has types of its own.
    if type(layer) is not nn.Linear or x.device.type != "cuda" or x.dtype not in _HALF or x.ndim != 2 or not len(x):
        return False
    if layer.weight.dtype != x.dtype or torch.is_autocast_enabled("cuda"):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *layer.parameters())))
