"""The processes of a run, as the loop sees them: a few numbers are agreed on; alone, everything is as it is.

A copy of the model is one process here. Where several hold a copy together, an engine's own kind of `Processes` says
which copy this one belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Processes:
    """This process among those of the run: all of `torch.distributed`'s, or one where it is not initialised.

    Args:
        device: where numbers are when they travel.

    Attributes:
        rank, world: the number of this process's copy of the model, and how many copies there are.
        copy_size: processes that hold a copy together.
        leads: whether this one speaks for its copy.
        group: one process of each copy, this one among them; None for all processes.
    """

    copy_size = 1
    leads = True
    group: dist.ProcessGroup | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.many else 0
        self.world = dist.get_world_size() if self.many else 1

    @property
    def first(self) -> bool:
        """Whether this one writes files and talks to people."""
        return self.rank == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def largest(self, number: float) -> float:
        """The largest of all processes' numbers."""
        return self._reduce([number], dist.ReduceOp.MAX)[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes in their order; they are pickled between processes of this run alone."""
        if not self.many:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def from_first(self, value: Any) -> Any:
        """What the first process gave, in all of them."""
        if not self.many:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def alike(self, number: float) -> bool:  # noqa: ARG002
        """Whether all processes of each copy have given the same number as each other."""
        return True

    def wait(self) -> None:
        """Until all have come here."""
        if self.many:
            dist.barrier()

    def _reduce(self, numbers: Sequence[float], operation: Any) -> list[float]:
        if not self.many:
            return [float(number) for number in numbers]
        # Gloo and NCCL both sum float64; a NaN stays one, whatever the operation.
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(values, op=operation)
        result: list[float] = values.tolist()
        return result
