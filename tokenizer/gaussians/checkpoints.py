"""Files of Gaussian decoders: our own folders and released checkpoints.

A folder is `config.json` + `model.safetensors`. A bundled or saved AToken keeps its decoder in the folder `gaussians`
inside its own. A released checkpoint is one `.safetensors` or `.pt` file; its configuration is looked for beside it,
and without one the released sizes are assumed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from tokenizer.atomic import atomic_path
from tokenizer.checkpoints import CONFIG_FILE, WEIGHTS_FILE, FileTensors
from tokenizer.config import config_to_dict, parse_config, read_mapping
from tokenizer.errors import InputError
from tokenizer.gaussians.config import GaussianDecoderConfig
from tokenizer.gaussians.decoder import GaussianDecoder
from tokenizer.gaussians.released import config_from_released, load_released
from tokenizer.tensorio import write_safetensors

SUBFOLDER = "gaussians"
"""Where a model's folder keeps its decoder."""


def save_gaussian_decoder(
    decoder: GaussianDecoder, folder: str | PathLike[str], dtype: torch.dtype | None = None
) -> None:
    """Write a folder, whole or not at all.

    Args:
        dtype: store the parameters in this type; by default as they are.
    """
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() and name in _parameters(decoder) else None)
        for name, tensor in decoder.state_dict().items()
    }
    with atomic_path(folder) as new:
        new.mkdir()
        write_safetensors({n: t.contiguous() for n, t in state.items()}, new / WEIGHTS_FILE, {"format": "pt"})
        text = json.dumps(config_to_dict(decoder.config), indent=2) + "\n"
        (new / CONFIG_FILE).write_text(text, encoding="utf-8")


def load_gaussian_decoder(
    source: str | PathLike[str],
    *,
    config: GaussianDecoderConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> GaussianDecoder:
    """Load a folder of `save_gaussian_decoder`, a model's folder that holds one, or a released file.

    Args:
        config: for a released file whose configuration is not beside it and which has not the released sizes.
        dtype: of the parameters; by default that of the file.

    Raises:
        InputError: nothing there, unreadable, or weights that do not fit the configuration.
    """
    path = Path(source)
    if path.is_dir():
        folder = path if (path / WEIGHTS_FILE).is_file() and not (path / SUBFOLDER).is_dir() else path / SUBFOLDER
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise InputError(f"{path}: holds no Gaussian decoder, {folder / name} is missing")
        config = parse_config(GaussianDecoderConfig, read_mapping(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
        state = _read(folder / WEIGHTS_FILE)
        decoder = GaussianDecoder(config)
        _load_own(decoder, state, str(folder / WEIGHTS_FILE))
    elif path.is_file():
        state = _read(path)
        decoder = GaussianDecoder(config or _config_beside(path))
        try:
            load_released(decoder, state)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    else:
        raise InputError(f"{path}: no such file or folder; a Gaussian decoder is a folder or a released file")
    stored = next(tensor.dtype for name, tensor in state.items() if name.endswith("weight"))
    return _cast(decoder, dtype or stored).to(device).eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in FileTensors(path).items()}


def _cast(decoder: GaussianDecoder, dtype: torch.dtype) -> GaussianDecoder:
    """Parameters only: the perturbation keeps its float32, as released (FORMAT 14)."""
    perturbation = decoder.offset_perturbation
    decoder.to(dtype)
    decoder.offset_perturbation = perturbation
    return decoder


def _parameters(decoder: GaussianDecoder) -> set[str]:
    return {name for name, _ in decoder.named_parameters()}


def _config_beside(path: Path) -> GaussianDecoderConfig:
    for candidate in (*(path.with_suffix(end) for end in (".yaml", ".yml", ".json")), path.with_name(CONFIG_FILE)):
        if candidate.is_file():
            try:
                return config_from_released(read_mapping(candidate))
            except InputError as error:
                raise InputError(f"{candidate}: {error}") from None
    return GaussianDecoderConfig()


def _load_own(decoder: GaussianDecoder, state: Mapping[str, Tensor], where: str) -> None:
    own = decoder.state_dict()
    odd = sorted(own.keys() ^ state.keys()) or sorted(n for n in own if own[n].shape != state[n].shape)
    if odd:
        listed = ", ".join(odd[:4]) + (f" and {len(odd) - 4} more" if len(odd) > 4 else "")
        raise InputError(f"{where}: does not fit its configuration: {listed} missing, unknown or of another shape")
    decoder.load_state_dict(state)
