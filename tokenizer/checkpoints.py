"""Model files: our own folders and released checkpoints, exact both ways, loaded without ever holding two copies.

A folder is `config.json` (our configuration) + `model.safetensors` (our names). A released checkpoint is one `.pt` or
`.safetensors` file with released names; its configuration is passed, or found beside it as `.yaml`, `.yml` or `.json`
with the same stem or named `config`, or else the released so400m one that fits the shapes.

Parameters are created on the meta device and filled one tensor at a time from the memory-mapped file, so loading needs
the size of the result plus one tensor.
"""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tokenizer.api import AToken
from tokenizer.atomic import atomic_path, temporary_beside
from tokenizer.config import config_to_dict, parse_config, read_mapping
from tokenizer.errors import InputError
from tokenizer.fingerprint import sample, weights_digest, weights_of
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import SO400M_C, SO400M_C_STAGE1, SO400M_D, ATokenConfig
from tokenizer.released import (
    config_from_released,
    config_to_released,
    looks_released,
    rename_from_released,
    rename_to_released,
    to_released,
)
from tokenizer.tensorio import write_pt, write_safetensors

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
PRETRAINED = Path(__file__).parent / "pretrained"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

MAPPED_BYTES = 2**26
"""How much of a file is read before it is mapped anew."""
_DIGEST = "weights"
"""Metadata entry with the digest of the weights before any rounding; believed of float16 files, and of those whose
weights are still the ones that `_ROUNDED` names."""
_ROUNDED = "rounded weights"
"""Metadata entry with the digest of the weights as they are in the file, where rounding to float16 made it another."""

_Network = TypeVar("_Network", bound=AToken)


def bundled_models() -> dict[str, Path]:
    """Models that come with this package, by name."""
    return {config.parent.name: config.parent for config in sorted(PRETRAINED.glob(f"*/{CONFIG_FILE}"))}


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
        dtype: float32, bfloat16 or float16; by default that of the file, of several the widest.
        device: where the parameters go; each tensor goes there straight from the file.

    Raises:
        InputError: nothing there, an unreadable file, or keys and shapes that do not fit the configuration.
    """
    path = find_model(source)
    if path.is_dir():
        config = parse_config(ATokenConfig, read_mapping(path / CONFIG_FILE), str(path / CONFIG_FILE))
        path = path / WEIGHTS_FILE
    tensors = FileTensors(path)
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


def save_network(network: ATokenNetwork, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors`, both or neither. Other files in the folder stay.

    Args:
        dtype: store floating parameters in this type; by default as they are.
    """
    folder = Path(folder)
    if folder.is_dir():
        with atomic_path(folder / CONFIG_FILE) as config, atomic_path(folder / WEIGHTS_FILE) as weights:
            _write(network, config, weights, dtype)
    else:
        with atomic_path(folder) as new:
            new.mkdir()
            _write(network, new / CONFIG_FILE, new / WEIGHTS_FILE, dtype)


def holds_model(folder: Path) -> bool:
    """Whether there is a file of a model in `folder`; where only one of two is, reading it says so."""
    return any((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))


@contextmanager
def without_parts(parts: Iterable[Path]) -> Iterator[None]:
    """Remove `parts`, folders of models inside a model's folder, when the block succeeds, and leave all of them else.

    Only our own files go, and the folder itself once it is empty; of a link to a folder only the link.
    """
    aside: dict[Path, Path] = {}
    try:
        for part in parts:
            for file in (part,) if part.is_symlink() else (part / CONFIG_FILE, part / WEIGHTS_FILE):
                if file.is_symlink() or file.is_file():
                    aside[file] = file.rename(temporary_beside(file))
        yield
    except BaseException:
        for file, hidden in aside.items():
            hidden.rename(file)
        raise
    for file, hidden in aside.items():
        hidden.unlink()
        if file.name in (CONFIG_FILE, WEIGHTS_FILE) and not any(file.parent.iterdir()):
            file.parent.rmdir()


def _write(network: ATokenNetwork, config: Path, weights: Path, dtype: torch.dtype | None) -> None:
    own = weights_of(network)
    digest = network.weights_digest if isinstance(network, AToken) else weights_digest(own)
    state = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in own.items()}
    metadata = {"format": "pt", "name": network.config.name, _DIGEST: digest}
    rounded = weights_digest(state)
    if rounded != digest:
        metadata[_ROUNDED] = rounded
    write_safetensors(state, weights, metadata)
    config.write_text(json.dumps(config_to_dict(network.config), indent=2) + "\n", encoding="utf-8")


def export_released(network: AToken, path: str | Path) -> None:
    """Write the parameters under released names to a `.safetensors` or `.pt` file, and the released configuration
    beside it as `.json`, both or neither. Tensors are the same bytes.

    Raises:
        InputError: another ending, or a model with what the released format does not know (`config_to_released`).
    """
    target = Path(path)
    if target.suffix not in (".safetensors", ".pt"):
        raise InputError(f"{target}: released checkpoints end in .safetensors or .pt")
    text = json.dumps(config_to_released(network.config), indent=2) + "\n"
    state = {name: tensor.to("cpu").contiguous() for name, tensor in to_released(weights_of(network)).items()}
    with atomic_path(target.with_suffix(".json")) as config, atomic_path(target) as weights:
        if target.suffix == ".pt":
            write_pt(state, weights)
        else:
            write_safetensors(state, weights, {"format": "pt"})
        config.write_text(text, encoding="utf-8")


