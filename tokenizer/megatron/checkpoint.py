"""Distributed checkpoints: each process writes its share, and any other layout reads them.

A checkpoint is a folder of Megatron's `torch_dist` format, written whole or not at all, with `state.json` for what the
training loop wants to keep. Weights have the Megatron model's names with the blocks of a stack stacked; local and
Transformer Engine layers write the same ones. The optimizer's moments are kept by the names of their weights, so a run
goes on at another layout: bit for bit at the same one, up to rounding at others.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tokenizer.config import config_to_dict, read_mapping
from tokenizer.errors import InputError, require_package
from tokenizer.megatron.mixed_adam import all_numbered, by_number, in_order
from tokenizer.megatron.torch_adam import prepared, repaired
from tokenizer.model.config import ATokenConfig

STATE_FILE = "state.json"
_PREFIX = "model."
_BY_WEIGHT = {"distrib_optim_sharding_type": "fully_reshardable"}
"""The one form of distributed optimizer state that any layout can read."""
_TRUST = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def save_checkpoint(
    folder: str | os.PathLike[str], model: Any, optimizer: Any = None, state: dict[str, Any] | None = None
) -> None:
    """Write model, optimizer and state; every process calls it, and the folder is there when it returns.

    Args:
        folder: on storage that all processes share. An older checkpoint there is replaced.
        model: a `MegatronAToken`, in DistributedDataParallel or not.
        optimizer: what `get_megatron_optimizer` made of it, if it is to be kept.
        state: JSON values, the first process's are written: step, seeds, what the data loader needs to go on.

    Raises:
        InputError: psutil is missing, without which Megatron's writer hangs.
    """
    from megatron.core import dist_checkpointing

    require_package("psutil", "writing distributed checkpoints")
    target = Path(folder)
    temporary = target.with_name(f".{target.name}.part")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    _queue_in_this_process()
    dist_checkpointing.save(_sharded(_bare(model), optimizer, loading=False), str(temporary))
    dist.barrier()
    if first:
        kept = {"network": config_to_dict(_bare(model).network_config), "state": state or {}}
        (temporary / STATE_FILE).write_text(json.dumps(kept), encoding="utf-8")
        _put(temporary, target)
    dist.barrier()


def load_checkpoint(folder: str | os.PathLike[str], model: Any, optimizer: Any = None) -> dict[str, Any]:
    """Read what was written at any layout into model and optimizer; every process calls it.

    Without `optimizer` call it before making one: an optimizer keeps copies of the weights it was made with.

    Returns:
        The state that was saved.

    Raises:
        InputError: no checkpoint there, or one of another model.
    """
    from megatron.core import dist_checkpointing

    source, bare = Path(folder), _bare(model)
    if not (source / STATE_FILE).is_file():
        raise InputError(f"{folder}: holds no checkpoint of a training run (no {STATE_FILE})")
    kept = read_mapping(source / STATE_FILE)
    _check_network(kept["network"], bare.network_config, source)
    prepared(optimizer)
    wanted = _sharded(bare, optimizer, loading=True)
    wanted["model"] = _without_unknown_extra_state(wanted["model"], source)
    loaded = dist_checkpointing.load(wanted, str(source))
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in loaded["model"].items()}
    with _own_extra_state():
        missing, _ = bare.load_state_dict(weights, strict=False)
    assert all(name.endswith("_extra_state") for name in missing), missing
    if optimizer is not None:
        with repaired(optimizer):
            optimizer.load_state_dict(in_order(loaded["optimizer"]))
    state: dict[str, Any] = kept["state"]
    return state


def _without_unknown_extra_state(weights: dict[str, Any], source: Path) -> dict[str, Any]:
    """Layers of Transformer Engine have extra state that local ones never wrote; they start it anew."""
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    if not any(name.endswith("_extra_state") for name in weights):
        return weights
    known = load_sharded_metadata(str(source)).keys()
    return {
        name: part
        for name, part in weights.items()
        if not name.endswith("_extra_state") or getattr(part, "unique_key", name) in known
    }


@contextmanager
def _own_extra_state() -> Iterator[None]:
    """Transformer Engine keeps histories of the delayed recipe pickled, and refuses to load them unless told that their
    source is trusted. This one is: Megatron has unpickled other parts of the same checkpoint by now."""
    before = os.environ.get(_TRUST)
    os.environ[_TRUST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TRUST]
        else:
            os.environ[_TRUST] = before


def _queue_in_this_process() -> None:
    """Let what writes files report through a plain queue: it is read and filled here when nothing is in the background.

    Megatron would start a process to hold the queue, which takes seconds and outlives a run that is killed.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if getattr(filesystem_async, "_results_queue", None) is None:
        filesystem_async._results_queue = queue.Queue()


def _check_network(saved: dict[str, Any], config: ATokenConfig, source: Path) -> None:
    """Refuse weights of other sizes, in terms of the configuration; names may differ."""
    wanted = config_to_dict(config)
    for key in wanted.keys() - {"name"}:
        if saved.get(key) != wanted[key]:
            raise InputError(f"{source}: was written with {key} {saved.get(key)}, this run has {wanted[key]}")


def _sharded(model: Any, optimizer: Any, loading: bool) -> dict[str, Any]:
    weights = model.sharded_state_dict(prefix=_PREFIX)
    if optimizer is None:
        return {"model": weights}
    with all_numbered(optimizer):
        moments = optimizer.sharded_state_dict(dict(weights), is_loading=loading, metadata=dict(_BY_WEIGHT))
    return {"model": weights, "optimizer": by_number(moments)}


def _bare(model: Any) -> Any:
    return model if hasattr(model, "network_config") else model.module


def _put(temporary: Path, target: Path) -> None:
    """Rename the finished folder; an older one steps aside first, and goes last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)
