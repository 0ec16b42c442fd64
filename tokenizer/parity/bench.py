"""What a recording's computations need in one precision: networks with its weights, and the values of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.gaussians import GaussianDecoder
from tokenizer.gaussians import released as released_gaussians
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.parity.compare import Value
from tokenizer.parity.recording import RecordedFile, Recording
from tokenizer.released import config_from_released, rename_from_released

Values = Iterator[tuple[str, Value | str]]
"""Tensor name, without the "f64/" prefix, and what this project computes for it, or why it cannot."""

Producer = Callable[[RecordedFile, set[str], "Bench"], Values]
"""(file, names wanted, bench) -> the tensors it knows how to compute."""

UNFIT = (InputError, RuntimeError, KeyError, IndexError, TypeError, ValueError)
"""What a computation may raise for a recording that it does not fit. It must end in the table, not in a traceback."""

_Network = TypeVar("_Network", bound=nn.Module)

F64 = "f64/"
"""Prefix of tensors that the reference computed wholly in float64."""


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that could be computed for a file, and why the rest could not."""

    values: dict[str, Value | str]
    problems: list[str]


def explain(error: Exception) -> str:
    """One line for the table."""
    kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:200]


class Bench:
    """One precision on one device.

    Args:
        recording: where configurations, weights and inputs are.
        device, dtype: of the networks.
        producers: every one is tried on every file.
    """

    def __init__(
        self, recording: Recording, device: torch.device, dtype: torch.dtype, producers: tuple[Producer, ...]
    ) -> None:
        self.recording = recording
        self.device = device
        self.dtype = dtype
        self._producers = producers
        self._networks: dict[str, nn.Module] = {}
        self._results: dict[str, Results] = {}

    def results(self, file: RecordedFile) -> Results:
        """All values of a file; computed once."""
        if file.name not in self._results:
            wanted = {name.removeprefix(F64) for name in file.tensors}
            values: dict[str, Value | str] = {}
            problems: list[str] = []
            for producer in self._producers:
                try:
                    values.update(producer(file, wanted, self))
                except UNFIT as error:
                    problems.append(explain(error))
            self._results[file.name] = Results(values, problems)
        return self._results[file.name]

    def value(self, file: RecordedFile, name: str) -> Tensor:
        """A tensor to compute with: the recorded one, or in float64 an output of the reference computed anew.

        The recording holds outputs in float32 only, and "wholly in float64" means that nothing was rounded on the way.
        """
        if self.dtype == torch.float64 and not name.startswith("in."):
            value = self.results(file).values.get(name)
            if isinstance(value, Value):
                return value.tensor
        return file.take(name).to(self.device)

    def autoencoder(self, model: str) -> ATokenNetwork:
        """The network of a configuration with its recorded weights."""
        return self._network(model, ATokenNetwork, self._load_autoencoder)

    def gaussian_decoder(self, model: str) -> GaussianDecoder:
        """The Gaussian decoder of a configuration with its recorded weights."""
        return self._network(model, GaussianDecoder, self._load_gaussian_decoder)

    def is_gaussian(self, model: str) -> bool:
        """Whether a configuration is that of a Gaussian decoder."""
        if model not in self.recording.configs:
            raise InputError(f"README.json has no configuration of model {model}")
        return "representation_config" in self.recording.configs[model]

    def _network(self, model: str, kind: type[_Network], load: Callable[[str], _Network]) -> _Network:
        if model not in self._networks:
            self._networks[model] = load(model).to(self.device, self.dtype).eval().requires_grad_(False)
        network = self._networks[model]
        assert isinstance(network, kind)
        return network

    def _load_autoencoder(self, model: str) -> ATokenNetwork:
        network = ATokenNetwork(config_from_released(self.recording.configs[model], name=model))
        state = self.recording.weights_of(model).tensors
        ours = {name: state[released] for released, name in rename_from_released(state).items()}
        own = network.state_dict()
        odd = sorted(own.keys() ^ ours.keys()) or sorted(name for name in own if own[name].shape != ours[name].shape)
        if odd:
            raise InputError(f"the weights of model {model} do not fit its configuration: {', '.join(odd[:4])}")
        network.load_state_dict(ours)
        return network

    def _load_gaussian_decoder(self, model: str) -> GaussianDecoder:
        decoder = GaussianDecoder(released_gaussians.config_from_released(self.recording.configs[model]))
        released_gaussians.load_released(decoder, self.recording.weights_of(model).tensors)
        return decoder