class FileTensors(Mapping[str, Tensor]):
    """Tensors of a .safetensors or .pt file, read from a memory map. Copy each before asking for the next one.

    Pages that were read count as memory of the process as long as they are mapped, so the file is mapped anew from time
    to time.

    Raises:
        InputError: an unreadable file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map()

    def _map(self) -> None:
        pt = self._path.suffix in (".pt", ".pth", ".bin")
        self._file: Mapping[str, Tensor] | _Safetensors = _read_pt(self._path) if pt else _Safetensors(self._path)
        self._read = 0

    def __getitem__(self, name: str) -> Tensor:
        if self._read > MAPPED_BYTES:
            self._map()
        tensor = self._file[name]
        self._read += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Without reading a tensor: a mapped one is read where it is touched."""
        return {name: tuple(self._file[name].shape) for name in self._file}

    def dtypes(self) -> dict[str, torch.dtype]:
        """Without reading a tensor either."""
        return {name: self._file[name].dtype for name in self._file}

    @property
    def metadata(self) -> dict[str, str]:
        return self._file.metadata if isinstance(self._file, _Safetensors) else {}


class _Safetensors(Mapping[str, Tensor]):
    """A memory-mapped safetensors file."""

    def __init__(self, path: Path) -> None:
        opener: Any = safe_open  # safetensors ships no types for what it returns
        try:
            self._file = opener(str(path), framework="pt")
            self._names: list[str] = list(self._file.keys())
            self.metadata: dict[str, str] = self._file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())})") from None

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read_pt(path: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise InputError(f"{path}: damaged, or holds more than tensors, which is never run or read") from None
    except Exception as error:  # torch.load has no common error type for foreign and truncated files
        raise InputError(f"{path}: not a readable .pt state dict ({type(error).__name__}); is it complete?") from None
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise InputError(f"{path}: must hold a bare state dict of names and tensors")
    return state


def fill(
    kind: type[_Network],
    config: ATokenConfig,
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> _Network:
    """Build `kind(config)` on the meta device and give it copies of `tensors`, under our names or released ones.

    Raises:
        InputError: listing missing, extra and mis-shaped keys, a few of each; or weights that are no floats, or shall
            be none.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"weights are floats and cannot be {str(dtype).removeprefix('torch.')}; use torch.bfloat16")
    with torch.device("meta"):
        network = kind(config)
    file = tensors if isinstance(tensors, FileTensors) else None
    shapes = file.shapes() if file else {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    released = looks_released(shapes)
    names = rename_from_released(shapes) if released else {name: name for name in shapes}
    wanted = {
        rename_to_released(name) if released else name: tuple(parameter.shape)
        for name, parameter in network.state_dict().items()
    }
    _compare({name: shapes[name] for name in names}, wanted, where, config.name)
    if dtype is None:
        stored_as = file.dtypes() if file else {name: tensor.dtype for name, tensor in tensors.items()}
        dtype = _widest({stored_as[name] for name in names}, where)
    samples, half = {}, False
    for theirs, ours in names.items():
        stored = tensors[theirs]
        if not stored.is_floating_point():
            raise InputError(f"{where}: {theirs} is {str(stored.dtype).removeprefix('torch.')}; weights must be floats")
        samples[ours] = sample(stored)
        half |= stored.dtype == torch.float16
        tensor = stored.to(device=device, dtype=dtype, copy=True)
        module_name, _, leaf = ours.rpartition(".")
        module = network.get_submodule(module_name)
        setattr(module, leaf, tensor if leaf in module._buffers else nn.Parameter(tensor))
    digest = weights_digest(samples)
    if file and (half or file.metadata.get(_ROUNDED) == digest):
        digest = file.metadata.get(_DIGEST, digest)
    network.remember_digest(digest)
    return network.eval()


def _widest(dtypes: set[torch.dtype], where: str) -> torch.dtype | None:
    """The type that holds what all of these do, since layers compute in one; None where they are one already."""
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    if len(floats) < 2:
        return None
    try:
        return functools.reduce(torch.promote_types, floats)
    except RuntimeError:  # float8 is promoted to nothing
        listed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in floats))
        raise InputError(f"{where}: weights are of several types ({listed}); say which one to load them in") from None


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


def _config_beside(path: Path, tensors: FileTensors) -> ATokenConfig:
    candidates = [path.with_suffix(end) for end in (".yaml", ".yml", ".json")]
    candidates += [path.with_name(f"config{end}") for end in (".yaml", ".yml", ".json")]
    for candidate in candidates:
        if candidate.is_file():
            values = read_mapping(candidate)
            if "encoder_model_channels" in values or "latent_channels" not in values or "encoder" not in values:
                return _released_config(candidate, values)
            return parse_config(ATokenConfig, values, str(candidate))
    return _guess_released(path, tensors.shapes())


def _released_config(path: Path, values: Mapping[str, Any]) -> ATokenConfig:
    try:
        return config_from_released(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _guess_released(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> ATokenConfig:
    """The published configuration whose shapes these are. Continuous and discrete models have the same; the name of
    the file tells them apart, since the published discrete file is named `...sod...`."""
    for config in (SO400M_C, SO400M_C_STAGE1):
        if shapes.get("proj.weight") == (2 * config.latent_channels, config.encoder.width):
            if "sod" in path.stem.lower() or path.stem.lower().endswith("-d"):
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
