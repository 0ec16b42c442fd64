"""Which layers compute in FP8, and why each of the others does not.

The layers that may are Megatron's list (`tokenizer.megatron.fp8`), read under their native names: qkv, attention
output and both MLP layers of every block, where FP8 has most of the work and its errors pass through a residual stream.
`_EXCEPTIONS` is the reason for everything else. A width that is no multiple of 16 is an exception here, not an error as
in Megatron: the layer just stays bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from tokenizer.errors import InputError
from tokenizer.fp8.config import FP8Config
from tokenizer.megatron.fp8 import FP8_MULTIPLE, fp8_layers
from tokenizer.megatron.names import from_megatron
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import ATokenConfig
from tokenizer.model.piecewise import LinearCodes
from tokenizer.model.transformer import Attention

_EXCEPTIONS = (
    ("*.blocks.*.attention", "attention itself: FP8 kernels take no heads of 72 channels"),
    ("encoder.transformer.embed", "patch embedding: reads pixels"),
    ("decoder.transformer.embed", "latent embedding: reads latents, and is little work"),
    ("encoder.pool*", "pooling head: compared with texts, and little work"),
    ("encoder.to_posterior", "posterior: sampled and decoded, errors would be errors of the latents"),
    ("decoder.to_patches", "output layer: writes pixels"),
    ("skip.links.*", "links of the codes: changes of latents"),
    ("skip.*", "skip codes: chosen by near ties"),
)
"""Name in the autoencoder (with *), and why it stays. The first that fits counts."""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One product of the model.

    name: of its module. shape: (outputs, inputs) of a linear layer; (heads, head width) of attention; (codes, channels,
    features) of linear codes. kind: which of the three. decision: what it computes in. reason: why.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["linear", "attention", "codes"]
    decision: Literal["fp8", "bf16", "fp32"]
    reason: str

    @property
    def weights(self) -> int:
        """How many weights a linear layer multiplies with; 0 for the other kinds."""
        return math.prod(self.shape) if self.kind == "linear" else 0


def plan(model: nn.Module, config: FP8Config) -> list[LayerPlan]:
    """What `convert` would do with every layer of a model that multiplies matrices, in the model's order.

    Args:
        model: an `ATokenNetwork`, or a module with one inside; layers outside of it stay. May be on the meta device.

    Raises:
        InputError: no `ATokenNetwork`, a pattern of `keep` that no FP8 layer has, or nothing left to convert.
    """
    prefix, network = _network(model)
    every = _native_names(network.config, FP8Config())
    wanted = _native_names(network.config, config)
    for pattern in config.keep:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise InputError(
                f"fp8.keep: no FP8 layer is called '{pattern}'; they are called like '{every[-1] if every else None}'"
            )
    rows = []
    for name, module in model.named_modules():
        measured = _measure(module)
        if measured is None:
            continue
        kind, shape = measured
        inside = name.removeprefix(prefix) if name.startswith(prefix) else None
        reason = _reason_to_stay(inside, shape, every, wanted, config.keep)
        otherwise: Literal["bf16", "fp32"] = "fp32" if kind == "codes" else "bf16"
        rows.append(LayerPlan(name, shape, kind, otherwise if reason else "fp8", reason or "linear layer of a block"))
    if not any(row.decision == "fp8" for row in rows):
        raise InputError(
            f"FP8 would convert no layer of {network.config.name}: of {len(every)} in blocks none has widths that are "
            f"multiples of {FP8_MULTIPLE} and is not kept; train without FP8, or keep fewer"
        )
    return rows


def _network(model: nn.Module) -> tuple[str, ATokenNetwork]:
    """The autoencoder in a model, and what its names begin with there."""
    for name, module in model.named_modules():
        if isinstance(module, ATokenNetwork):
            return (f"{name}." if name else ""), module
    raise InputError(f"FP8 needs a model with an ATokenNetwork in it, got {type(model).__name__}")


def _native_names(network: ATokenConfig, config: FP8Config) -> list[str]:
    """Native names of the layers that would run in FP8 in Megatron with the same options."""
    layers = fp8_layers(network, config.megatron())
    return [from_megatron(f"{name}.weight").native.removesuffix(".weight") for name in layers]


def _measure(module: nn.Module) -> tuple[Literal["linear", "attention", "codes"], tuple[int, ...]] | None:
    """Kind and shape of a module that multiplies matrices itself; None for any other."""
    if isinstance(module, nn.Linear):
        return "linear", (module.out_features, module.in_features)
    if isinstance(module, Attention):
        return "attention", (module.heads, module.head_width)
    if isinstance(module, LinearCodes):
        return "codes", tuple(module.encoder.shape)
    return None


def _reason_to_stay(
    name: str | None, shape: tuple[int, ...], every: list[str], wanted: list[str], keep: tuple[str, ...]
) -> str | None:
    """Why a layer stays in bfloat16; None for one that computes in FP8. `name` is that in the autoencoder."""
    if name is None:
        return "outside the autoencoder"
    if name not in every:
        return next((reason for pattern, reason in _EXCEPTIONS if fnmatchcase(name, pattern)), "not in a block")
    if any(size % FP8_MULTIPLE for size in shape):
        return f"{shape[0]} x {shape[1]}: FP8 needs multiples of {FP8_MULTIPLE}"
    if name not in wanted:
        return "kept by num_layers_at_start_in_bf16 or num_layers_at_end_in_bf16"
    return "kept by fp8.keep" if any(fnmatchcase(name, pattern) for pattern in keep) else None
