"""Between the loop and what runs a step: the loop knows data, logs and checkpoints, an engine knows parameters.

`torch_engine` is the plain one, `tokenizer.megatron.training` another. An engine is called by all processes in the same
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from tokenizer.sparse import SparseTokens
from tokenizer.training.curriculum.model import Outputs
from tokenizer.training.curriculum.preparation import Prepared


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a step ended.

    done: false where loss or gradient were not finite: nothing has changed then, in any process.
    norms: of gradients before clipping, "total" and by part. rates: learning rates by group.
    """

    done: bool
    norms: dict[str, float]
    rates: dict[str, float]


class Engine(Protocol):
    """Holds the parameters of a run, their averages and the optimizer."""

    def forward_backward(self, prepared: Sequence[Prepared]) -> dict[str, float]:
        """Gradients of a step's loss, and "loss" and all terms over all processes; nothing is changed yet."""
        ...

    def clip_and_step(self, step: int, loss: float) -> Outcome:
        """Clip gradients, move parameters and averages, and forget the gradients.

        Args:
            step: number of the step, from 0. loss: as `forward_backward` gave it.
        """
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the averaged parameters are the model's."""
        ...

    def infer(self, tokens: SparseTokens, task: str) -> Outputs:
        """Outputs of the model for validation, without gradients, posterior means decoded."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run must not lose, whole, on the CPU, ready for `write_pt`; empty but in the first process.

        Entries "model", "average", "buffers" are tensors by name, "optimizer" tensors by name and kind; an engine may
        add its own, without which it starts anew what they hold.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of any engine with as many parameters; every process is given all of it.

        Raises:
            InputError: a state of another model.
        """
        ...

    def save_model(self, folder: Path) -> None:
        """Write the averaged model (`save_trained`); the first process does."""
        ...

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        ...


@runtime_checkable
class ShardedEngine(Engine, Protocol):
    """An engine whose parameters and moments are written by all processes together, beside what `state_dict` gives."""

    def save_shards(self, folder: Path) -> None:
        """Write a folder on storage that all processes share; it is there, whole, when this returns."""
        ...

    def load_shards(self, folder: Path) -> None:
        """Go on from such a folder of any layout, after `load_state_dict`.

        Raises:
            InputError: a folder of another model.
        """
        ...
