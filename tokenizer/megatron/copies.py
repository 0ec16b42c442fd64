"""The processes of a run with Megatron: a copy of the model on several of them counts as one.

Megatron numbers tensor ranks next to each other, then data-parallel ones, then pipeline stages. Of each copy the first
tensor rank of the first stage speaks. What it says, all processes of all copies hear alike, to the last bit: decisions
that depend on a sum (a step that is skipped, the best checkpoint) never differ between processes that meet later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tokenizer.training.curriculum.processes import Processes


class Copies(Processes):
    """This process's copy of the model among those of the run; Megatron's groups must have been made.

    Args:
        device: where numbers are when they travel.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank = parallel_state.get_data_parallel_rank()
        self.world = parallel_state.get_data_parallel_world_size()
        self.copy_size = dist.get_world_size() // self.world
        self.leads = parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_first_stage()
        self.group = parallel_state.get_data_parallel_group()

    @property
    def first(self) -> bool:
        return dist.get_rank() == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        return super().sum(numbers if self.leads else [0.0] * len(numbers))

    def alike(self, number: float) -> bool:
        ends = torch.tensor([number, -number], dtype=torch.float64, device=self.device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=parallel_state.get_model_parallel_group())
        return not self.largest(float(ends.sum()))

    def gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, value if self.leads else None)
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        return found[: ranks * self.world : ranks]
