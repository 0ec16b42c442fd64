"""Processes of the curriculum's tests: python curriculum_worker.py kills|layouts FOLDER, in a folder with smoke data.

Torch is imported once; every run is a fork of this process, which a test can kill without waiting for imports.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from data.config import open_training_loader
from tests.tokenizer.curriculum_data import IMITATED, IMITATING, StubTower, smoke
from tokenizer.text import alignment
from tokenizer.training.curriculum import launch
from tokenizer.training.curriculum.launch import train
from tokenizer.training.curriculum.objective import make_objective
from tokenizer.training.curriculum.preparation import Preparer
from tokenizer.training.curriculum.processes import Processes
from tokenizer.training.curriculum.start import starting_model
from tokenizer.training.curriculum.torch_engine import Layout, TorchEngine

CPU = torch.device("cpu")
KILLS = 8
STEPS = 9
VALIDATED = 4
"""Steps after which the averages are looked at."""


def fork(work: Callable[[], object]) -> int:
    """Do something in a child; its exit status is what the work gives."""
    child = os.fork()
    if child:
        return child
    try:
        status = work()
        os._exit(status if isinstance(status, int) else 0)
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(99)


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kills(folder: Path) -> None:
    """One run in peace, and one that is killed at random moments; both end in `folder`.

    Of stage 4, which has everything: all tasks, texts, Gaussians and FSQ.
    """
    settings = ("steps=12", "checkpoint.every=2", "validation.every=4", "log.pictures_every=4", *IMITATING)
    for module in (launch, alignment):
        setattr(module, "open_tower", lambda *_: StubTower())  # noqa: B010

    def run(name: str) -> int:
        return train(smoke(4, "start={kind: scratch}", f"out={folder}/{name}", *settings), CPU)

    assert status_of(fork(lambda: run("peace"))) == 0
    chance = random.Random(5)
    for _ in range(KILLS):
        child = fork(lambda: run("killed"))
        _wait_for_lines(folder / "killed" / "metrics.jsonl", chance.randint(1, 5))
        time.sleep(chance.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        if status_of(child) == 0:
            break
    assert status_of(fork(lambda: run("killed"))) == 0


def _wait_for_lines(path: Path, more: int) -> None:
    """Until a run has written so many lines, which it does quickly once it steps; a minute at most."""
    given_up, written = time.monotonic() + 60, 0
    size = path.stat().st_size if path.exists() else 0
    while written < more and time.monotonic() < given_up:
        now = path.stat().st_size if path.exists() else 0
        written, size = written + (now > size), now
        time.sleep(0.001)


def steps(layout: Layout, rank: int, world: int, folder: Path, *, compiled: bool = False, nodes: bool = False) -> None:
    """A few steps over all tasks in float64; losses and weights go to LAYOUT-RANK.pt, or LAYOUT-compiled-RANK.pt.

    Two processes compute activations again where they share gradients, and where blocks are compiled.

    Args:
        nodes: there are two nodes of two processes, or one process for all four of them; LAYOUT-nodes-RANK.pt.
    """
    name = f"{layout}{'-compiled' if compiled else ''}{'-nodes' if nodes else ''}"
    readers = 4 if nodes else 2
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=world)
    if compiled:  # what is made of the graphs is not the question here, and would take minutes
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    start = ("start={kind: scratch}", "optimizer.warmup=0", "loss.kl=1.0e-4", f"compile={str(compiled).lower()}")
    again = f"recompute={str(compiled or layout == 'ddp').lower()}"
    config = smoke(3, f"accumulation={readers // world}", again, *start, *IMITATING)
    processes = Processes(CPU)
    tower = StubTower()
    model = starting_model(config, tower, lambda: []).double()
    engine = TorchEngine(model, make_objective(config, CPU), config, processes, CPU, layout)
    preparer = Preparer(processes, CPU, (4, 16, 16), tower, None, config.seed, None, IMITATED)
    ranks = [rank] if world > 1 else range(readers)
    loaders = [open_training_loader(config.data, seed=0, rank=r, world=readers, quarantine_file=None) for r in ranks]
    losses, validated = [], {}
    for step in range(STEPS):
        prepared = preparer([next(loader) for loader in loaders], step)
        found = engine.forward_backward(prepared)
        assert engine.clip_and_step(step, found["loss"]).done
        losses.append(found)
        if step + 1 == VALIDATED:
            with engine.averaged():
                for part in prepared:
                    engine.infer(part.tokens, part.task)
            validated = engine.state_dict()
    state = engine.state_dict()
    torch.save({"losses": losses, "validated": validated, **state}, folder / f"{name}-{rank}.pt")
    # A checkpoint is whole: another layout could go on with it, and so can this one.
    engine.load_state_dict(torch.load(folder / f"single{'-nodes' if nodes else ''}-0.pt"))
    loaded = engine.state_dict()
    if rank == 0:
        torch.save(loaded, folder / f"{name}-loaded.pt")
    if world > 1:
        dist.destroy_process_group()


def layouts(folder: Path) -> None:
    """The same steps in one process that takes batches twice, and in two that share gradients, or weights too; and in
    one that takes them four times, and four that share weights by twos."""
    for nodes in (False, True):
        assert status_of(fork(lambda n=nodes: steps("single", 0, 1, folder, nodes=n))) == 0  # type: ignore[misc]
    kinds: tuple[tuple[Layout, bool, bool], ...] = (
        ("ddp", False, False),
        ("fsdp2", False, False),
        ("fsdp2", True, False),
        ("fsdp2", False, True),
    )
    for layout, compiled, nodes in kinds:
        world = 4 if nodes else 2
        work = functools.partial(steps, layout, world=world, folder=folder, compiled=compiled, nodes=nodes)
        children = [fork(lambda r=rank, w=work: w(rank=r)) for rank in range(world)]  # type: ignore[misc]
        assert [status_of(child) for child in children] == [0] * world


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"kills": kills, "layouts": layouts}[sys.argv[1]](Path(sys.argv[2]))
