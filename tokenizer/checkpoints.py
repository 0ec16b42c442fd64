"""Model files: our own folders and released checkpoints, exact both ways, loaded without ever holding two copies.

A folder is `config.json` (our configuration) + `model.safetensors` (our names). A released checkpoint is one `.pt` or
`.safetensors` file with released names; its configuration is passed, or found beside it as `.yaml`, `.yml` or `.json`
with the same stem or named `config`, or else the released so400m one that fits the shapes.

Parameters are created on the meta device and filled one tensor at a time from the memory-mapped file, so loading needs
the size of the result plus one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizer.api import AToken
from tokenizer.atomic import atomic_path
from tokenizer.config import config_to_dict, parse_config, read_mapping
from tokenizer.errors import InputError
from tokenizer.fingerprint import fingerprint
from tokenizer.model.config import SO400M_C, SO400M_C_STAGE1, ATokenConfig
from tokenizer.released import (
    config_from_released,
    config_to_released,
    looks_released,
    rename_from_released,
    rename_to_released,
    to_released,
)

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
PRETRAINED = Path(__file__).parent / "pretrained"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_Network = TypeVar("_Network", bound=AToken)


def bundled_models() -> dict[str, Path]:
    """Models that come with this package, by name."""
    return {folder.name: folder for folder in sorted(PRETRAINED.iterdir()) if (folder / CONFIG_FILE).is_file()}


def load_network(
    kind: type[_Network],
    source: str | Path,
    *,
    config: ATokenConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> _Network:
    """Load a model of class `kind` by bundled name, from one of our folders, or from a released file.

    Args:
        source: name, folder, or released .pt / .safetensors file.
        config: for a released file whose configuration is not beside it.
        dtype: float32, bfloat16 or float16; by default that of the file.
        device: where the parameters go; each tensor goes there straight from the file.

    Raises:
        InputError: nothing there, an unreadable file, or keys and shapes that do not fit the configuration.
    """
    path = find_model(source)
    if path.is_dir():
        config = parse_config(ATokenConfig, read_mapping(path / CONFIG_FILE), str(path / CONFIG_FILE))
        path = path / WEIGHTS_FILE
    with _open_tensors(path) as tensors:
        if config is None:
            config = _config_beside(path, tensors)
        return fill(kind, config, tensors, str(path), dtype=dtype, device=device)


def find_model(source: str | Path) -> Path:
    """The folder or file that `source` names.

    Raises:
        InputError: no such bundled model, folder or file.
    """
    models = bundled_models()
    if isinstance(source, str) and source in models:
        return models[source]
    path = Path(source)
    if path.is_dir():
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (path / name).is_file():
                raise InputError(f"{path}: not a model folder, {name} is missing")
        return path
    if path.is_file():
        return path
    raise InputError(
        f"no model '{source}': not a file or folder, and the bundled models are {', '.join(models) or 'none'}"
    )


def save_network(network: AToken, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors`, both or neither.

    Args:
        dtype: store floating parameters in this type; by default as they are.
    """
    with atomic_path(folder) as path:
        path.mkdir()
        text = json.dumps(config_to_dict(network.config), indent=2)
        (path / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in network.state_dict().items()}
        save_file(state, path / WEIGHTS_FILE, metadata={"format": "pt", "name": network.config.name})


def export_released(network: AToken, path: str | Path) -> None:
    """Write the parameters under released names to a `.safetensors` or `.pt` file, and the released configuration
    beside it as `.json`. Tensors are the same bytes.

    Raises:
        InputError: a model with a linear code beside the transformers, or another ending.
    """
    target = Path(path)
    released_config = json.dumps(config_to_released(network.config), indent=2)
    state = {name: tensor.contiguous() for name, tensor in to_released(network.state_dict()).items()}
    if target.suffix not in (".safetensors", ".pt"):
        raise InputError(f"{target}: released checkpoints end in .safetensors or .pt")
    with atomic_path(target) as temporary:
        if target.suffix == ".pt":
            torch.save(state, temporary)
        else:
            save_file(state, temporary, metadata={"format": "pt"})
    with atomic_path(target.with_suffix(".json")) as temporary:
        temporary.write_text(released_config + "\n", encoding="utf-8")


