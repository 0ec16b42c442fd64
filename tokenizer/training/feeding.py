"""What training takes its batches from, and how it finds it, without knowing the room that makes them.

A package offers its loaders through entry points:

    [project.entry-points."atoken.loaders"]
    shards = "data.config:open_training_loader"          # batches without end, an `Opener`
    [project.entry-points."atoken.held_out"]
    shards = "data.config:open_held_out"                 # what a run is validated on, a `HeldOutOpener`

and a run names one of them (`loader: shards`) beside the settings that it understands (`data:`).
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from tokenizer.cameras import Cameras
from tokenizer.errors import InputError
from tokenizer.patches import PatchSize
from tokenizer.sparse import SparseTokens

LOADERS, HELD_OUT = "atoken.loaders", "atoken.held_out"
"""Entry point groups."""


class StepViews(Protocol):
    """Views of an asset: pictures uint8 [V, H, W, 4], straight alpha, and V cameras."""

    @property
    def pictures(self) -> Tensor: ...

    @property
    def cameras(self) -> Cameras: ...


class StepItem(Protocol):
    """One sample. `facts["label"]` is the name of its class, where it has one; `teacher` [D] is what an image network
    saw in it, where one did."""

    @property
    def id(self) -> str: ...

    @property
    def caption(self) -> str | None: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...

    @property
    def views(self) -> StepViews | None: ...

    @property
    def teacher(self) -> Tensor | None: ...


class StepBatch(Protocol):
    """Samples of one task (`tokenizer.training.curriculum.tasks`) that are trained on together."""

    @property
    def task(self) -> str: ...

    @property
    def items(self) -> Sequence[StepItem]: ...

    @property
    def num_tokens(self) -> int: ...

    def tokens(
        self, device: torch.device | str | None = None, dtype: torch.dtype = ..., patch_size: PatchSize = ...
    ) -> SparseTokens:
        """The items, in order, as `ATokenNetwork.encode` takes them."""
        ...

    def split(self) -> tuple[StepBatch, StepBatch]:
        """Two batches of the items in their order, of about as many tokens; called with two items or more."""
        ...


class Waste(Protocol):
    """Tokens of a task's batches so far, and tokens of their budgets that stayed free."""

    @property
    def tokens(self) -> int: ...

    @property
    def wasted(self) -> int: ...


class Packing(Protocol):
    """How full the batches of a task were while its sources lasted."""

    @property
    def running(self) -> Waste: ...

    @property
    def skipped(self) -> int:
        """Samples that were left out because no batch can hold them."""
        ...


class StepSource(Protocol):
    """Batches for one process of a run: each `next` gives those of one step, the same tasks in every process.

    A task may come in several batches, whose number may differ between processes.
    """

    @property
    def reports(self) -> Mapping[Any, Packing]:
        """Packing by task; its keys are the tasks that the source gives."""
        ...

    def __next__(self) -> Sequence[StepBatch]: ...

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands, ready for JSON."""
        ...

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the states of all processes of the run that stopped."""
        ...

    def close(self) -> None: ...


class Opener(Protocol):
    """Opens the training data of a run for one process.

    Raises:
        InputError: settings that make no sense, or sources that cannot be opened.
    """

    def __call__(
        self, settings: Mapping[str, Any], *, seed: int, rank: int, world: int, quarantine_file: Path | None
    ) -> StepSource: ...


class HeldOutOpener(Protocol):
    """Reads held-out sources: batches by the name of their source, the same in every process.

    Raises:
        InputError: as `Opener`.
    """

    def __call__(
        self, sources: Sequence[Mapping[str, Any]], *, budget: int, limit: int
    ) -> Mapping[str, Sequence[StepBatch]]: ...


def find_opener(name: str) -> Opener:
    """The loader called `name`.

    Raises:
        InputError: no installed package offers it.
    """
    return cast(Opener, _find(LOADERS, name))


def find_held_out(name: str) -> HeldOutOpener:
    """The reader of held-out sources called `name`; errors as `find_opener`."""
    return cast(HeldOutOpener, _find(HELD_OUT, name))


def _find(group: str, name: str) -> Any:
    found = {entry.name: entry for entry in importlib.metadata.entry_points(group=group)}
    if name not in found:
        known = ", ".join(sorted(found)) or "none; install this project anew: pip install -e ."
        raise InputError(f"no loader is called '{name}' among the entry points '{group}'; known: {known}")
    return found[name].load()
