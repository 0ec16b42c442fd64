"""The released Gaussian decoder format: configuration keys and state-dict names, exactly, both ways (FORMAT 5, 11)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.gaussians.config import GaussianDecoderConfig
from tokenizer.gaussians.decoder import GaussianDecoder
from tokenizer.released import IGNORED_PREFIXES

_SIZES = {
    "model_channels": "width",
    "num_blocks": "depth",
    "num_heads": "heads",
    "mlp_channels": "mlp_width",
    "latent_channels": "inputs",
    "window_size": "window",
    "resolution": "resolution",
}
_CONSTANTS = {
    "num_gaussians": "gaussians",
    "voxel_size": "voxel_size",
    "3d_filter_kernel_size": "minimum_scale",
    "scaling_bias": "initial_scale",
    "opacity_bias": "initial_opacity",
}
_FIXED = {"attn_mode": "swin", "perturb_offset": True, "scaling_activation": "softplus"}
_UNUSED = frozenset({"class_name", "name", "2d_filter_kernel_size"})
_FACTORS = ("_xyz", "_features_dc", "_scaling", "_rotation", "_opacity")
_BLOCK = {
    "attention_norm.weight": "norm1.weight",
    "mlp_norm.weight": "norm2.weight",
    "attention.qkv.weight": "attn.to_qkv.weight",
    "attention.out.weight": "attn.to_out.weight",
    "mlp.up.weight": "mlp.mlp.0.weight",
    "mlp.down.weight": "mlp.mlp.2.weight",
}


def released_names(depth: int) -> dict[str, str]:
    """Our name -> released name of every tensor of a decoder with `depth` blocks."""
    blocks = {f"blocks.{n}.{ours}": f"blocks.{n}.{theirs}" for n in range(depth) for ours, theirs in _BLOCK.items()}
    return {
        "offset_perturbation": "offset_perturbation",
        "embed.weight": "input_layer.weight",
        **blocks,
        "to_gaussians.weight": "out_layer.weight",
        "to_gaussians.bias": "out_layer.bias",
    }


def config_from_released(released: Mapping[str, Any]) -> GaussianDecoderConfig:
    """Translate a released configuration (YAML or JSON mapping); missing keys take the released values.

    Raises:
        InputError: unknown keys, or a choice that no released model uses.
    """
    representation = released.get("representation_config", {})
    factors = {name: 0.1 if name == "_rotation" else 1.0 for name in _FACTORS} | dict(representation.get("lr", {}))
    top = {key: value for key, value in released.items() if key != "representation_config"}
    below = {key: value for key, value in representation.items() if key != "lr"}
    _refuse_unknown(top, {*_SIZES, "attn_mode", *_UNUSED}, "configuration")
    _refuse_unknown(below, {*_CONSTANTS, *_FIXED, *_UNUSED}, "representation_config")
    _refuse_unknown(factors, set(_FACTORS), "representation_config.lr")
    for key, value in {**top, **below}.items():
        if key in _FIXED and value != _FIXED[key]:
            raise InputError(f"{key} '{value}' is not supported; the released Gaussian decoder has '{_FIXED[key]}'")
    names = {**_SIZES, **_CONSTANTS}
    values = {names[key]: value for key, value in {**top, **below}.items() if key in names}
    return GaussianDecoderConfig(**values, factors=tuple(float(factors[name]) for name in _FACTORS))  # type: ignore[arg-type]


def config_to_released(config: GaussianDecoderConfig) -> dict[str, Any]:
    """The released keys of a configuration.

    Raises:
        InputError: a decoder with a skip, which the released format does not know.
    """
    if config.skip:
        raise InputError("a Gaussian decoder with a skip has no released form")
    return {
        **{key: getattr(config, ours) for key, ours in _SIZES.items()},
        "attn_mode": _FIXED["attn_mode"],
        "representation_config": {
            "lr": dict(zip(_FACTORS, config.factors, strict=True)),
            "perturb_offset": True,
            **{key: getattr(config, ours) for key, ours in _CONSTANTS.items()},
            "scaling_activation": _FIXED["scaling_activation"],
        },
    }


def load_released(decoder: GaussianDecoder, state: Mapping[str, Tensor]) -> None:
    """Load released weights into `decoder`, in its dtype and on its device.

    Training-only `lpips_loss.*` weights, which the released file may carry, are left out (FORMAT 15.11).

    Raises:
        InputError: missing or unknown names, or shapes that do not fit.
    """
    names = {theirs: ours for ours, theirs in released_names(decoder.config.depth).items()}
    given = {name: tensor for name, tensor in state.items() if not name.startswith(IGNORED_PREFIXES)}
    for what, odd in (("lack", names.keys() - given.keys()), ("have no place for", given.keys() - names.keys())):
        if odd:
            listed = ", ".join(sorted(odd)[:4]) + (f" and {len(odd) - 4} more" if len(odd) > 4 else "")
            subject = "the weights" if what == "lack" else "these sizes"
            raise InputError(f"{subject} {what} {listed}; is this a Gaussian decoder of depth {decoder.config.depth}?")
    own = decoder.state_dict()
    for theirs, ours in names.items():
        if given[theirs].shape != own[ours].shape:
            raise InputError(f"{theirs} has shape {tuple(given[theirs].shape)}, the decoder {tuple(own[ours].shape)}")
    decoder.load_state_dict({ours: given[theirs] for theirs, ours in names.items()})


def to_released(decoder: GaussianDecoder) -> dict[str, Tensor]:
    """The state dict of `decoder` under released names; the tensors are the same objects."""
    names = released_names(decoder.config.depth)
    return {names[ours]: tensor for ours, tensor in decoder.state_dict().items()}


def _refuse_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise InputError(f"unknown key '{key}' in the {where} of a Gaussian decoder{hint}")