class _Tensors:
    """Named tensors read one at a time, from a memory-mapped safetensors file or a mapping."""

    def __init__(self, path: Path | None, mapping: Mapping[str, Tensor] | None) -> None:
        self._mapping = mapping
        self._file = None
        if path is not None:
            try:
                self._file = safe_open(str(path), framework="pt")  # type: ignore[no-untyped-call]
            except (SafetensorError, OSError, ValueError) as error:
                raise InputError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())})") from None

    def __enter__(self) -> _Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._file = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        if self._mapping is not None:
            return {name: tuple(tensor.shape) for name, tensor in self._mapping.items()}
        assert self._file is not None
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        if self._mapping is not None:
            return self._mapping[name]
        assert self._file is not None
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def _open_tensors(path: Path) -> _Tensors:
    if path.suffix in (".pt", ".pth", ".bin"):
        return _Tensors(None, _read_pt(path))
    return _Tensors(path, None)


def _read_pt(path: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load has no common error type for foreign and truncated files
        raise InputError(f"{path}: not a readable .pt state dict ({type(error).__name__}); is it complete?") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: must hold a bare state dict of names and tensors")
    return state


def fill(
    kind: type[_Network],
    config: ATokenConfig,
    tensors: Mapping[str, Tensor] | _Tensors,
    where: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> _Network:
    """Build `kind(config)` on the meta device and give it `tensors`, under our names or released ones.

    Raises:
        InputError: listing missing, extra and mis-shaped keys, a few of each.
    """
    if not isinstance(tensors, _Tensors):
        tensors = _Tensors(None, tensors)
    with torch.device("meta"):
        network = kind(config)
    shapes = tensors.shapes()
    released = looks_released(shapes)
    names = rename_from_released(shapes) if released else {name: name for name in shapes}
    wanted = {
        rename_to_released(name) if released else name: tuple(parameter.shape)
        for name, parameter in network.state_dict().items()
    }
    _compare({name: shapes[name] for name in names}, wanted, where, config.name)
    for theirs, ours in names.items():
        module_name, _, leaf = ours.rpartition(".")
        tensor = tensors[theirs].to(device=device, dtype=dtype, copy=dtype is None)
        module = network.get_submodule(module_name)
        setattr(module, leaf, tensor if leaf in module._buffers else nn.Parameter(tensor))
    sources = {ours: theirs for theirs, ours in names.items()}
    network.remember_fingerprint(fingerprint(config, sources, lambda name: tensors[sources[name]]))
    return network.eval()


def _compare(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str, name: str
) -> None:
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    shaped = [
        f"{key} is {list(found[key])}, not {list(wanted[key])}"
        for key in sorted(found.keys() & wanted.keys())
        if found[key] != wanted[key]
    ]
    problems = [
        f"{len(items)} {what} ({', '.join(items[:3])}{', ...' if len(items) > 3 else ''})"
        for what, items in (("missing", missing), ("unexpected", extra), ("of another shape", shaped))
        if items
    ]
    if problems:
        raise InputError(f"{where}: does not fit the configuration '{name}': keys {'; '.join(problems)}")


def _config_beside(path: Path, tensors: _Tensors) -> ATokenConfig:
    candidates = [path.with_suffix(end) for end in (".yaml", ".yml", ".json")]
    candidates += [path.with_name(f"config{end}") for end in (".yaml", ".yml", ".json")]
    for candidate in candidates:
        if candidate.is_file():
            values = read_mapping(candidate)
            if "encoder_model_channels" in values or "latent_channels" not in values or "encoder" not in values:
                return config_from_released(values)
            return parse_config(ATokenConfig, values, str(candidate))
    return _guess_released(path, tensors.shapes())


def _guess_released(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> ATokenConfig:
    """The published configuration whose shapes these are. Continuous and discrete models have the same; the name of
    the file tells them apart, since the published discrete file is named `...sod...`."""
    for config in (SO400M_C, SO400M_C_STAGE1):
        if shapes.get("proj.weight") == (2 * config.latent_channels, config.encoder.width):
            if "sod" in path.stem.lower() or path.stem.lower().endswith("-d"):
                from tokenizer.model.config import SO400M_D

                return SO400M_D
            return config
    raise InputError(
        f"{path}: no configuration beside it and not the size of a published AToken; "
        f"put the released configuration there as {path.with_suffix('.yaml').name}"
    )


def released_network(
    kind: type[_Network],
    config: ATokenConfig | Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> _Network:
    """A model from a released configuration mapping (or ours) and a state dict in memory with released names."""
    if not isinstance(config, ATokenConfig):
        config = config_from_released(config)
    return fill(kind, config, state, "the state dict", dtype=dtype, device=device)
