"""Processes of the test of batch sizes with Megatron: python -m tests.tokenizer.megatron_batches_processes FOLDER.

Steps in which a task has several micro-batches, as many in both data-parallel processes though one has a sample more.
The model is discrete: it draws no noise, which would depend on how samples are spread.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.tokenizer.curriculum_data import IMITATING, smoke
from tests.tokenizer.megatron_training_processes import LAYOUTS, WORLDS, Run, in_processes
from tokenizer.megatron.cpu import on_cpu
from tokenizer.megatron.engine import load_megatron

NAMES = ("plain", "tp", "dp", "pp")
STEPS = 6
BUDGETS = (
    "{image_understanding: 24, image_reconstruction: 20, video_understanding: 4, video_reconstruction: 16, "
    "asset_understanding: 60, asset_reconstruction: 60}"
)
BATCHES = (
    "{image_understanding: 9, image_reconstruction: 7, video_understanding: 3, video_reconstruction: 5, "
    "asset_understanding: 3, asset_reconstruction: 3}"
)


def steps(name: str, rank: int) -> None:
    """Losses and norms of steps at one layout, and the tasks of their micro-batches; into NAME-RANK.json."""
    parallel = LAYOUTS[name]
    if parallel is not None:
        store = f"file://{Path.cwd()}/{name}-store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLDS[name])
    start = ("start={kind: scratch}", "optimizer.warmup=0")
    config = smoke(4, f"data.budgets={BUDGETS}", f"data.batches={BATCHES}", *start, *IMITATING)
    run = Run(parallel, data=config.data, quantizer=config.quantizer, loss=config.loss)
    found, taken, idle = [], [], 0
    for _ in range(STEPS):
        prepared = run.prepared()
        taken.append([part.task for part in prepared])
        idle += sum(part.share == 0 for part in prepared)
        found.append(run.step(prepared))
    values = {"steps": found, "taken": taken, "idle": idle, "seen": run.seen()}
    Path(f"{name}-{rank}.json").write_text(json.dumps(values))
    if parallel is not None:
        dist.barrier()
        dist.destroy_process_group()


def steps_on_cpu(name: str, rank: int) -> None:
    with on_cpu():
        steps(name, rank)


def work(folder: Path) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    load_megatron()
    for name in NAMES:
        runs = steps if name == "plain" else steps_on_cpu
        done = in_processes(WORLDS[name], lambda rank, name=name, runs=runs: runs(name, rank))  # type: ignore[misc]
        assert done == [0] * WORLDS[name], name


if __name__ == "__main__":
    work(Path(sys.argv[1]))
