"""Runs in several processes, as torchrun starts them: python -m tests.tokenizer.training_processes FOLDER.

FOLDER has smoke data, run.yaml, and what the commands themselves have trained from it: `peace` with the plain engine in
two processes, and `tensor` with Megatron on two tensor ranks. It becomes the working directory. Torch and Megatron are
imported once; every launch is a fork with torchrun's agent in it, and that forks the processes of the run. What they
say is in NAME.err, the statuses they exit with are in statuses.json.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import yaml
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.tokenizer.curriculum_data import pictures_alone
from tests.tokenizer.megatron_training_processes import Run, in_processes
from tokenizer.atomic import atomic_path
from tokenizer.cli import main as atoken
from tokenizer.config import config_to_dict
from tokenizer.errors import InputError
from tokenizer.megatron import pretrain
from tokenizer.megatron.config import ParallelConfig
from tokenizer.megatron.cpu import on_cpu
from tokenizer.megatron.engine import load_megatron
from tokenizer.training.curriculum import launch
from tokenizer.training.curriculum.torch_engine import TorchEngine
from tokenizer.training.feeding import find_opener

SETTINGS = ("steps=6", "checkpoint.every=2", "validation.every=3", "log.pictures_every=100")
BETWEEN = 5
"""A checkpoint is at 4, so a run that is killed in this step has something to do again."""

LAYOUTS = {
    "one process": (1, None),
    "tensor x pipeline": (4, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    "tensor x data": (4, ParallelConfig(tensor_model_parallel_size=2, use_distributed_optimizer=True)),
}
ENDED = -1
"""Stands for the status of a process that a signal has ended."""

EVERY_RUN = ("tokenizer.cli.app", "data.cli.app", "torch.utils.tensorboard", "torch.distributed.fsdp")
"""Modules that runs import when they need them: here once for all."""

MEGATRON = importlib.util.find_spec("megatron") is not None

Fault = Callable[[int], None]
"""What happens to a process in a step, given its number from 1."""


def write_settings(path: Path) -> None:
    """The run that all launches are variations of: six steps on pictures."""
    path.write_text(yaml.safe_dump(config_to_dict(pictures_alone(*SETTINGS))), encoding="utf-8")


def signalled(number: int, *, times: int = 1) -> Fault:
    """A signal in step `BETWEEN`, again right behind itself as torchrun hands it on."""

    def fault(step: int) -> None:
        for _ in range(times if step == BETWEEN else 0):
            os.kill(os.getpid(), number)

    return fault


def plainly(*overrides: str) -> None:
    """`atoken train`; exits."""
    atoken(["train", "--config", "run.yaml", "--device", "cpu", *overrides])


def megatron(*overrides: str) -> None:
    """`python -m tokenizer.megatron.pretrain`; exits."""
    sys.exit(pretrain.main(["--config", "run.yaml", "--device", "cpu", *overrides]))


def launched(
    name: str, world: int, command: Callable[..., None], *overrides: str, faults: dict[int, Fault] | None = None
) -> list[int]:
    """Run a command in so many processes of torchrun's agent, of which some have faults; their statuses."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        files = [Path(f"{name}-{rank}.status") for rank in range(world)]
        return [int(file.read_text()) for file in files]
    os.dup2(os.open(f"{name}.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.05,
        start_method="fork",
    )
    work = functools.partial(command, *overrides, f"out={name}")
    with suppress(ChildFailedError):  # the processes say themselves how they ended
        elastic_launch(config, _process)(name, work, faults or {})
    os._exit(0)


def _process(name: str, work: Callable[[], None], faults: dict[int, Fault]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # a fork has the agent's
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    rank = int(os.environ["RANK"])
    status = Path(f"{name}-{rank}.status")
    _write(status, ENDED)
    with ExitStack() as stack:
        if rank in faults:
            for engine in engines():
                stack.enter_context(_faulty(engine, faults[rank]))
        try:
            work()
        except SystemExit as end:
            _write(status, end.code)
            raise


def _write(path: Path, status: object) -> None:
    """Whole or not at all: torchrun's agent ends a process at any moment once another has gone."""
    with atomic_path(path) as new:
        new.write_text(str(status))


def _faulty(engine: Any, fault: Fault) -> Any:
    right = engine.clip_and_step

    def step(self: Any, number: int, loss: float) -> Any:
        fault(number + 1)
        return right(self, number, loss)

    return patch.object(engine, "clip_and_step", step)


def engines() -> list[Any]:
    """Those that are loaded."""
    if "megatron.core" not in sys.modules:
        return [TorchEngine]
    from tokenizer.megatron.training import MegatronEngine

    return [TorchEngine, MegatronEngine]


# ---------------------------------------------------------------------- the plain engine


def plain() -> dict[str, list[int]]:
    """Another layout, a signal, a kill, and what is wrong; statuses by name."""
    shutil.copytree("peace", "other")
    told, killed = {1: signalled(signal.SIGTERM, times=2)}, {1: signalled(signal.SIGKILL)}
    layers = "megatron={tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2}"
    return {
        "fsdp2": launched("fsdp2", 2, plainly, "engine=fsdp2", "steps=2"),
        "told": launched("told", 2, plainly, faults=told),
        "told, then": launched("told", 2, plainly),
        "killed": launched("killed", 2, plainly, "data.workers=1", faults=killed),
        "killed, then": launched("killed", 2, plainly),
        "typing": launched("typing", 2, plainly, "stepps=4"),
        "alone": launched("alone", 2, plainly, "engine=single"),
        "few": launched("few", 2, megatron, layers),
        "one": launched("one", 2, _without_data),
        "other": launched("other", 2, plainly, "model.encoder.depth=2"),
    }


def _without_data(*overrides: str) -> None:
    """One of the processes does not find its data."""
    missing = InputError("no data on this machine") if os.environ["RANK"] == "1" else None
    with patch.object(launch, "find_opener", side_effect=missing, wraps=find_opener):
        plainly(*overrides)


# ---------------------------------------------------------------------- Megatron


def with_megatron() -> dict[str, list[int]]:
    """Kills at a layout, runs that begin where one of another engine has ended, and layouts of four processes."""
    tensor, pipeline = "megatron.tensor_model_parallel_size=2", "megatron.pipeline_model_parallel_size=2"
    start = "start={{kind: model, source: {}}}"
    found = {
        "tensor killed": launched("tensor-killed", 2, megatron, tensor, faults={1: signalled(signal.SIGKILL)}),
        # What the last checkpoint holds, for want of a finished model.
        "from a killed one": launched("from-killed", 1, plainly, start.format("tensor-killed"), "steps=1"),
        "tensor, then": launched("tensor-killed", 2, megatron, tensor),
        "pipeline from plain": launched("from-plain", 2, megatron, pipeline, start.format("peace"), "steps=1"),
        "plain from tensor": launched("from-tensor", 1, plainly, start.format("tensor"), "steps=1"),
    }
    for name, (world, parallel) in LAYOUTS.items():
        found[name] = in_processes(world, functools.partial(layout, name, world, parallel))
    return found


def layout(name: str, world: int, parallel: ParallelConfig | None, rank: int) -> None:
    """Steps over pictures, clips and 3D; what they give goes to NAME-RANK.json."""
    dist.init_process_group("gloo", init_method=f"file://{Path.cwd()}/{name}-store", rank=rank, world_size=world)
    with on_cpu() if parallel is not None else nullcontext():
        run = Run(parallel)
        found = {"steps": [run.step() for _ in range(3)], "seen": run.seen()}
    Path(f"{name}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def work(folder: Path) -> None:
    """All launches, one after the other."""
    os.chdir(folder)
    torch.set_num_threads(1)
    for module in EVERY_RUN:
        importlib.import_module(module)
    statuses = plain()
    if MEGATRON:
        load_megatron()
        statuses |= with_megatron()
    Path("statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
