"""Model files that are not as we write them, and folders that held another model before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tokenizer.test_checkpoints import CONFIGS, random_model, refused, same_bytes
from tokenizer import AToken
from tokenizer.released import config_to_released, to_released
from tokenizer.tensorio import write_pt

NARROW = (torch.bfloat16, torch.float16)


def mixed(state: dict[str, Tensor], *dtypes: torch.dtype) -> dict[str, Tensor]:
    """Every tensor in another of these types, in turn."""
    return {name: tensor.to(dtypes[number % len(dtypes)]) for number, (name, tensor) in enumerate(state.items())}


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_the_first_release_had_constants_of_similarity_as_parameters(tmp_path: Path, ending: str) -> None:
    model = random_model(CONFIGS["continuous"])
    state = to_released(model.state_dict())
    plain = AToken.from_released(config_to_released(model.config), state)
    state |= {"logit_scale": torch.tensor([4.8438]), "logit_bias": torch.tensor([-15.5625])}
    path = tmp_path / f"model{ending}"
    write_pt(state, path) if ending == ".pt" else save_file(state, path)
    path.with_suffix(".json").write_text(json.dumps(config_to_released(model.config)))
    for loaded in (
        AToken.from_pretrained(path),
        AToken.from_pretrained(path, dtype=torch.float32),
        AToken.from_released(config_to_released(model.config), state),
    ):
        assert same_bytes(loaded.state_dict(), model.state_dict())
        assert loaded.fingerprint == plain.fingerprint
    with pytest.raises(ValueError, match=r"1 unexpected \(other_scale\)"):
        AToken.from_released(config_to_released(model.config), {**state, "other_scale": torch.zeros(1)})


@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [
        ((torch.bfloat16, torch.float32), torch.float32),
        (NARROW, torch.float32),  # neither holds the other
        ((torch.float32, torch.float64, torch.float16), torch.float64),
    ],
)
def test_weights_of_several_types_become_the_widest(
    tmp_path: Path, dtypes: tuple[torch.dtype, ...], widest: torch.dtype
) -> None:
    model = random_model(CONFIGS["continuous"])
    model.save_pretrained(tmp_path)
    state = mixed(load_file(tmp_path / "model.safetensors"), *dtypes)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AToken.from_pretrained(tmp_path)
    assert same_bytes(loaded.state_dict(), {name: tensor.to(widest) for name, tensor in state.items()})
    picture = torch.zeros(16, 16, 3)
    assert loaded.decode_visual(loaded.encode_image(picture)).shape == (1, 16, 16, 3)
    in_memory = AToken.from_released(config_to_released(model.config), to_released(state))
    assert same_bytes(in_memory.state_dict(), loaded.state_dict())
    chosen = AToken.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in chosen.state_dict().values()} == {torch.bfloat16}


def test_weights_of_types_that_mix_in_none(tmp_path: Path) -> None:
    random_model(CONFIGS["continuous"]).save_pretrained(tmp_path)
    state = mixed(load_file(tmp_path / "model.safetensors"), torch.float32, torch.float8_e4m3fn)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert refused(lambda: AToken.from_pretrained(tmp_path)) == (
        f"{tmp_path}/model.safetensors: weights are of several types (float32, float8_e4m3fn); say which one to load "
        "them in"
    )
