"""The released AToken format: its configuration keys and state-dict names, exactly, both ways (FORMAT 5, 8; manifests).

One table of name pairs serves import and export. Tensors are only renamed, never changed, so a round trip gives
identical bytes.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.model.config import ATokenConfig, FSQConfig, TransformerConfig

# (our name, released name); "*" is the block number. Prefixes of modules are enough: ".weight" and ".bias" follow.
_STACK = (
    ("transformer.embed", "input_layer"),
    ("transformer.positions.weight", "pos_embedder.position_embedding.weight"),
    ("transformer.blocks.*.attention_norm", "blocks.*.norm1"),
    ("transformer.blocks.*.mlp_norm", "blocks.*.norm2"),
    ("transformer.blocks.*.attention.qkv", "blocks.*.attn.to_qkv"),
    ("transformer.blocks.*.attention.out", "blocks.*.attn.to_out"),
    ("transformer.blocks.*.attention.query_norm.scale", "blocks.*.attn.q_rms_norm.gamma"),
    ("transformer.blocks.*.attention.key_norm.scale", "blocks.*.attn.k_rms_norm.gamma"),
    ("transformer.blocks.*.mlp.up", "blocks.*.mlp.mlp.0"),
    ("transformer.blocks.*.mlp.down", "blocks.*.mlp.mlp.2"),
)
NAMES: tuple[tuple[str, str], ...] = (
    *((f"encoder.{ours}", f"encoder.{theirs}") for ours, theirs in _STACK),
    ("encoder.transformer.norm", "encoder.post_layernorm"),
    ("encoder.pool.probe", "encoder.head.probe"),
    ("encoder.pool.query", "encoder.head.attention.to_q"),
    ("encoder.pool.key_value", "encoder.head.attention.to_kv"),
    ("encoder.pool.out", "encoder.head.attention.to_out"),
    ("encoder.pool.norm", "encoder.head.layernorm"),
    ("encoder.pool.mlp.up", "encoder.head.mlp.mlp.0"),
    ("encoder.pool.mlp.down", "encoder.head.mlp.mlp.2"),
    ("encoder.to_posterior", "proj"),
    *((f"decoder.{ours}", f"decoder.{theirs}") for ours, theirs in _STACK),
    ("decoder.transformer.norm", "decoder.out_norm"),
    ("decoder.to_patches", "decoder.out_layer"),
)
"""Every name of the network beside its released name."""

IGNORED_PREFIXES = ("lpips_loss.", "logit_scale", "logit_bias")
"""Parameters that released training classes carry along and no model needs (FORMAT 15.11), and the two constants of
similarities with texts, which are parameters in checkpoints of the first release (FORMAT 12)."""

_CONFIG_KEYS = frozenset(
    [
        "patch_size",
        "in_channels",
        "out_channels",
        "latent_channels",
        "use_decoder",
        "use_quantizer",
        "quantizer_type",
        "quantizer_codebook_size",
        "quantizer_num_codebooks",
        "quantizer_feature_dim",
        "quantizer_chunk_size",
    ]
) | {
    f"{side}_{key}"
    for side in ("encoder", "decoder")
    for key in [
        "model_channels",
        "num_blocks",
        "num_heads",
        "mlp_channels",
        "attn_mode",
        "window_size",
        "pe_mode",
        "qk_rms_norm",
        "use_bias",
        "use_rms_norm",
    ]
}
_SWALLOWED = frozenset({"class_name", "name"})
_TILE_FRAMES = 16
_POSITIONS = {"joint": (True, True), "learned": (True, False), "rope": (False, True)}


def _patterns(source: int) -> list[tuple[re.Pattern[str], str]]:
    patterns = []
    for pair in NAMES:
        before, after = pair[source], pair[1 - source]
        expression = re.escape(before).replace(r"\*", r"(\d+)")
        patterns.append((re.compile(rf"^{expression}(\.(?:weight|bias))?$"), after.replace("*", "{}")))
    return patterns


_TO_OURS, _TO_RELEASED = _patterns(1), _patterns(0)


def _rename(name: str, patterns: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in patterns:
        match = pattern.match(name)
        if match:
            *blocks, ending = match.groups()
            return target.format(*blocks) + (ending or "")
    return None


def rename_from_released(names: Iterable[str]) -> dict[str, str]:
    """Released name -> ours. A name that the table does not know keeps itself, so that loading can list it as extra."""
    kept = (name for name in names if not name.startswith(IGNORED_PREFIXES))
    return {name: _rename(name, _TO_OURS) or name for name in kept}


def rename_to_released(name: str) -> str:
    """Our name -> the released one; a name without a counterpart keeps itself."""
    return _rename(name, _TO_RELEASED) or name


def to_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under released names; the tensors are the same objects.

    Raises:
        InputError: a parameter that the released format has no name for (a linear code beside the transformers).
    """
    renamed = {name: _rename(name, _TO_RELEASED) for name in state}
    homeless = [name for name, target in renamed.items() if target is None]
    if homeless:
        raise InputError(
            f"the released format has no name for {', '.join(homeless[:4])}; only plain AToken can be exported"
        )
    return {cast(str, renamed[name]): tensor for name, tensor in state.items()}


