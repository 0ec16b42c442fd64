"""The state of a single-process run on disk: written whole or not at all, found again by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError
from tokenizer.tensorio import write_pt
from tokenizer.training.curriculum.optimization import Average
from tokenizer.training.progress import Progress

STATE_FILE = "state.pt"


def save_state(
    folder: Path,
    progress: Progress,
    network: nn.Module,
    average: Average,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
    settings: dict[str, Any],
) -> None:
    """Write everything a run needs to go on from where it stands, replacing the state before it."""
    state = {
        "step": progress.step,
        "bad": {"row": progress.bad_row, "all": progress.bad},
        "network": network.state_dict(),
        "average": average.values,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "generator": generator.get_state(),
        "settings": settings,
    }
    with atomic_path(folder / STATE_FILE) as path:
        write_pt(state, path)


def load_state(
    folder: Path,
    network: nn.Module,
    average: Average,
    optimizers: list[torch.optim.Optimizer],
    generator: torch.Generator,
    settings: dict[str, Any],
) -> Progress:
    """Continue from `folder` if it holds a state.

    Returns:
        Where it stands, at step 0 without a state.

    Raises:
        InputError: the state cannot be read, or belongs to a run with other settings (the number of steps, intervals
            and folders may change).
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return Progress()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no common error type for damaged files
        raise InputError(f"{path}: cannot be read ({type(error).__name__}); remove it to start anew") from None
    changed = [key for key, value in settings.items() if state["settings"].get(key) != value and key not in _MAY_CHANGE]
    if changed:
        raise InputError(
            f"{path} belongs to a run with other settings ({', '.join(sorted(changed))}); "
            "choose another out= folder or remove it"
        )
    network.load_state_dict(state["network"])
    for name, value in average.values.items():
        value.copy_(state["average"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    generator.set_state(state["generator"])
    bad = state.get("bad", {"row": 0, "all": 0})  # states of earlier versions do not count them
    return Progress(int(state["step"]), int(bad["row"]), int(bad["all"]))


_MAY_CHANGE = {"steps", "validate_every", "save_every", "out", "data"}
