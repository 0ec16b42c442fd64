"""Evaluation over processes that torchrun started: each measures its share, and all come together at the end.

    torchrun --nproc-per-node 8 -m tokenizer.cli evaluate ...

What processes exchange are figures, feature statistics and vectors, once; so gloo serves CPUs and GPUs alike.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_PATIENCE = timedelta(hours=12)
"""Processes wait for the slowest one, which may have got the long videos."""


@dataclass(frozen=True, slots=True)
class Processes:
    """rank: number of this process. world: how many there are. local: its number on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    def device(self, device: torch.device) -> torch.device:
        """The device of this process: of several GPUs its own, whichever was named."""
        if self.world > 1 and device.type == "cuda":
            return torch.device("cuda", self.local % torch.cuda.device_count())
        return device


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun started; without it this is the only one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes()
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
