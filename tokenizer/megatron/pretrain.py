"""Training with Megatron-Core on a cluster:

    torchrun --nproc-per-node 8 -m tokenizer.megatron.pretrain --config FILE key=value ...

FILE is the YAML that `atoken train` takes. Its section `megatron:` has the layout under Megatron's own names
(`tokenizer.megatron.config.ParallelConfig`); `precision` says whether parameters are bfloat16. An example for Slurm is
`scripts/pretrain.sbatch`. All processes need the same view of the run's folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from tokenizer.cli.outcome import run
from tokenizer.config import load_config, parse_config
from tokenizer.errors import InputError
from tokenizer.megatron.build import initialise_parallel
from tokenizer.megatron.config import ParallelConfig, check_layout
from tokenizer.megatron.cpu import on_cpu
from tokenizer.megatron.engine import load_megatron
from tokenizer.training.curriculum.config import RunConfig, network_config
from tokenizer.training.curriculum.engine import Engine
from tokenizer.training.curriculum.launch import choose_device, train
from tokenizer.training.curriculum.meeting import one_voice, process_group
from tokenizer.training.curriculum.model import TrainedModel
from tokenizer.training.curriculum.objective import Objective
from tokenizer.training.curriculum.processes import Processes

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
"""What `recompute: true` is to Megatron."""


def read_settings(path: Path, overrides: Sequence[str], world: int) -> tuple[RunConfig, ParallelConfig]:
    """Settings of a run and its layout, checked against each other and the number of processes.

    Raises:
        InputError: unknown or contradicting settings, or a layout that this model or `world` processes cannot have.
    """
    config = load_config(RunConfig, path, overrides)
    parallel = layout_of(config, str(path))
    check_layout(network_config(config), parallel, world)
    return config, parallel


def layout_of(config: RunConfig, where: str) -> ParallelConfig:
    """The section `megatron:` of a run, with what `fp8:` and `recompute:` say where it says nothing itself.

    Raises:
        InputError: unknown or contradicting settings, or some that this engine has not.
    """
    if config.optimizer.muon_lr is not None or config.optimizer.plain_lr is not None:
        raise InputError(
            f"{where}: optimizer.muon_lr and plain_lr belong to atoken train; Megatron trains all with AdamW at "
            "optimizer.lr, so leave them out"
        )
    from_precision = config.precision == "bf16"
    from_fp8 = config.fp8.megatron_options() if config.fp8 is not None else {}
    options = {"bf16": from_precision, **from_fp8, **config.megatron}
    if config.recompute and "recompute_granularity" not in config.megatron:
        options |= RECOMPUTE
    parallel = parse_config(ParallelConfig, options, f"{where}: megatron")
    if parallel.bf16 != from_precision:
        raise InputError(f"{where}: megatron.bf16 is {parallel.bf16}, precision is {config.precision}; leave bf16 out")
    if parallel.overlap_grad_reduce or parallel.overlap_param_gather:
        raise InputError(
            f"{where}: megatron.overlap_grad_reduce and overlap_param_gather need every parameter in every step, and "
            "the tasks of a step use different ones; leave them off"
        )
    return parallel


def launch(path: Path, overrides: Sequence[str] = (), device: str = "auto") -> int:
    """Train as a YAML file and `key=value` say, in this process and all others that torchrun has started.

    Args:
        device: "cpu", "cuda" or "auto", which takes CUDA where there is one.

    Returns:
        The exit status: 0 at the end, 143 or 130 after a signal.

    Raises:
        InputError: anything wrong with settings, data, weights or installed packages.
    """
    with one_voice() as meeting:
        config, parallel = read_settings(path, overrides, meeting.world if meeting is not None else 1)
        chosen = choose_device(device)
        load_megatron(parallel.transformer_impl == "transformer_engine")
        with process_group(meeting, chosen, also_alone=True), on_cpu() if chosen.type == "cpu" else nullcontext():
            return train_together(config, parallel, chosen)


def train_together(config: RunConfig, parallel: ParallelConfig, device: torch.device) -> int:
    """Train where processes have met already (`torch.distributed`), inside `on_cpu()` if on one."""
    initialise_parallel(network_config(config), parallel)
    from tokenizer.megatron.copies import Copies
    from tokenizer.megatron.training import MegatronEngine

    def make(
        model: TrainedModel, objective: Objective, config: RunConfig, processes: Processes, device: torch.device
    ) -> Engine:
        return MegatronEngine(model, objective, config, parallel, processes, device)

    return train(config, device, Copies(device), make)


def main(arguments: list[str]) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tokenizer.megatron.pretrain", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, see configs/tokenizer/stages/")
    parser.add_argument("--device", default="auto", help="cpu or cuda; auto takes CUDA where there is one")
    parser.add_argument("overrides", nargs="*", help="settings to change, as key=value")
    options = parser.parse_args(arguments)
    # Megatron's order of communication and computation relies on it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    return run(lambda: launch(options.config, options.overrides, options.device))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
