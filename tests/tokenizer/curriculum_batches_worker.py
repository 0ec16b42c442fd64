"""Processes of the tests of batch sizes: python curriculum_batches_worker.py FOLDER, in a folder with smoke data.

Steps of all tasks, each with a batch size, so that the two processes of a run need different numbers of micro-batches.
The model is discrete: it draws no noise, which would depend on how samples are spread.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from data.config import open_training_loader
from tests.tokenizer.curriculum_data import IMITATED, IMITATING, StubTower, smoke
from tests.tokenizer.curriculum_worker import fork, status_of
from tokenizer.training.curriculum.config import RunConfig
from tokenizer.training.curriculum.objective import make_objective
from tokenizer.training.curriculum.preparation import Preparer
from tokenizer.training.curriculum.processes import Processes
from tokenizer.training.curriculum.start import starting_model
from tokenizer.training.curriculum.torch_engine import Layout, TorchEngine

CPU = torch.device("cpu")
STEPS = 9
SMALL = "{image_understanding: 24, image_reconstruction: 20, video_understanding: 4, video_reconstruction: 16, \
asset_understanding: 60, asset_reconstruction: 60}"
LARGE = "{image_understanding: 999, image_reconstruction: 999, video_understanding: 999, video_reconstruction: 999, \
asset_understanding: 999, asset_reconstruction: 999}"
BATCHES = "{image_understanding: 9, image_reconstruction: 7, video_understanding: 3, video_reconstruction: 5, \
asset_understanding: 3, asset_reconstruction: 3}"
"""Odd numbers: one of two processes has a sample more. Three samples that fill a batch each are one and two."""


def settings(budgets: str) -> RunConfig:
    start = ("start={kind: scratch}", "optimizer.warmup=0")
    return smoke(4, f"data.budgets={budgets}", f"data.batches={BATCHES}", *start, *IMITATING)


def steps(layout: Layout, budgets: str, rank: int, world: int, name: str) -> None:
    """A few steps in float64, of two loaders in turns or of one each; what came of them goes to NAME-RANK.pt."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{name}-store", rank=rank, world_size=world)
    config, processes, tower = settings(budgets), Processes(CPU), StubTower()
    model = starting_model(config, tower, lambda: []).double()
    engine = TorchEngine(model, make_objective(config, CPU), config, processes, CPU, layout)
    preparer = Preparer(processes, CPU, (4, 16, 16), tower, None, config.seed, None, IMITATED)
    ranks = [rank] if world > 1 else [0, 1]
    loaders = [open_training_loader(config.data, seed=0, rank=r, world=2, quarantine_file=None) for r in ranks]
    losses, given, taken, idle = [], [], [], 0
    for step in range(STEPS):
        turns = [next(loader) for loader in loaders]
        prepared = preparer(turns, step)
        found = engine.forward_backward(prepared)
        assert engine.clip_and_step(step, found["loss"]).done
        losses.append(found)
        given.append([str(batch.task) for turn in turns for batch in turn])
        taken.append([part.task for part in prepared])
        idle += sum(part.share == 0 for part in prepared)
    numbers = {"losses": losses, "given": given, "taken": taken, "idle": idle}
    torch.save({**numbers, **engine.state_dict()}, f"{name}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def main(folder: Path) -> None:
    """One process with a micro-batch a task, and with many; two that share gradients, or weights too."""
    for name, budgets in (("whole", LARGE), ("parts", SMALL)):
        assert status_of(fork(lambda b=budgets, n=name: steps("single", b, 0, 1, f"{folder}/{n}"))) == 0  # type: ignore[misc]
    layouts: tuple[Layout, ...] = ("ddp", "fsdp2")
    for layout in layouts:
        name = f"{folder}/{layout}"
        children = [
            fork(lambda r=rank, k=layout, n=name: steps(k, SMALL, r, 2, n))  # type: ignore[misc]
            for rank in range(2)
        ]
        assert [status_of(child) for child in children] == [0, 0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
