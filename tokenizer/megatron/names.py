"""Names of the same weight in the native and the Megatron model: one table, read both ways.

`PART` stands for encoder and decoder, `N` for the number of a block, `*` for the rest of a name. A weight with `axis`
is split along it over tensor ranks; all others are whole on each. `heads` marks qkv: natively its rows are
[3, heads, Dh], in Megatron [heads, 3, Dh], so that a contiguous share of them is a share of the heads.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from tokenizer.errors import InputError


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    native: str
    megatron: str
    axis: int | None = None
    heads: bool = False


_BLOCK = "PART.transformer.blocks.N"
_LAYER = "PART.block.layers.N"

TABLE = (
    Row("PART.transformer.embed.*", "PART.embed.*"),
    Row("PART.transformer.positions.weight", "PART.positions.weight"),
    Row(f"{_BLOCK}.attention_norm.*", f"{_LAYER}.input_layernorm.*"),
    Row(f"{_BLOCK}.attention.qkv.weight", f"{_LAYER}.self_attention.linear_qkv.weight", axis=0, heads=True),
    Row(f"{_BLOCK}.attention.qkv.bias", f"{_LAYER}.self_attention.linear_qkv.bias", axis=0, heads=True),
    Row(f"{_BLOCK}.attention.query_norm.scale", f"{_LAYER}.self_attention.core_attention.query_norm.scale", axis=0),
    Row(f"{_BLOCK}.attention.key_norm.scale", f"{_LAYER}.self_attention.core_attention.key_norm.scale", axis=0),
    Row(f"{_BLOCK}.attention.out.weight", f"{_LAYER}.self_attention.linear_proj.weight", axis=1),
    Row(f"{_BLOCK}.attention.out.bias", f"{_LAYER}.self_attention.linear_proj.bias"),
    Row(f"{_BLOCK}.mlp_norm.*", f"{_LAYER}.pre_mlp_layernorm.*"),
    Row(f"{_BLOCK}.mlp.up.weight", f"{_LAYER}.mlp.linear_fc1.weight", axis=0),
    Row(f"{_BLOCK}.mlp.up.bias", f"{_LAYER}.mlp.linear_fc1.bias", axis=0),
    Row(f"{_BLOCK}.mlp.down.weight", f"{_LAYER}.mlp.linear_fc2.weight", axis=1),
    Row(f"{_BLOCK}.mlp.down.bias", f"{_LAYER}.mlp.linear_fc2.bias"),
    Row("PART.transformer.norm.*", "PART.block.final_layernorm.*"),
    Row("encoder.pool.*", "encoder.pool.*"),
    Row("encoder.to_posterior.weight", "encoder.to_posterior.weight"),
    Row("decoder.to_patches.weight", "decoder.to_patches.weight"),
    Row("skip.*", "skip.*"),
    Row("refiner.*", "refiner.*"),
)

ENGINE_NAMES = {
    "input_layernorm": "self_attention.linear_qkv.layer_norm",
    "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm",
}
"""Where Transformer Engine's fused layers keep a local layer's norms: `NORM.weight` is `LAYER.layer_norm_weight`."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight: its two names, and how it is split and ordered (see `Row`)."""

    native: str
    megatron: str
    axis: int | None
    heads: bool

    @property
    def part(self) -> str:
        """encoder, decoder, skip or refiner."""
        return self.native.split(".")[0]


def from_native(name: str) -> Weight:
    """The weight with this native name.

    Raises:
        InputError: a name that the table does not have.
    """
    return _find(name, "native")


def from_megatron(name: str) -> Weight:
    """The weight with this name in a Megatron model of either kind of layer.

    Raises:
        InputError: a name that the table does not have.
    """
    for local, fused in ENGINE_NAMES.items():
        name = name.replace(f".{fused}_", f".{local}.")
    return _find(name, "megatron")


def engine_name(megatron: str) -> str:
    """The name that a local layer's weight has with Transformer Engine."""
    for local, fused in ENGINE_NAMES.items():
        megatron = megatron.replace(f".{local}.", f".{fused}_")
    return megatron


@functools.cache
def _find(name: str, side: str) -> Weight:
    for row in TABLE:
        template, other = (row.native, row.megatron) if side == "native" else (row.megatron, row.native)
        match = re.fullmatch(_pattern(template), name)
        if match is not None:
            found = match.groupdict()
            for symbol, group in (("PART", "part"), ("N", "number"), ("*", "rest")):
                if group in found:
                    other = _replace_field(other, symbol, found[group])
            native, megatron = (name, other) if side == "native" else (other, name)
            return Weight(native, megatron, row.axis, row.heads)
    raise InputError(f"no weight is called '{name}' in the {side} model; see tokenizer/megatron/names.py")


def _replace_field(template: str, symbol: str, value: str) -> str:
    return ".".join(value if field == symbol else field for field in template.split("."))


@functools.cache
def _pattern(template: str) -> str:
    fields = {"PART": "(?P<part>encoder|decoder)", "N": r"(?P<number>\d+)", "*": r"(?P<rest>.+)"}
    return r"\.".join(fields.get(field, re.escape(field)) for field in template.split("."))
