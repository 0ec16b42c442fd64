"""Full-size models have the parameters of the released ones: every name, every shape, every count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tokenizer.gaussians import GaussianDecoder, GaussianDecoderConfig
from tokenizer.gaussians import released as released_gaussians
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import BASE, NANO, SO400M_C, SO400M_C_STAGE1, SO400M_D, ATokenConfig
from tokenizer.released import IGNORED_PREFIXES, config_from_released, config_to_released, to_released

MANIFESTS = Path(__file__).parent.parent / "manifest"
RELEASED = {"atoken-soc": SO400M_C, "atoken-sod": SO400M_D, "atoken-soc-s1": SO400M_C_STAGE1}


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((MANIFESTS / f"{name}.json").read_text())
    return loaded


def on_meta(config: ATokenConfig) -> ATokenNetwork:
    with torch.device("meta"):
        return ATokenNetwork(config)


def count(module: nn.Module | None) -> int:
    assert module is not None
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", RELEASED)
def test_every_key_and_shape(name: str) -> None:
    tensors = to_released(on_meta(RELEASED[name]).state_dict())
    expected = manifest(name)["tensors"]
    assert {key: list(tensor.shape) for key, tensor in tensors.items()} == {
        key: entry["shape"] for key, entry in expected.items()
    }
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}


@pytest.mark.parametrize("name", RELEASED)
def test_counts(name: str) -> None:
    network = on_meta(RELEASED[name])
    counts = manifest(name)["counts"]
    assert len(network.state_dict()) == counts["state_dict_keys"]
    assert count(network) == counts["parameters"] == counts["parameters_without_lpips"]
    assert count(network.encoder) - count(network.encoder.to_posterior) == counts["parameters_encoder"]
    assert count(network.encoder.pool) == counts["parameters_encoder_head"]
    assert count(network.encoder.to_posterior) == counts["parameters_proj"]
    assert count(network.decoder) == counts["parameters_decoder"]


@pytest.mark.parametrize("name", RELEASED)
def test_configuration_translates_both_ways(name: str) -> None:
    released = manifest(name)["config"]
    config = config_from_released(released, name=RELEASED[name].name)
    assert config == RELEASED[name]
    written = config_to_released(config)
    # Where there is no quantizer the released files keep its keys at defaults that mean nothing.
    meaningful = {key for key in released if released["use_quantizer"] or not key.startswith("quantizer_")}
    assert {key: written[key] for key in meaningful} == {key: released[key] for key in meaningful}


def test_counts_of_the_paper() -> None:
    """Section 1 rounds them to 800 M for So400m and 192 M for Base."""
    assert count(on_meta(SO400M_C)) == 845_738_048
    assert count(on_meta(BASE)) == 182_338_560
    assert count(on_meta(NANO)) <= 8_000_000


def gaussian_decoder() -> GaussianDecoder:
    with torch.device("meta"):
        return GaussianDecoder(GaussianDecoderConfig())


def test_gaussian_decoder() -> None:
    recorded = manifest("3d_decode_gs")
    tensors = released_gaussians.to_released(gaussian_decoder())
    expected = {
        key: entry["shape"] for key, entry in recorded["tensors"].items() if not key.startswith(IGNORED_PREFIXES)
    }
    assert {key: list(tensor.shape) for key, tensor in tensors.items()} == expected
    assert count(gaussian_decoder()) == recorded["counts"]["parameters_without_lpips"] == 85_887_424


def test_gaussian_configuration_translates_both_ways() -> None:
    released = {key: value for key, value in manifest("3d_decode_gs")["config"].items() if key != "class_name"}
    assert released_gaussians.config_from_released(released) == GaussianDecoderConfig()
    written = released_gaussians.config_to_released(GaussianDecoderConfig())
    del released["representation_config"]["2d_filter_kernel_size"]  # no part of the decoder reads it
    assert written == released
