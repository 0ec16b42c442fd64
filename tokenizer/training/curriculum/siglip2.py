"""The encoder from SigLIP 2 vision weights (PAPER 1): one table of names.

The patch layer, which knows one frame, is extended in time with zeros: frame 0 of a patch is read as SigLIP 2 reads an
image, later frames do not matter at first. Position table, blocks, final norm and attention pool are taken over; the
layer that writes the posterior is AToken's own. So is the 4D rotation in every attention layer, which has no weights:
without it the encoder gives what SigLIP 2 gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.model.encoder import Encoder
from tokenizer.model.positions import GRID
from tokenizer.patches import PatchSize
from tokenizer.text.folder import load_frozen, read_kind

_WHOLE = {
    "embeddings.patch_embedding.": "transformer.embed.",
    "embeddings.position_embedding.weight": "transformer.positions.weight",
    "post_layernorm.": "transformer.norm.",
    "head.probe": "pool.probe",
    "head.attention.out_proj.": "pool.out.",
    "head.layernorm.": "pool.norm.",
    "head.mlp.fc1.": "pool.mlp.up.",
    "head.mlp.fc2.": "pool.mlp.down.",
}
_BLOCK = {
    "layer_norm1.": "attention_norm.",
    "layer_norm2.": "mlp_norm.",
    "self_attn.out_proj.": "attention.out.",
    "mlp.fc1.": "mlp.up.",
    "mlp.fc2.": "mlp.down.",
}
"""Beginnings of names in transformers and here. Queries, keys and values lie together here and are joined apart."""


@torch.no_grad()
def start_from_siglip2(encoder: Encoder, patch_size: PatchSize, folder: str | Path) -> None:
    """Fill an encoder of the same shape.

    Args:
        encoder: `to_posterior` keeps its weights.
        patch_size: of its model.
        folder: a local folder with a SigLIP 2 (NaFlex) checkpoint as transformers saves it; a whole one will do.

    Raises:
        InputError: another checkpoint, or sizes that differ.
    """
    kind = read_kind(folder)
    if not kind.startswith("siglip2"):
        raise InputError(f"{folder}: holds a '{kind}'; the encoder starts from SigLIP 2 NaFlex vision weights")
    tower = load_frozen(folder, "Siglip2VisionModel", "starting from SigLIP 2", torch.float32)
    found = encoder_state(tower.state_dict())
    own = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("to_posterior.")}
    frame = found["transformer.embed.weight"]
    wide = own["transformer.embed.weight"].shape[1]
    if frame.shape[1] * patch_size[0] != wide:
        side = round((frame.shape[1] / 3) ** 0.5)
        raise InputError(
            f"{folder}: reads patches of {side}x{side} pixels, this model of {patch_size[1]}x{patch_size[2]}; take the "
            "checkpoint with its patches"
        )
    found["transformer.embed.weight"] = torch.nn.functional.pad(frame, (0, wide - frame.shape[1]))
    table = found["transformer.positions.weight"]
    if len(table) != GRID * GRID:
        raise InputError(f"{folder}: has {len(table)} positions; the encoder's table has {GRID} x {GRID}")
    odd = sorted(own.keys() ^ found.keys())
    odd += [
        f"{name} {list(found[name].shape)}, not {list(own[name].shape)}"
        for name in own.keys() & found.keys()
        if found[name].shape != own[name].shape
    ]
    if odd:
        raise InputError(f"{folder}: its vision tower is no encoder of this model: {', '.join(sorted(odd)[:3])}")
    encoder.load_state_dict(found, strict=False)


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `Siglip2VisionModel` under the names of `Encoder`, the patch layer still of one frame."""
    result: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for full, tensor in state.items():
        name = full.removeprefix("vision_model.")
        block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
        if block is not None:
            _take_block(f"transformer.blocks.{block[1]}.", block[2], tensor, result, joined)
        elif name.startswith("head.attention.in_proj_"):
            leaf = name.removeprefix("head.attention.in_proj_")
            query, key_value = tensor.split([len(tensor) // 3, len(tensor) // 3 * 2])
            result[f"pool.query.{leaf}"], result[f"pool.key_value.{leaf}"] = query, key_value
        else:
            ours = _renamed(name, _WHOLE)
            result[ours] = tensor.flatten() if ours == "pool.probe" else tensor
    for name, parts in joined.items():
        result[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return result


def _take_block(
    prefix: str, name: str, tensor: Tensor, result: dict[str, Tensor], joined: dict[str, dict[str, Tensor]]
) -> None:
    projection = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", name)
    if projection is not None:
        joined.setdefault(f"{prefix}attention.qkv.{projection[2]}", {})[projection[1]] = tensor
    else:
        result[prefix + _renamed(name, _BLOCK)] = tensor


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for theirs, ours in table.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise InputError(f"a SigLIP 2 vision tower has no weight '{name}'; this checkpoint is of another kind")
