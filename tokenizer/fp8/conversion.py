"""Swap a model's layers for FP8 ones, and what a trainer must keep of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.fp8.backends import EngineLayer, engine_layers, fused_blocks, torchao_layers
from tokenizer.fp8.choose import choose_backend
from tokenizer.fp8.config import Backend, FP8Config
from tokenizer.fp8.emulate import EmulatedLinear
from tokenizer.fp8.fused.scales import Scales
from tokenizer.fp8.layers import LayerPlan, plan
from tokenizer.model.transformer import Transformer


@dataclass(frozen=True)
class Conversion:
    """A converted model: what was done, and the state that is not in its state dict.

    backend: what computes. plan: all layers and decisions. layers: the FP8 ones by name. scales: of fused blocks.
    """

    config: FP8Config
    backend: Backend
    plan: list[LayerPlan]
    layers: dict[str, nn.Module]
    scales: Scales | None = None

    def describe(self) -> str:
        """One line for a log."""
        count = Counter(row.decision for row in self.plan if row.kind == "linear")
        return (
            f"FP8 {self.config.fp8_format}, {self.config.fp8_recipe}, {self.backend}: {count['fp8']} linear layers, "
            f"{count['bf16']} stay bf16"
        )

    def state_dict(self) -> dict[str, Any]:
        """Histories of the delayed recipe by layer, for a checkpoint; empty for the tensorwise one."""
        if self.config.fp8_recipe != "delayed":
            return {}
        if self.backend == "transformer_engine":
            return {name: cast(EngineLayer, layer).fp8_state() for name, layer in self.layers.items()}
        if self.scales is not None:
            return self.scales.state_dict()
        return {name: history.to("cpu", copy=True) for name, history in self._histories().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`. An empty state (of bfloat16, or the tensorwise recipe) starts anew.

        Raises:
            InputError: a state of other layers or another length of history.
        """
        if self.scales is not None:
            self.scales.forget_weights()
        if not state or self.config.fp8_recipe != "delayed":
            return
        if self.scales is not None:
            self.scales.load_state_dict(state)
            return
        odd = sorted(state.keys() ^ self.layers.keys())
        if odd:
            raise InputError(f"the checkpoint has FP8 histories of other layers: {odd[0]}; choose the same fp8 options")
        if self.backend == "transformer_engine":
            for name, layer in self.layers.items():
                cast(EngineLayer, layer).load_fp8_state(state[name])
            return
        for name, history in self._histories().items():
            if not isinstance(state[name], Tensor) or state[name].shape != history.shape:
                raise InputError(
                    f"the FP8 history of {name} does not fit; choose the backend and fp8_amax_history_len of the "
                    "checkpoint"
                )
            history.copy_(state[name])

    @torch.no_grad()
    def synchronise(self) -> None:
        """A step is over: give all processes the largest histories among them, so that they scale alike.

        Fused blocks and the emulated delayed recipe need it (Transformer Engine does it by itself); otherwise nothing
        happens.
        """
        if self.scales is not None:
            self.scales.move_on()
        histories = list(self._histories().values())
        if not histories or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        stacked = torch.stack(histories)
        dist.all_reduce(stacked, dist.ReduceOp.MAX)
        for history, largest in zip(histories, stacked, strict=True):
            history.copy_(largest)

    def _histories(self) -> dict[str, Tensor]:
        return {
            name: layer.amax_history
            for name, layer in self.layers.items()
            if isinstance(layer, EmulatedLinear) and layer.amax_history is not None
        }


def convert(model: nn.Module, config: FP8Config, device: torch.device) -> Conversion:
    """Swap layers of `model` in place.

    Parameters stay the same objects under the same names, in float32 (the master weights); train under bfloat16
    autocast as without FP8. Convert before FSDP2 shares parameters out. Copies of the model for other uses (averages,
    export) need no conversion.

    Args:
        model: an `ATokenNetwork`, or a module with one inside.
        device: where the model trains; it decides the backend.

    Raises:
        InputError: no layer to convert, or no backend (see `plan` and `choose_backend`).
    """
    layers = plan(model, config)
    backend = choose_backend(config, device)
    names = [row.name for row in layers if row.decision == "fp8"]
    scales = None
    if backend == "triton":
        scales = fused_blocks(model, names, config, device)
    else:
        stacks = [module for module in model.modules() if isinstance(module, Transformer)]
        swap(model, names, stacks, backend, config)
    return Conversion(config, backend, layers, {name: model.get_submodule(name) for name in names}, scales)


def swap(
    model: nn.Module, names: Sequence[str], stacks: Sequence[nn.Module], backend: Backend, config: FP8Config
) -> None:
    """Swap the named linear layers of any module; `stacks` are the modules inside whose calls they run.

    Raises:
        InputError: "triton", which computes whole blocks.
    """
    if backend == "torchao":
        torchao_layers(model, names, config)
    elif backend == "transformer_engine":
        engine_layers(model, names, stacks, config)
    elif backend == "triton":
        raise InputError("triton computes whole blocks in FP8, no single layers")
    else:
        for name in names:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            model.set_submodule(name, EmulatedLinear(linear, config))
