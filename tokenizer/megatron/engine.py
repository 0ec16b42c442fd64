"""Importing Megatron-Core, with Transformer Engine only when it is asked for.

`import megatron.core` imports Transformer Engine whenever it is installed, and catches nothing but ImportError, so that
a half-installed one (no torch extension, another CUDA) ends every Megatron program with a RuntimeError or an
AssertionError. Here the import is hidden from Megatron unless the run wants it. Megatron decides once, at its first
import, so a process has one of both kinds.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from tokenizer.errors import InputError, require_package

_ENGINE = "transformer_engine"

_PARTS = (
    "megatron.core",
    "megatron.core.distributed",
    "megatron.core.dist_checkpointing",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.tensor_parallel.random",
    "megatron.core.transformer.transformer_block",
    "megatron.core.extensions.transformer_engine",
)
"""Everything this room uses: imported at once, so that no later import meets Transformer Engine after all."""


def load_megatron(transformer_engine: bool = False) -> None:
    """Import Megatron-Core; call it before importing anything from it.

    Args:
        transformer_engine: let Megatron use Transformer Engine. Without it a broken installation does no harm.

    Raises:
        InputError: Megatron-Core is missing, Transformer Engine is missing or broken, or Megatron was imported without
            it earlier in this process.
    """
    require_package("megatron", "training with Megatron-Core", "megatron")
    if transformer_engine:
        _require_engine()
    with nullcontext() if transformer_engine else _hidden_engine(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not installed beside it: apex, Transformer Engine
        try:
            for part in _PARTS:
                importlib.import_module(part)
        except ImportError as error:
            raise InputError(f"Megatron-Core cannot be imported: {_line(error)}") from None
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    if transformer_engine and not sys.modules["megatron.core.transformer.transformer_block"].HAVE_TE:
        raise InputError("Megatron was imported without Transformer Engine in this process; start one for FP8 alone")


def _require_engine() -> None:
    require_package(_ENGINE, "transformer_impl 'transformer_engine'")
    try:
        importlib.import_module(f"{_ENGINE}.pytorch")
    except Exception as error:  # a broken build fails with anything from OSError to AssertionError
        raise InputError(
            f"Transformer Engine is installed but cannot be imported; reinstall it for this torch and CUDA, "
            f"or use transformer_impl 'local': {_line(error)}"
        ) from None


@contextmanager
def _hidden_engine() -> Iterator[None]:
    """`import transformer_engine` raises ImportError in here, installed or not."""
    known = {name: module for name, module in sys.modules.items() if name.split(".")[0] == _ENGINE}
    for name in known:
        del sys.modules[name]
    sys.modules[_ENGINE] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[_ENGINE]
        sys.modules.update(known)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
