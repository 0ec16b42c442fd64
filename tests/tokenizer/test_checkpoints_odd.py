"""Model files that are not as we write them, and folders that held another model before."""

from __future__ import annotations

import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import TINY_GAUSSIANS
from tests.tokenizer.test_checkpoints import CONFIGS, contents, random_model, refused, same_bytes
from tokenizer import AToken, checkpoints
from tokenizer.gaussians import GaussianDecoder
from tokenizer.patches import visuals_to_tokens
from tokenizer.released import config_to_released, to_released
from tokenizer.tensorio import write_pt
from tokenizer.text.alignment import AlignmentConfig, TextAlignment

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


# ---------------------------------------------------------------------- a folder that held another model


def complete(seed: int) -> AToken:
    """A model with a Gaussian decoder and a text alignment."""
    model = random_model(CONFIGS["continuous"])
    inputs = CONFIGS["continuous"].patch_size[1] * CONFIGS["continuous"].patch_size[2] * 3
    decoder = GaussianDecoder(replace(TINY_GAUSSIANS, inputs=inputs))
    decoder.reset_parameters(torch.Generator().manual_seed(seed))
    model.use_gaussian_decoder(decoder)
    config = AlignmentConfig(width=32, text_width=8, tower="minilm", tower_name="some tower")
    alignment = TextAlignment(config)
    alignment.reset_parameters(torch.Generator().manual_seed(seed))
    model.text_alignment = alignment
    return model


def lacking(*parts: str) -> AToken:
    model = complete(seed=2)
    for part in parts:
        setattr(model, part, None)
    return model


@pytest.mark.parametrize("parts", [("gaussian_decoder",), ("text_alignment",), ("gaussian_decoder", "text_alignment")])
def test_saving_takes_no_parts_over_from_an_earlier_model(tmp_path: Path, parts: tuple[str, ...]) -> None:
    complete(seed=1).save_pretrained(tmp_path)
    model = lacking(*parts)
    model.save_pretrained(tmp_path)
    loaded = AToken.from_pretrained(tmp_path)
    for part in ("gaussian_decoder", "text_alignment"):
        mine, found = getattr(model, part), getattr(loaded, part)
        assert (found is None) == (part in parts)
        assert mine is None or same_bytes(found.state_dict(), mine.state_dict())
    folders = {"gaussian_decoder": "gaussians", "text_alignment": "text_alignment"}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        folder for part, folder in folders.items() if part not in parts
    }
    assert not list(tmp_path.rglob(".*"))


def test_files_of_others_stay_when_parts_go(tmp_path: Path) -> None:
    complete(seed=1).save_pretrained(tmp_path / "other")
    linked = contents(tmp_path / "other")
    complete(seed=1).save_pretrained(tmp_path / "model")
    (tmp_path / "model/gaussians/notes.txt").write_text("mine")
    shutil.rmtree(tmp_path / "model/text_alignment")
    (tmp_path / "model/text_alignment").symlink_to(tmp_path / "other/text_alignment")
    lacking("gaussian_decoder", "text_alignment").save_pretrained(tmp_path / "model")
    assert sorted(contents(tmp_path / "model")) == ["config.json", "gaussians/notes.txt", "model.safetensors"]
    assert not (tmp_path / "model/text_alignment").is_symlink()
    assert contents(tmp_path / "other") == linked
    loaded = AToken.from_pretrained(tmp_path / "model")
    assert (loaded.gaussian_decoder, loaded.text_alignment) == (None, None)


def test_a_model_that_cannot_be_saved_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete(seed=1).save_pretrained(tmp_path)
    before = contents(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        lacking("gaussian_decoder", "text_alignment").save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_half_a_part_is_refused(tmp_path: Path) -> None:
    for part in ("gaussians", "text_alignment"):
        complete(seed=1).save_pretrained(tmp_path)
        (tmp_path / part / "config.json").unlink()
        assert "config.json is missing" in refused(lambda: AToken.from_pretrained(tmp_path))
        complete(seed=1).save_pretrained(tmp_path)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_models_can_be_read_by_whom_the_system_lets(tmp_path: Path, mask: int, mode: int) -> None:
    """The safetensors library makes files for their owner alone."""
    model = random_model(CONFIGS["continuous"])
    before = os.umask(mask)
    try:
        model.save_pretrained(tmp_path / "model")
        model.export_released(tmp_path / "released.safetensors")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {path.name: mode for path in files}


def test_what_stands_beside_a_model_goes_where_it_goes() -> None:
    """To another device, as decoding and zero-shot need it; in types of its own."""
    model = AToken.from_pretrained("atoken-nano")
    parts = (model.gaussian_decoder, model.text_alignment)
    types = [{p.dtype for p in part.parameters()} for part in parts if part is not None]
    assert len(types) == 2
    assert model.to("meta", torch.float16) is model
    for part, expected in zip(parts, types, strict=True):
        assert part is not None
        assert {p.device.type for p in part.parameters()} == {"meta"}
        assert {p.dtype for p in part.parameters()} == expected


@pytest.mark.parametrize("name", ["atoken-nano", "atoken-nano-d"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_model_on_meta_tells_shapes(name: str, gradients: bool) -> None:
    """As those need it who count operations or plan memory before they have any."""
    real = AToken.from_pretrained(name)
    model = AToken.from_pretrained(name, device="meta")
    assert model.fingerprint == real.fingerprint
    tokens, _ = visuals_to_tokens([torch.zeros(33, 20, 3), torch.zeros(21, 16, 16, 3)])
    with torch.set_grad_enabled(gradients):
        encoding = model.encode(tokens.to("meta"))
        patches = model.decode(encoding.latents)
    assert (patches.device.type, patches.features.shape) == ("meta", tokens.features.shape)
    assert encoding.pooled.shape == (2, model.config.encoder.width)
    # Weights that are read later are weights like any.
    plain = AToken.from_pretrained(name, device="meta")
    plain.gaussian_decoder = plain.text_alignment = None
    plain.to_empty(device="cpu").load_state_dict({key: tensor * 1.5 for key, tensor in real.state_dict().items()})
    assert plain.fingerprint != real.fingerprint


def test_what_stands_beside_a_model_can_be_assigned(tmp_path: Path) -> None:
    """It becomes no submodule: the state dict stays that of the latent space."""
    given, model = AToken.from_pretrained("atoken-nano"), AToken.from_pretrained("atoken-nano")
    names = set(model.state_dict())
    for decoder, alignment in ((None, None), (given.gaussian_decoder, given.text_alignment)):
        model.gaussian_decoder, model.text_alignment = decoder, alignment
        assert model.gaussian_decoder is decoder
        assert model.text_alignment is alignment
        assert set(model.state_dict()) == names
        model.save_pretrained(tmp_path)
        loaded = AToken.from_pretrained(tmp_path)
        assert (loaded.gaussian_decoder is None, loaded.text_alignment is None) == (decoder is None, alignment is None)
