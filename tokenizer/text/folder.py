"""Frozen models from local folders, through transformers. Nothing is ever downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tokenizer.config import read_mapping
from tokenizer.errors import InputError, require_package
from tokenizer.quiet import quiet_imports


def read_kind(folder: str | Path) -> str:
    """`model_type` of the checkpoint in `folder`.

    Raises:
        InputError: no folder, or no such entry in its `config.json`.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: holds no config.json; give a local folder that transformers saved a checkpoint to")
    kind = read_mapping(path).get("model_type")
    if not isinstance(kind, str):
        raise InputError(f"{path}: has no model_type; give a folder with a checkpoint that transformers saved")
    return kind


def load_frozen(folder: str | Path, kind: str, purpose: str, dtype: torch.dtype) -> Any:
    """A transformers model in evaluation mode without gradients for its weights.

    Args:
        folder: local folder with `config.json` and `model.safetensors`.
        kind: the class in transformers; may be a part of what the folder holds.
        purpose: what it is for, should transformers be missing.

    Raises:
        InputError: transformers is not installed, or the weights are missing, damaged or of another model.
    """
    require_package("transformers", purpose, "train")
    import transformers

    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder; give a local folder with a checkpoint that transformers saved")
    try:
        with _quiet():
            model, report = getattr(transformers, kind).from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
            )
    # transformers, safetensors and torch have no common type for what can be wrong with a file.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder}: cannot be loaded as {kind} ({reason}); give a folder with its weights") from None
    if report["missing_keys"]:
        raise InputError(
            f"{folder}: lacks {len(report['missing_keys'])} weights of {kind}, '{min(report['missing_keys'])}' first; "
            "give a folder with its weights"
        )
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar and its table of weights that a part of a checkpoint does not need."""
    import transformers

    logging: Any = transformers.utils.logging  # typed in part
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with quiet_imports():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