def looks_released(names: Iterable[str]) -> bool:
    """Whether a state dict carries released names rather than ours."""
    return any(name in {"proj.weight", "encoder.input_layer.weight"} for name in names)


def config_from_released(released: Mapping[str, Any], name: str | None = None) -> ATokenConfig:
    """Translate a released configuration (YAML or JSON mapping).

    Args:
        released: the released keys. Missing ones take the value of the released so400m configuration.
        name: what to call the model; by default it is derived from the sizes.

    Raises:
        InputError: unknown keys, values of another type, or a choice that no released model uses (another attention
            mode, LFQ).
    """
    for key, value in released.items():
        _check_key(key, value)
    values = {**_RELEASED_DEFAULTS, **released}
    patch = tuple(values["patch_size"])
    if len(patch) != 3 or not all(isinstance(size, int) for size in patch):
        raise InputError(f"patch_size must have three numbers (frames, rows, columns), got {list(patch)}")
    features = patch[0] * patch[1] * patch[2] * 3
    for key in ("in_channels", "out_channels"):
        if values[key] != features:
            raise InputError(
                f"{key} {values[key]} does not fit patch_size {list(patch)}, which has {features} features"
            )
    return ATokenConfig(
        name=name or _default_name(values),
        patch_size=patch,
        latent_channels=values["latent_channels"],
        encoder=_stack(values, "encoder"),
        decoder=_stack(values, "decoder") if values["use_decoder"] else None,
        quantizer=_quantizer(values) if values["use_quantizer"] else None,
    )


