"""Processes of the tests of bfloat16 training with Megatron: python -m tests.tokenizer.megatron_bf16_processes FOLDER.

With each of Megatron's two optimizers one process takes steps and writes a checkpoint, which then goes around: every
layout reads what the one before has written, looks at all of it, writes it again and takes a step.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.tokenizer.megatron_training_processes import Run, in_processes
from tokenizer.megatron.config import ParallelConfig
from tokenizer.megatron.cpu import on_cpu
from tokenizer.megatron.engine import load_megatron
from tokenizer.training.curriculum.optimization import averaging_weight, decays, group_of, rate_factors

ONE = ParallelConfig(bf16=True)
LAYOUTS = {
    "one": ONE,
    "tp": replace(ONE, tensor_model_parallel_size=2, sequence_parallel=True),
    "pp": replace(ONE, pipeline_model_parallel_size=2),
    "dp": ONE,
    "back": ONE,
}
"""In the order of the round."""
WORLDS = {"one": 1, "tp": 2, "pp": 2, "dp": 2, "back": 1}
KINDS = {"whole": False, "distributed": True}
"""Of optimizer."""
STEPS = 3
STATE = ("main", "exp_avg", "exp_avg_sq")


def run_one(kind: str, rank: int, name: str) -> None:
    """One layout of a round; into KIND-NAME-RANK.json."""
    store = f"file://{Path.cwd()}/{kind}-{name}-store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLDS[name])
    with on_cpu():
        run = Run(replace(LAYOUTS[name], use_distributed_optimizer=KINDS[kind]), precision="bf16")
        found = begin(run) if name == "one" else go_on(run, kind, name)
        keep(run, kind, name)
        found["seen"] = run.seen()
        found["next"] = run.step()
        Path(f"{kind}-{name}-{rank}.json").write_text(json.dumps(found))
        dist.barrier()
        dist.destroy_process_group()


def begin(run: Run) -> dict[str, Any]:
    """Steps from the start, and what they do to each piece that the optimizer moves."""
    engine, settings = run.engine, run.config.optimizer
    expected = {piece.own: piece.main.detach().clone() for piece in engine.pieces}
    found: dict[str, Any] = {"misplaced": misplaced(engine), "rounded": rounded(engine), "moved unused": []}
    found["steps"] = []
    for step in range(STEPS):
        before = {piece.own: piece.main.detach().clone() for piece in engine.pieces}
        found["steps"].append(run.step())
        for piece in engine.pieces:
            if piece.name not in engine._used and not torch.equal(before[piece.own], piece.main):
                found["moved unused"].append(piece.own)
            expected[piece.own].lerp_(piece.main.detach(), averaging_weight(settings.ema, step, settings.ema_warmup))
    found["wrong rates"] = wrong_rates(run)
    found["average"] = [name for name, value in expected.items() if not torch.equal(engine.average.values[name], value)]
    found["misplaced"] += misplaced(engine)
    return found


def go_on(run: Run, kind: str, name: str) -> dict[str, Any]:
    """Read what the layout before has written."""
    before = list(LAYOUTS)[list(LAYOUTS).index(name) - 1]
    run.engine.load_state_dict(torch.load(f"{kind}-{before}.pt", weights_only=True)["state"])
    run.engine.load_shards(Path(f"{kind}-{before}-shards"))
    for _ in range(STEPS):
        run.prepared()
    run.done = STEPS
    return {"misplaced": misplaced(run.engine)}


def keep(run: Run, kind: str, name: str) -> None:
    """Write a checkpoint, and beside it all that the optimizer has, whole."""
    state = run.engine.state_dict()
    optimizer = {part: whole(run.engine, part) for part in STATE}
    run.engine.save_shards(Path(f"{kind}-{name}-shards"))
    run.engine.save_model(Path(f"{kind}-{name}-model"))
    if dist.get_rank() == 0:
        torch.save({"state": state, **optimizer}, f"{kind}-{name}.pt")


def whole(engine: Any, part: str) -> dict[str, Tensor]:
    """What the optimizer has of all parameters, by the names of a `TrainedModel`: it travels as averages do."""
    kept = engine.average.values
    states = engine.optimizer.chained_optimizers[0].optimizer.state
    engine.average.values = {
        piece.own: (piece.main if part == "main" else states[piece.main][part]).detach() for piece in engine.pieces
    }
    try:
        tensors: Mapping[str, Tensor] = engine.state_dict().get("average", {})
        return dict(tensors)
    finally:
        engine.average.values = kept


def misplaced(engine: Any) -> list[str]:
    """Pieces that do not round to what is at their place of their parameter."""
    parameters = dict(engine.model.named_parameters())
    found = []
    for piece in engine.pieces:
        place = piece.of(parameters[piece.own])
        if not torch.equal(piece.main.to(place.dtype), place):
            found.append(piece.own)
    return found


def rounded(engine: Any) -> list[str]:
    """Pieces of the network's matrices that have lost to bfloat16 what they were drawn with."""
    return [
        piece.own
        for piece in engine.pieces
        if piece.own.startswith("network.")
        and decays(piece.name, engine.model.get_parameter(piece.own))
        and torch.equal(piece.main, piece.main.bfloat16().float())
    ]


def wrong_rates(run: Run) -> list[str]:
    """Pieces that Adam does not move at the rate of their group, or decays where it should not."""
    settings, groups = run.config.optimizer, run.engine.optimizer.param_groups
    rates = {tensor: (group["lr_mult"], group["weight_decay"]) for group in groups for tensor in group["params"]}
    found = []
    for piece in run.engine.pieces:
        decay = settings.weight_decay * decays(piece.name, run.engine.model.get_parameter(piece.own))
        if rates[piece.main] != (rate_factors(settings)[group_of(piece.name)], decay):
            found.append(piece.own)
    return found


def reference(rank: int) -> None:
    """The same steps of the plain engine, for what bfloat16 makes of its norms."""
    del rank
    run = Run(None, precision="bf16")
    Path("reference.json").write_text(json.dumps([run.step() for _ in range(STEPS)]))


def work(folder: Path) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    load_megatron()
    statuses = {"reference": in_processes(1, reference)}
    for kind in KINDS:
        for name, world in WORLDS.items():
            statuses[f"{kind} {name}"] = in_processes(
                world,
                lambda rank, kind=kind, name=name: run_one(kind, rank, name),  # type: ignore[misc]
            )
    Path("statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
