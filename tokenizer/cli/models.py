"""What the commands need of models: which one, where it runs, in which precision, and what there is to say of it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tokenizer.api import AToken
from tokenizer.checkpoints import CONFIG_FILE, DTYPES, WEIGHTS_FILE, bundled_models
from tokenizer.config import config_to_dict, parse_config, read_mapping
from tokenizer.errors import InputError
from tokenizer.gaussians import GaussianDecoder
from tokenizer.model.attention import attention_backend
from tokenizer.model.config import ATokenConfig

PACKAGES = ("torch", "numpy", "pillow", "av", "safetensors", "flash-attn")


def load_model(name: str, device: str, dtype: str, *, discrete: bool) -> AToken:
    """Load the model that the options of a command name.

    Args:
        name: bundled name, folder, or released .pt / .safetensors file.
        device: "auto", or what torch calls a device.
        dtype: "auto", or a key of `DTYPES`.
        discrete: ask for codebook indices; a bundled continuous model is replaced by its discrete sibling.

    Raises:
        InputError: no such model or device, files that do not fit, or a continuous model for `discrete`.
    """
    place = choose_device(device)
    name = with_discrete(name, discrete=discrete)
    model = AToken.from_pretrained(name, device=place, dtype=choose_dtype(dtype, place))
    if discrete and model.quantizer is None:
        known = ", ".join(found for found, config in bundled_configs().items() if config.quantizer) or "none"
        raise InputError(f"--discrete: '{name}' is a continuous model; bundled discrete models: {known}")
    return model


def with_discrete(name: str, *, discrete: bool) -> str:
    """The model that is loaded: for `discrete` the discrete sibling of a bundled model that has one."""
    return f"{name}-d" if discrete and f"{name}-d" in bundled_models() else name


def choose_device(name: str) -> torch.device:
    """The device of that name; for "auto" CUDA where there is one, else the CPU.

    Raises:
        InputError: unknown or absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" makes tensors, but holds no values
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: cannot be used here; {_devices_here()}") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of that name; for "auto" bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def bundled_configs() -> dict[str, ATokenConfig]:
    """Configurations of the bundled models, by name."""
    return {
        name: parse_config(ATokenConfig, read_mapping(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
        for name, folder in bundled_models().items()
    }


def describe_config(config: ATokenConfig) -> dict[str, Any]:
    """Numbers of parameters and what a token is, without loading any weights."""
    with torch.device("meta"):
        network = AToken(config)
    kind = f"{network.quantizer.codebooks} x {network.quantizer.codebook_size} codes" if network.quantizer else None
    return {
        "latents": kind or f"{config.latent_channels} channels",
        "discrete": network.quantizer is not None,
        "patch": "x".join(map(str, config.patch_size)),
        "parameters": _count(network.state_dict()),
        "encoder_parameters": _count(network.encoder.state_dict()),
        "decoder_parameters": _count(network.decoder.state_dict()) if network.decoder else 0,
    }


def describe_models() -> list[dict[str, Any]]:
    """What `atoken models` lists."""
    return [
        {"name": name, **describe_config(config), "megabytes": _megabytes(bundled_models()[name] / WEIGHTS_FILE)}
        for name, config in bundled_configs().items()
    ]


def describe_model(model: AToken) -> dict[str, Any]:
    """What `atoken info --model` adds."""
    decoder = model.gaussian_decoder
    return {
        "name": model.config.name,
        "latent_space": model.fingerprint,
        **describe_config(model.config),
        "megabytes": round(sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6, 1),
        "config": config_to_dict(model.config),
        "gaussian_decoder": None if decoder is None else describe_gaussian_decoder(decoder),
    }


def describe_gaussian_decoder(decoder: GaussianDecoder) -> dict[str, Any]:
    """What it makes of a voxel, and how large it is."""
    return {
        "gaussians": f"{decoder.config.gaussians} for each voxel of a grid of {decoder.config.resolution}",
        "parameters": sum(parameter.numel() for parameter in decoder.parameters()),
        "config": config_to_dict(decoder.config),
    }


def describe_machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Versions, devices, and what the model would run on with these options."""
    return {
        "versions": {"atoken": _version("atoken"), "python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "devices": [f"cpu ({torch.get_num_threads()} threads)"]
        + [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())],
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention_backend(device, dtype),
    }


def _count(state: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())


def _megabytes(file: Path) -> float:
    return round(file.stat().st_size / 1e6, 1)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices_here() -> str:
    cuda = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return f"this machine has {', '.join(['cpu', *cuda])}"
