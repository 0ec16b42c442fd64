"""Processes of the tests of training with Megatron: python -m tests.tokenizer.megatron_training_processes FOLDER.

FOLDER has smoke data and becomes the working directory. Torch and Megatron are imported once; every run is a fork.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import yaml

from data.config import open_training_loader
from tests.tokenizer.curriculum_data import IMITATED, IMITATING, StubTower, pictures_alone, smoke
from tokenizer.config import config_to_dict
from tokenizer.errors import InputError
from tokenizer.megatron.build import initialise_parallel
from tokenizer.megatron.config import ParallelConfig
from tokenizer.megatron.cpu import on_cpu
from tokenizer.megatron.engine import load_megatron
from tokenizer.megatron.pretrain import main
from tokenizer.training.curriculum.config import RunConfig, network_config
from tokenizer.training.curriculum.launch import train
from tokenizer.training.curriculum.objective import make_objective
from tokenizer.training.curriculum.preparation import Prepared, Preparer
from tokenizer.training.curriculum.processes import Processes
from tokenizer.training.curriculum.start import starting_model
from tokenizer.training.curriculum.torch_engine import TorchEngine

CPU = torch.device("cpu")
LAYOUTS = {
    "plain": None,
    "tp": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=True),
    "dp": ParallelConfig(use_distributed_optimizer=True),
    "pp": ParallelConfig(pipeline_model_parallel_size=2),
    "resumed": ParallelConfig(use_distributed_optimizer=True),
}
WORLDS = {"plain": 1, "tp": 2, "dp": 2, "pp": 2, "resumed": 1}
STEPS = 5
"""One of each task, and then one more."""


def settings(copies: int) -> RunConfig:
    """Two batches of each task a step, taken in turns or by two copies of the model."""
    kinds = ("video_reconstruction", "asset_understanding", "asset_reconstruction", "image_reconstruction")
    ratios = ", ".join(f"{task}: 1" for task in (*kinds, "video_understanding"))
    # Gradients of L1 are signs: with this seed no value is so near its target that rounding turns one.
    start = ("start={kind: scratch}", "optimizer.warmup=0", "loss.kl=1.0e-4", "seed=1")
    return smoke(3, f"accumulation={2 // copies}", f"data.ratios={{{ratios}}}", *start, *IMITATING)


class Run:
    """Steps of one engine on the data of two copies.

    Args:
        changes: settings that are other than `settings` has them.
    """

    def __init__(self, parallel: ParallelConfig | None, **changes: Any) -> None:
        copies = dist.get_world_size() // parallel.model_ranks if parallel is not None else 1
        self.config = replace(settings(copies), **changes)
        model, objective = starting_model(self.config, StubTower(), lambda: []), make_objective(self.config, CPU)
        self.engine: Any
        if parallel is None:
            self.processes = Processes(CPU)
            self.engine = TorchEngine(model, objective, self.config, self.processes, CPU, "single")
        else:
            initialise_parallel(network_config(self.config), parallel)
            from tokenizer.megatron.copies import Copies
            from tokenizer.megatron.training import MegatronEngine

            self.processes = Copies(CPU)
            self.engine = MegatronEngine(model, objective, self.config, parallel, self.processes, CPU)
        self.preparer = Preparer(self.processes, CPU, (4, 16, 16), StubTower(), None, self.config.seed, None, IMITATED)
        ranks = [self.processes.rank] if copies > 1 else [0, 1]
        self.loaders = [
            open_training_loader(self.config.data, seed=0, rank=rank, world=2, quarantine_file=None) for rank in ranks
        ]
        self.done = 0
        self.looked_at: dict[Any, Any] = {}

    def prepared(self) -> list[Prepared]:
        return self.preparer([next(loader) for loader in self.loaders], self.done)

    def step(self, prepared: list[Prepared] | None = None) -> dict[str, float]:
        losses: dict[str, float] = self.engine.forward_backward(prepared or self.prepared())
        outcome = self.engine.clip_and_step(self.done, losses["loss"])
        assert outcome.done
        self.done += 1
        return {**losses, **{f"norm/{part}": norm for part, norm in outcome.norms.items()}}

    def bad_step(self, spoilt: bool) -> bool:
        """Whether a step with a loss that is NaN was skipped and changed nothing."""
        parts = self.prepared()
        if spoilt:
            parts[1] = replace(parts[1], share=float("nan"))
        before = self.seen()
        outcome = self.engine.clip_and_step(self.done, self.engine.forward_backward(parts)["loss"])
        return not outcome.done and self.seen() == before

    def odd_samples(self, lost: bool) -> str:
        """What is said where this process could not read the first sample of a step, or another could not."""
        turns = [next(loader) for loader in self.loaders]
        first = max(turns[0], key=lambda batch: len(batch.items))
        if lost:
            turns[0] = [replace(b, items=b.items[1:]) if b is first else b for b in turns[0]]
        try:
            self.preparer(turns, self.done)
        except InputError as error:
            return str(error)
        return ""

    def seen(self) -> dict[str, float]:
        """What the averaged model makes of a batch of each task, in one number."""
        if not self.looked_at:
            loader = open_training_loader(self.config.data, seed=0, rank=0, world=2, quarantine_file=None)
            self.looked_at = {batch.task: batch for _ in range(STEPS) for batch in next(loader)}
        found = {}
        with self.engine.averaged():
            for batch in self.looked_at.values():
                outputs = self.engine.infer(batch.tokens(CPU, torch.float32, (4, 16, 16)), batch.task)
                found[str(batch.task)] = float(next(iter(outputs.values())).square().mean())
        return found


def layout(name: str, rank: int) -> None:
    """Steps at one layout, or one more from what tensor ranks have saved; into NAME-RANK.json."""
    parallel = LAYOUTS[name]
    if parallel is not None:
        store = f"file://{Path.cwd()}/{name}-store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLDS[name])
    run = Run(parallel)
    found: dict[str, Any] = {}
    if name == "resumed":
        run.engine.load_state_dict(torch.load("tp.pt", weights_only=True))
        run.engine.load_shards(Path("tp-shards"))
        for _ in range(STEPS):
            run.prepared()
        run.done = STEPS
        found["refused"] = refusal(run.engine)
    else:
        found["steps"] = [run.step() for _ in range(STEPS)]
    found["seen"] = run.seen()
    if name == "tp":
        state = run.engine.state_dict()
        run.engine.save_shards(Path("tp-shards"))
        if rank == 0:
            torch.save(state, "tp.pt")
    found["next"] = run.step()
    found["skipped"] = run.bad_step(spoilt=name != "dp" or rank == 1)
    found["odd samples"] = run.odd_samples(lost=rank == 1)
    Path(f"{name}-{rank}.json").write_text(json.dumps(found))
    if parallel is not None:
        dist.barrier()
        dist.destroy_process_group()


def refusal(engine: Any) -> str:
    """What an engine with another optimizer says of the checkpoint."""
    engine.parallel = replace(engine.parallel, use_distributed_optimizer=False)
    try:
        engine.load_shards(Path("tp-shards"))
    except InputError as error:
        return str(error)
    finally:
        engine.parallel = replace(engine.parallel, use_distributed_optimizer=True)
    return ""


def layout_on_cpu(name: str, rank: int) -> None:
    with on_cpu():
        layout(name, rank)


# ---------------------------------------------------------------------- the launcher


def command(rank: int, world: int, port: int, *overrides: str, signalled: bool = False) -> int:
    """`python -m tokenizer.megatron.pretrain` as torchrun starts it; SIGTERM may come in the second step."""
    from tokenizer.megatron.training import MegatronEngine

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    step = MegatronEngine.clip_and_step

    def interrupted(engine: MegatronEngine, number: int, loss: float) -> Any:
        if signalled and number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(engine, number, loss)

    with patch.object(MegatronEngine, "clip_and_step", interrupted):
        return main(["--config", "run.yaml", "--device", "cpu", *overrides])


def launches() -> dict[str, list[int]]:
    """A run over two tensor ranks that is told to stop, and goes on in one process; beside it the plain engine's."""
    every = ("steps=4", "checkpoint.every=3", "validation.every=4", "log.pictures_every=100")
    values = config_to_dict(pictures_alone(*every, "out=stopped", "megatron.tensor_model_parallel_size=2"))
    Path("run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    port = free_port()
    alone = free_port()
    plain = pictures_alone(*every, "out=plain")
    return {
        "plain run": in_processes(1, lambda _: train(plain, CPU)),
        "stopped": in_processes(2, lambda rank: command(rank, 2, port, signalled=rank == 1)),
        "gone on": in_processes(1, lambda _: command(0, 1, alone, "megatron.tensor_model_parallel_size=1")),
        "other engine": in_processes(1, lambda _: refused()),
    }


def refused() -> int:
    """Lines of what the plain engine says of a checkpoint of Megatron's."""
    try:
        return train(pictures_alone("out=stopped", "steps=5"), CPU)
    except InputError as error:
        return len(str(error).splitlines()) if "start.kind=model" in str(error) else 99


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def in_processes(world: int, work: Callable[[int], object]) -> list[int]:
    """Exit statuses of forks that each do the work with their rank."""

    def child(rank: int) -> None:
        status = work(rank)
        sys.exit(status if isinstance(status, int) else 0)

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=child, args=(rank,)) for rank in range(world)]
    for process in children:
        process.start()
    for process in children:
        process.join()
    return [int(process.exitcode if process.exitcode is not None else -1) for process in children]


def work(folder: Path) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    load_megatron()
    statuses: dict[str, Any] = {}
    for name, world in WORLDS.items():
        runs = layout if name == "plain" else layout_on_cpu
        statuses[name] = in_processes(world, lambda rank, name=name, runs=runs: runs(name, rank))  # type: ignore[misc]
    Path("statuses.json").write_text(json.dumps({**statuses, **launches()}))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
