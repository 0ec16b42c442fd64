"""Writing tensors so that a full disk is an `OSError` like any other; both libraries hide it in errors of their own."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file at `path` (use a path from `tokenizer.atomic`); the same bytes for the same tensors.

    Raises:
        OSError: as the system gave it.
    """
    # The library (0.8) makes files that their owner alone may read; models on a shared disk are for others too.
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(mode)
    if metadata:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """The library writes metadata in any order; equal models shall be equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        file.seek(8)
        file.write(text)


def write_pt(value: Any, path: Path) -> None:
    """Write tensors and plain containers with `torch.save`, readable with weights_only=True.

    Raises:
        OSError: as the system gave it.
    """
    with path.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
