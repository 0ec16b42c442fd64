"""Distributed checkpoints: each process writes its share, and any other layout reads them.

A checkpoint is a folder of Megatron's `torch_dist` format, written whole or not at all. Its names are the Megatron
model's with the blocks of a stack stacked; local and Transformer Engine layers write the same ones.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from tokenizer.errors import InputError, require_package

if TYPE_CHECKING:
    from tokenizer.megatron.model import MegatronAToken

PREFIX = "model."


def save_model(model: MegatronAToken, folder: str | os.PathLike[str]) -> None:
    """Write the weights; every process calls it, and the folder is there when it returns.

    Args:
        folder: on storage that all processes share. An older checkpoint there is replaced.

    Raises:
        InputError: psutil is missing, without which Megatron's writer hangs.
    """
    from megatron.core import dist_checkpointing

    require_package("psutil", "writing distributed checkpoints")
    target = Path(folder)
    temporary = target.with_name(f".{target.name}.part")
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(prefix=PREFIX), str(temporary))
    dist.barrier()
    if dist.get_rank() == 0:
        _put(temporary, target)
    dist.barrier()


def load_model(model: MegatronAToken, folder: str | os.PathLike[str]) -> None:
    """Read weights written at any layout into the model; every process calls it.

    Raises:
        InputError: no checkpoint there, or one of another model.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    if not (Path(folder) / "metadata.json").is_file():
        raise InputError(f"{folder}: holds no distributed checkpoint (no metadata.json)")
    try:
        state = dist_checkpointing.load(model.sharded_state_dict(prefix=PREFIX), str(folder))
    except (CheckpointingException, KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{folder}: does not fit {model.network_config.name}: {' '.join(str(error).split())[:300]}"
        ) from None
    model.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in state.items()})


def _put(temporary: Path, target: Path) -> None:
    """Rename the finished folder; an older one steps aside first, and goes last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)
