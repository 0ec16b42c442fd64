"""Processes of the tests of FP8 training: python fp8_worker.py FOLDER, in a folder with smoke data.

Two processes share gradients, or weights too, and take a step more than once: what was kept of the run goes on alike.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from data.config import open_training_loader
from tests.tokenizer.curriculum_data import pictures_alone
from tests.tokenizer.curriculum_worker import fork, status_of
from tokenizer.fp8 import FP8Config
from tokenizer.fp8.fused.scales import Scales
from tokenizer.training.curriculum.objective import make_objective
from tokenizer.training.curriculum.preparation import Preparer
from tokenizer.training.curriculum.processes import Processes
from tokenizer.training.curriculum.start import starting_model
from tokenizer.training.curriculum.torch_engine import Layout, TorchEngine

CPU = torch.device("cpu")
STEPS = 3


def steps(layout: Layout, rank: int, folder: Path) -> None:
    """Losses and histories after `STEPS` steps and one more, by this engine and by one that goes on from its state."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/{layout}", rank=rank, world_size=2)
    delayed = "fp8={fp8_recipe: delayed, fp8_amax_history_len: 8}"
    config = pictures_alone("precision=bf16", delayed, "optimizer.warmup=0", f"out={folder}/{layout}")
    processes = Processes(CPU)

    def engine() -> TorchEngine:
        model = starting_model(config, None, lambda: [])
        return TorchEngine(model, make_objective(config, CPU), config, processes, CPU, layout)

    preparer = Preparer(processes, CPU, (4, 16, 16), None, None, config.seed, None)
    loader = open_training_loader(config.data, seed=0, rank=rank, world=2, quarantine_file=None)
    batches = [preparer([next(loader)], step) for step in range(STEPS + 1)]
    trained = engine()
    losses = []
    for step, prepared in enumerate(batches[:STEPS]):
        losses.append(trained.forward_backward(prepared)["loss"])
        assert trained.clip_and_step(step, losses[-1]).done
    state = trained.state_dict()
    if rank == 0:
        torch.save(state, folder / f"{layout}-state.pt")
    processes.wait()
    resumed = engine()
    resumed.load_state_dict(torch.load(folder / f"{layout}-state.pt"))
    assert trained.conversion is not None
    histories = trained.conversion.state_dict()
    onward = [one.forward_backward(batches[STEPS])["loss"] for one in (trained, resumed)]
    found = {"losses": losses, "histories": histories, "onward": onward, "fused": fused_history(rank)}
    torch.save(found, folder / f"{layout}-{rank}.pt")
    dist.destroy_process_group()


def fused_history(rank: int) -> list[float]:
    """What fused blocks remember of two steps with magnitudes of 1 and 2, and of 4 and 3 in the other process."""
    scales = Scales(FP8Config(fp8_recipe="delayed", fp8_amax_history_len=2), ["block"], CPU)
    for magnitude in ((1.0, 2.0), (4.0, 3.0))[rank]:
        scales.rounded(0, lambda _, largest, found=magnitude: largest.fill_(found), remember=True)  # type: ignore[misc]
        scales.move_on()
    history: list[float] = scales.history[0].tolist()
    return history


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ("ddp", "fsdp2"):
        children = [fork(lambda r=rank, k=name: steps(k, r, Path(sys.argv[1]))) for rank in range(2)]  # type: ignore[misc]
        assert [status_of(child) for child in children] == [0, 0]
