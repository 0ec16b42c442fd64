"""The name of a latent space follows the weights, however they are changed, and no change of precision."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tests.tokenizer.test_checkpoints import CONFIGS, random_model, same_bytes
from tokenizer import AToken, TokenFile
from tokenizer.errors import InputError


def load_copies(model: AToken) -> None:
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()})


def load_by_assigning(model: AToken) -> None:
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()}, assign=True)


def write_past_autograd(model: AToken) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def replace_one_parameter(model: AToken) -> None:
    model.encoder.to_posterior.weight = nn.Parameter(torch.zeros_like(model.encoder.to_posterior.weight))


def replace_a_module(model: AToken) -> None:
    old = model.encoder.to_posterior
    model.encoder.to_posterior = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)


@pytest.mark.parametrize(
    "change", [load_copies, load_by_assigning, write_past_autograd, replace_one_parameter, replace_a_module]
)
def test_changed_weights_are_another_latent_space(
    tiny_models: Path, tmp_path: Path, change: Callable[[AToken], None]
) -> None:
    model = AToken.from_pretrained(tiny_models / "atoken-nano", dtype=torch.float32)
    picture = np.zeros((16, 16, 3), np.uint8)
    model.encode_image(picture).save(tmp_path / "before.atok")
    before = model.fingerprint
    change(model)
    assert model.fingerprint != before
    encoding = model.encode_image(picture)
    assert encoding.origin.fingerprint == model.fingerprint
    with pytest.raises(InputError, match="latent space"):
        model.decode_visual(TokenFile.load(tmp_path / "before.atok"))
    # The digest that a float16 copy keeps is the new one too.
    model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert AToken.from_pretrained(tmp_path / "half").fingerprint == model.fingerprint


@pytest.mark.parametrize("order", [("half", "float", "bfloat16"), ("bfloat16", "half", "double")])
def test_changes_of_precision_are_none(tiny_models: Path, order: tuple[str, ...]) -> None:
    model = AToken.from_pretrained(tiny_models / "atoken-nano", dtype=torch.float32)
    name = model.fingerprint
    for precision in order:
        model = copy.deepcopy(getattr(model, precision)())
        assert model.fingerprint == name, precision
    model = AToken.from_pretrained(tiny_models / "atoken-nano", dtype=torch.float32)
    model.encoder.half()  # a part of it alone
    assert model.fingerprint == name


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_weights_that_were_once_float16_keep_their_name_in_files_of_other_types(
    tiny_models: Path, tmp_path: Path, wide: torch.dtype
) -> None:
    first = AToken.from_pretrained(tiny_models / "atoken-nano", dtype=torch.float32)
    first.encoder.to_posterior.weight.data.mul_(1.1)  # to values that float16 rounds
    half, again = tmp_path / "half", tmp_path / "again"
    first.save_pretrained(half, dtype=torch.float16)
    AToken.from_pretrained(half).save_pretrained(again, dtype=wide)  # rounded twice
    assert AToken.from_pretrained(again).fingerprint == first.fingerprint
    AToken.from_pretrained(half, dtype=wide).save_pretrained(tmp_path / "more")
    AToken.from_pretrained(tmp_path / "more").save_pretrained(again)
    assert AToken.from_pretrained(again).fingerprint == first.fingerprint
    # Not so if other tools changed the weights and kept what is said of them.
    opener: Any = safe_open
    metadata = opener(str(again / "model.safetensors"), framework="pt").metadata()
    state = load_file(again / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in state.items()}, again / "model.safetensors", metadata=metadata)
    assert AToken.from_pretrained(again).fingerprint != first.fingerprint


def test_compiled_parts_are_saved_under_the_names_of_files(tmp_path: Path) -> None:
    """`torch.compile(part)` wraps a part in another module, whose state has names of its own."""
    model = random_model(CONFIGS["continuous"])
    plain, name = copy.deepcopy(model), model.fingerprint
    blocks = model.encoder.transformer.blocks
    compiled: Any = functools.partial(torch.compile, backend="eager")
    blocks[0], model.decoder = compiled(blocks[0]), compiled(model.decoder)
    assert any("_orig_mod" in key for key in model.state_dict())
    assert model.fingerprint == name
    model.save_pretrained(tmp_path / "model")
    model.export_released(tmp_path / "released.safetensors")
    for source in ("model", "released.safetensors"):
        loaded = AToken.from_pretrained(tmp_path / source)
        assert same_bytes(loaded.state_dict(), plain.state_dict())
        assert loaded.fingerprint == name
    # Weights that were trained since have the name that their file gets.
    blocks[0]._orig_mod.mlp.up.weight.data.mul_(1.5)  # type: ignore[union-attr, operator]
    model.save_pretrained(tmp_path / "model")
    assert model.fingerprint == AToken.from_pretrained(tmp_path / "model").fingerprint != name
