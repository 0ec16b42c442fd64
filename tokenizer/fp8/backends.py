"""Layers that compute in FP8 on CUDA: torchao's and Transformer Engine's, each imported when it is asked for.

Both take the place of an `nn.Linear` with its parameters, the same objects under the same names, so that optimizers,
checkpoints and weights of other models know no difference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.fp8.config import FP8Config
from tokenizer.fp8.fused.scales import BLOCK_LAYERS, Scales
from tokenizer.fp8.rows import in_padded_rows
from tokenizer.megatron.fp8 import fp8_recipe
from tokenizer.model.transformer import Block
from tokenizer.quiet import quiet_imports


def torchao_layers(model: nn.Module, names: Iterable[str], config: FP8Config, *, emulate: bool = False) -> None:
    """Swap the named layers for torchao's `Float8Linear`, which pads where a product needs it.

    Args:
        emulate: compute the products in float32, on any device.

    Raises:
        InputError: torchao is broken.
    """
    float8 = _imported("torchao.float8", "torchao", "transformer_engine")
    chosen = frozenset(names)
    gradient = torch.float8_e5m2 if config.fp8_format == "hybrid" else torch.float8_e4m3fn
    backward = float8.config.Float8GemmConfig(use_fast_accum=config.fast_accumulation == "all")
    options = float8.Float8LinearConfig(
        gemm_config_grad_input=backward,
        gemm_config_grad_weight=backward,
        cast_config_grad_output=float8.CastConfig(target_dtype=gradient),
        pad_inner_dim=True,
        emulate=emulate,
        round_scales_to_power_of_2=config.power_of_two_scales,
    )

    def is_chosen(_: nn.Module, name: str) -> bool:
        return name in chosen

    float8.convert_to_float8_training(model, module_filter_fn=is_chosen, config=options)


def engine_layers(model: nn.Module, names: Iterable[str], stacks: Iterable[nn.Module], config: FP8Config) -> None:
    """Swap the named layers for Transformer Engine's `Linear`, and let `stacks` run them in its FP8 mode.

    The mode is entered once for each pass through a stack: leaving it is when the delayed recipe moves its histories
    and, among several processes, takes the largest of all.

    Raises:
        InputError: Transformer Engine is broken.
    """
    engine = _imported("transformer_engine.pytorch", "transformer_engine", "torchao")
    recipe = fp8_recipe(config.megatron(), power_of_two_scales=config.power_of_two_scales)
    kind = _engine_linear(engine, recipe)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, kind(linear))
    for stack in stacks:
        _run_inside(stack, lambda: _fp8_mode(engine, recipe))


def fused_blocks(model: nn.Module, names: Sequence[str], config: FP8Config, device: torch.device) -> Scales:
    """Swap the blocks that the named layers are in for `tokenizer.fp8.fused.block.FusedBlock`.

    Returns:
        The scales of all their tensors.

    Raises:
        InputError: Triton is broken, or a block of which only some layers are named.
    """
    fused = _imported("tokenizer.fp8.fused.block", "triton", "torchao")
    chosen = frozenset(names)
    blocks = [name for name, module in model.named_modules() if isinstance(module, Block)]
    whole = []
    for name in blocks:
        inside = [f"{name}.{layer}" in chosen for layer in BLOCK_LAYERS]
        if any(inside) and not all(inside):
            left = f"{name}.{BLOCK_LAYERS[inside.index(False)]}"
            raise InputError(
                f"fp8.backend triton fuses whole blocks, but {left} stays bfloat16 and other layers of its block do "
                f"not; keep '{name}.*' or set fp8.backend=torchao"
            )
        if all(inside):
            whole.append(name)
    scales = Scales(config, whole, device)
    for number, name in enumerate(whole):
        model.set_submodule(name, fused.FusedBlock(model.get_submodule(name), scales, number))
    return scales


class EngineLayer(Protocol):
    """A Transformer Engine layer as `engine_layers` makes them: FP8 scales and histories apart from its state dict."""

    def fp8_state(self) -> Any: ...

    def load_fp8_state(self, state: Any) -> None: ...


def _engine_linear(engine: Any, recipe: Any) -> Callable[[nn.Linear], nn.Module]:
    """Transformer Engine's layer with padded rows and an unchanged state dict."""

    class EngineLinear(engine.Linear):  # type: ignore[misc]
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                params_dtype=linear.weight.dtype,
                device=linear.weight.device,
                init_method=_leave,
            )
            self.weight = linear.weight
            if linear.bias is not None:
                self.bias = linear.bias
            self.train(linear.training)

        def forward(self, x: Tensor) -> Tensor:
            return in_padded_rows(super().forward, x)

        # Transformer Engine adds `_extra_state` to state dicts, pickled. With torch's own methods nn.Module leaves it
        # out, and the two below carry it as tensors.
        get_extra_state = nn.Module.get_extra_state
        set_extra_state = nn.Module.set_extra_state

        def fp8_state(self) -> Any:
            found = self.get_fp8_meta_tensors() or {}
            return {key: [tensor.cpu() for tensor in tensors] for key, tensors in found.items()}

        @torch.no_grad()
        def load_fp8_state(self, state: Any) -> None:
            if not state:  # of a layer that had not been called yet
                return
            self.fp8_meta.update(num_gemms=1, recipe=recipe)
            self.init_fp8_meta_tensors(recipe)
            own = self.get_fp8_meta_tensors()
            fits = isinstance(state, dict) and own.keys() == state.keys()
            if not fits or any([x.shape for x in state[key]] != [x.shape for x in own[key]] for key in own):
                raise InputError(
                    "the FP8 histories of the checkpoint do not fit; choose its fp8.backend and fp8_amax_history_len"
                )
            device = self.weight.device
            self.reset_fp8_meta_tensors({key: [x.to(device) for x in tensors] for key, tensors in state.items()})

    return EngineLinear


def _leave(_: Tensor) -> None:
    """Draws nothing: the parameters are replaced at once."""


def _fp8_mode(engine: Any, recipe: Any) -> AbstractContextManager[None]:
    """Transformer Engine's context under its present or its older name."""
    if hasattr(engine, "autocast"):
        mode: AbstractContextManager[None] = engine.autocast(enabled=True, recipe=recipe)
        return mode
    older: AbstractContextManager[None] = engine.fp8_autocast(enabled=True, fp8_recipe=recipe)
    return older


def _run_inside(module: nn.Module, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Enter a new context before each call of a module and leave it after, also when the call fails."""
    entered: list[AbstractContextManager[None]] = []

    def enter(*_: Any) -> None:
        entered.append(context())
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


def _imported(module: str, backend: str, other: str) -> Any:
    try:
        with quiet_imports():
            return importlib.import_module(module)
    except Exception as error:  # a broken build fails with anything from OSError to AssertionError
        raise InputError(
            f"{backend} is installed but cannot be imported; reinstall it for this torch and CUDA, or set "
            f"fp8.backend={other}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None