def _check_key(key: str, value: Any) -> None:
    if key not in _CONFIG_KEYS | _SWALLOWED:
        near = difflib.get_close_matches(str(key), _CONFIG_KEYS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise InputError(f"unknown key '{key}' in the released configuration{hint}")
    known = _RELEASED_DEFAULTS.get(key)
    if known is not None and type(value) is not type(known):
        raise InputError(f"{key} must be like {json.dumps(known)}, got {json.dumps(value, default=str)}")


def config_to_released(config: ATokenConfig) -> dict[str, Any]:
    """The released keys of a configuration.

    Raises:
        InputError: a linear code beside the transformers, other tiles than 16 frames, or no positions at all: the
            released format has no key for them.
    """
    if config.skip is not None:
        raise InputError(
            f"{config.name} has a linear code beside the transformers, which the released format does not know"
        )
    if config.tile_frames != _TILE_FRAMES:
        raise InputError(
            f"{config.name} has tiles of {config.tile_frames} frames; the released format knows {_TILE_FRAMES} only"
        )
    released: dict[str, Any] = {
        **_RELEASED_DEFAULTS,
        "patch_size": list(config.patch_size),
        "in_channels": config.patch_features,
        "out_channels": config.patch_features,
        "latent_channels": config.latent_channels,
        "use_decoder": config.decoder is not None,
        "use_quantizer": config.quantizer is not None,
        "quantizer_feature_dim": config.latent_channels,
    }
    if config.quantizer is not None:
        released["quantizer_codebook_size"] = config.quantizer.codebook_size
        released["quantizer_num_codebooks"] = config.quantizer.codebooks
    for side, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        if stack is not None:
            released |= _stack_keys(side, stack)
    return released


def _stack(values: Mapping[str, Any], side: str) -> TransformerConfig:
    if values[f"{side}_attn_mode"] != "full":
        raise InputError(
            f"{side}_attn_mode '{values[f'{side}_attn_mode']}' is not supported; released models use 'full'"
        )
    mode = values[f"{side}_pe_mode"]
    if mode not in _POSITIONS:
        raise InputError(f"{side}_pe_mode '{mode}' is not supported; use one of {', '.join(_POSITIONS)}")
    learned, rotary = _POSITIONS[mode]
    return TransformerConfig(
        width=values[f"{side}_model_channels"],
        depth=values[f"{side}_num_blocks"],
        heads=values[f"{side}_num_heads"],
        mlp_width=values[f"{side}_mlp_channels"],
        norm="rms" if values[f"{side}_use_rms_norm"] else "layer",
        bias=values[f"{side}_use_bias"],
        qk_norm=values[f"{side}_qk_rms_norm"],
        learned_positions=learned,
        rotary=rotary,
    )


def _stack_keys(side: str, stack: TransformerConfig) -> dict[str, Any]:
    flags = (stack.learned_positions, stack.rotary)
    mode = next((name for name, known in _POSITIONS.items() if known == flags), None)
    if mode is None:
        raise InputError(f"the {side} has no positions at all, which the released format does not know")
    return {
        f"{side}_model_channels": stack.width,
        f"{side}_num_blocks": stack.depth,
        f"{side}_num_heads": stack.heads,
        f"{side}_mlp_channels": stack.mlp_width,
        f"{side}_pe_mode": mode,
        f"{side}_qk_rms_norm": stack.qk_norm,
        f"{side}_use_bias": stack.bias,
        f"{side}_use_rms_norm": stack.norm == "rms",
    }


def _quantizer(values: Mapping[str, Any]) -> FSQConfig:
    if values["quantizer_type"] != "fsq":
        raise InputError(f"quantizer_type '{values['quantizer_type']}' is not supported; released models use 'fsq'")
    if values["quantizer_chunk_size"] != 1:
        raise InputError(
            f"quantizer_chunk_size {values['quantizer_chunk_size']} is not supported; released models use 1"
        )
    if values["quantizer_feature_dim"] != values["latent_channels"]:
        raise InputError(
            f"quantizer_feature_dim {values['quantizer_feature_dim']} differs from latent_channels "
            f"{values['latent_channels']}; released models have them equal"
        )
    return FSQConfig(codebook_size=values["quantizer_codebook_size"], codebooks=values["quantizer_num_codebooks"])


def _default_name(values: Mapping[str, Any]) -> str:
    size = "so400m" if values["encoder_model_channels"] == 1152 else f"w{values['encoder_model_channels']}"
    stage = "" if values["latent_channels"] == 48 else f"-{values['latent_channels']}ch"
    return f"atoken-{size}-{'d' if values['use_quantizer'] else 'c'}{stage}"


_RELEASED_DEFAULTS: dict[str, Any] = {
    "patch_size": [4, 16, 16],
    "in_channels": 3072,
    "out_channels": 3072,
    "latent_channels": 48,
    **{
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {
            "model_channels": 1152,
            "num_blocks": 27,
            "num_heads": 16,
            "mlp_channels": 4304,
            "attn_mode": "full",
            "window_size": 8,
            "pe_mode": "joint",
            "qk_rms_norm": side == "decoder",
            "use_bias": side == "encoder",
            "use_rms_norm": side == "decoder",
        }.items()
    },
    "use_decoder": True,
    "use_quantizer": False,
    "quantizer_type": "fsq",
    "quantizer_codebook_size": 65536,
    "quantizer_num_codebooks": 1,
    "quantizer_feature_dim": 48,
    "quantizer_chunk_size": 1,
}
