"""Importing Megatron-Core, with Transformer Engine only when it is asked for.

`import megatron.core` imports Transformer Engine whenever it is installed, and catches nothing but ImportError, so that
a half-installed one (no torch extension, another CUDA) ends every Megatron program with a RuntimeError or an
AssertionError. Here the package is hidden from a process that does not want it. Megatron decides at its first import,
so a process does with it or without it for as long as it lives.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings

from tokenizer.errors import InputError, require_package

_ENGINE = "transformer_engine"

_PARTS = (
    "megatron.core",
    "megatron.core.distributed",
    "megatron.core.dist_checkpointing",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.tensor_parallel.random",
    "megatron.core.extensions.transformer_engine",
    "tokenizer.megatron.model",
)
"""What this room uses, imported at once: whatever is wrong with an installation shows at the start of a run."""


def load_megatron(transformer_engine: bool = False) -> None:
    """Import Megatron-Core and the modules of this room that build on it; call it before importing one of either.

    Args:
        transformer_engine: let Megatron use Transformer Engine. Otherwise this process is one in which it is not
            installed, unless somebody has imported it already; a broken installation then does no harm.

    Raises:
        InputError: Megatron-Core is missing, Transformer Engine is missing or broken, or this process was told earlier
            to do without it.
    """
    require_package("megatron", "training with Megatron-Core", "megatron")
    if transformer_engine:
        _require_engine()
    else:
        # Megatron imports it in functions too, so it stays hidden. None makes `import` raise ImportError.
        sys.modules.setdefault(_ENGINE, None)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not installed beside it: apex, Transformer Engine
        try:
            for part in _PARTS:
                importlib.import_module(part)
        except ImportError as error:
            raise InputError(f"Megatron-Core cannot be imported: {_line(error)}") from None
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


def _require_engine() -> None:
    if _ENGINE in sys.modules and sys.modules[_ENGINE] is None:
        raise InputError("this process has loaded Megatron without Transformer Engine; start another one for FP8")
    require_package(_ENGINE, "transformer_impl 'transformer_engine'")
    try:
        # Its libraries of CUDA are found where torch has put them, once torch is loaded.
        importlib.import_module("torch")
        importlib.import_module(f"{_ENGINE}.pytorch")
    except Exception as error:  # a broken build fails with anything from OSError to AssertionError
        raise InputError(
            f"Transformer Engine is installed but cannot be imported; reinstall it for this torch and CUDA, "
            f"or use transformer_impl 'local': {_line(error)}"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
