"""Megatron-Core without a GPU: for tests, and for machines that have none.

Megatron supports CUDA only. Its layers run on a CPU as they are; around them it asks for the current CUDA device to
allocate gradient buffers and messages, synchronises it, saves its random state, and writes `device="cuda"` into
schedules, optimizer and checkpoints. Inside `on_cpu()` all these mean the CPU. Nothing is computed differently.

Refused by Megatron 0.16 on a CPU without this: sequence parallelism, pipeline schedules, DistributedDataParallel, the
optimizers, `dist_checkpointing`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from tokenizer.errors import InputError


@contextmanager
def on_cpu() -> Iterator[None]:
    """Everything Megatron expects of CUDA means the CPU in here. Load Megatron first.

    Raises:
        InputError: there is a CUDA device; then Megatron should use it.
    """
    if torch.cuda.is_available():
        raise InputError("Megatron runs on the CUDA device of this machine; on_cpu() is for machines without one")
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    with ExitStack() as stack:
        for name, replacement in _CUDA.items():
            stack.enter_context(patch.object(torch.cuda, name, replacement))
        stack.enter_context(patch.object(random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()))
        stack.enter_context(
            patch.object(random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state))
        )
        stack.enter_context(_CudaMeansCpu())
        yield


class _NoStream:
    """A CUDA stream that does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


_CUDA: dict[str, Callable[..., Any]] = {
    "current_device": lambda: torch.device("cpu"),
    "synchronize": lambda *_, **__: None,
    "manual_seed": torch.manual_seed,
    "get_rng_state": lambda *_, **__: torch.get_rng_state(),
    "current_stream": lambda *_, **__: _NoStream(),
    "default_stream": lambda *_, **__: _NoStream(),
}


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites `device="cuda"` and `.cuda()`, and answers `.type()` as Megatron's optimizer expects it of a GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and str(args[1]).startswith("cuda"):
            args = (args[0], "cpu", *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return str(result).replace("torch.", "torch.cuda.", 1)
        return result
