"""From a configuration file to a run: everything that can be wrong is found here, before the first step.

Started alone it is one process; started by torchrun, one of several.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from tokenizer.atomic import remove_leftovers
from tokenizer.config import config_to_dict, load_config
from tokenizer.errors import InputError
from tokenizer.lock import LOCK, only_run
from tokenizer.losses.networks import ImageNetwork, make_image_network
from tokenizer.text.alignment import open_tower
from tokenizer.text.protocol import TextTower
from tokenizer.training.curriculum.checkpoint import CHECKPOINTS, Checkpoints, newest_good
from tokenizer.training.curriculum.config import RunConfig, network_config
from tokenizer.training.curriculum.engine import Engine
from tokenizer.training.curriculum.flops import Work, measured_peak
from tokenizer.training.curriculum.loop import Loop
from tokenizer.training.curriculum.meeting import one_voice, process_group
from tokenizer.training.curriculum.model import TrainedModel
from tokenizer.training.curriculum.objective import Objective, make_objective
from tokenizer.training.curriculum.packed import check_voxels
from tokenizer.training.curriculum.preparation import Preparer
from tokenizer.training.curriculum.processes import Processes
from tokenizer.training.curriculum.records import Records
from tokenizer.training.curriculum.start import starting_model
from tokenizer.training.curriculum.tasks import IMAGE_RECONSTRUCTION, TASKS, VIDEO_RECONSTRUCTION, is_understanding
from tokenizer.training.curriculum.torch_engine import TorchEngine
from tokenizer.training.curriculum.validation import Validation
from tokenizer.training.feeding import StepBatch, StepSource, find_held_out, find_opener

_PIXELS = (IMAGE_RECONSTRUCTION, VIDEO_RECONSTRUCTION)

HOST_THREADS = 2
"""Threads of the host beside a GPU, where nothing else is said. What it computes there is small; a thread for each core
would mostly wait for the others, and take cores from the data's workers."""

QUARANTINE = "quarantine.jsonl"
"""File of a run that names broken samples."""


def launch(path: Path, overrides: Sequence[str] = (), device: str = "auto") -> int:
    """Train as a YAML file and `key=value` say.

    Args:
        device: "cpu", "cuda" or "auto", which takes CUDA where there is one.

    Returns:
        The exit status: 0 at the end, 143 or 130 after a signal.

    Raises:
        InputError: anything wrong with settings, data or weights.
    """
    with one_voice() as meeting:
        config = load_config(RunConfig, path, overrides)
        chosen = choose_device(device)
        if chosen.type == "cuda" and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(HOST_THREADS)
        with process_group(meeting, chosen):
            return train(config, chosen)


MakeEngine = Callable[[TrainedModel, Objective, RunConfig, Processes, torch.device], Engine]


def torch_engine(
    model: TrainedModel, objective: Objective, config: RunConfig, processes: Processes, device: torch.device
) -> Engine:
    """The plain engine that `config.engine` names; a process that is alone has nobody to share with."""
    layout = config.engine if config.engine != "auto" else "ddp"
    if not processes.many:
        layout = "single"
    return TorchEngine(model, objective, config, processes, device, layout)


def train(
    config: RunConfig,
    device: torch.device,
    processes: Processes | None = None,
    make_engine: MakeEngine = torch_engine,
) -> int:
    """Train as `config` says, in this process or, where `torch.distributed` is initialised, in all of its.

    Args:
        processes, make_engine: of another engine than the plain one.
    """
    processes = processes or Processes(device)
    folder = Path(config.out)
    # Data first: that they are missing is the likeliest mistake, and found long before text towers are read.
    source = _open_source(config, processes)
    try:
        held_out = find_held_out(config.loader)(
            config.validation.sources, budget=config.validation.budget, limit=config.validation.limit
        )
        if config.gaussians is not None:
            check_voxels(chain.from_iterable(held_out.values()), config.gaussians)
        tower = None if config.text.tower == "none" else open_tower(config.text.tower, config.text.folder, device)
        teacher = _teacher(config, tower, device)
        objective = make_objective(config, device)
        records = Records(folder, f"{config.name} stage {config.stage.number}", config.steps, active=processes.first)

        def patches_to_fit() -> Iterator[StepBatch]:
            records.say(f"fitting linear codes to {config.start.patches} patches of each sort: minutes, once in a run")
            return training_batches(config)

        # A run that goes on has its linear codes in its checkpoint. One process looks: checksums read all of it.
        newest = newest_good(folder / CHECKPOINTS) if processes.first else None
        goes_on = processes.from_first(newest is not None)
        model = starting_model(config, tower, None if goes_on else patches_to_fit)
        # Counted before FSDP2 replaces the parameters by shares of them.
        work = Work(model)
        patch_size = network_config(config).patch_size
        engine = make_engine(model, objective, config, processes, device)
        if isinstance(engine, TorchEngine) and engine.conversion is not None:
            records.say(engine.conversion.describe())
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        peak = config.peak_tflops * 1e12 if config.peak_tflops else measured_peak(device, dtype)
        loop = Loop(
            config,
            engine,
            Preparer(
                processes,
                device,
                patch_size,
                tower,
                teacher,
                config.seed,
                config.perceptual_images,
                config.choices.imitated_width if config.loss.imitation else None,
                bf16=config.precision == "bf16",
            ),
            source,
            Validation(held_out, engine, processes, patch_size, tower, model.gaussians),
            records,
            Checkpoints(folder / CHECKPOINTS, config.checkpoint.keep_last, records.say),
            processes,
            work=work,
            peak=peak * processes.copy_size,
            gaussians=model.gaussians,
            alignment=config_to_dict(model.alignment.config) if model.alignment is not None else None,
        )
        with only_run(folder) if processes.first else nullcontext():
            if processes.first:
                remove_leftovers(folder, LOCK)
            return loop.run()
    finally:
        source.close()


def _open_source(config: RunConfig, processes: Processes) -> StepSource:
    source = find_opener(config.loader)(
        config.data,
        seed=config.seed,
        rank=processes.rank,
        world=processes.world,
        quarantine_file=Path(config.out) / QUARANTINE if processes.leads else None,
    )
    tasks = [str(task) for task in source.reports]
    if unknown := [task for task in tasks if task not in TASKS]:
        raise InputError(f"data: unknown tasks {', '.join(unknown)}; known: {', '.join(TASKS)}")
    aligned = [task for task in tasks if is_understanding(task)]
    if aligned and config.text.tower == "none":
        raise InputError(
            f"{', '.join(aligned)} needs a text tower; set text.tower to siglip2 or minilm, or leave it out of data"
        )
    return source


def training_batches(config: RunConfig) -> Iterator[StepBatch]:
    """What a run trains reconstruction of pictures and clips on, from its beginning; the same in every process.

    Beside the source of the run. Other tasks are not read: looking at many crops would take minutes longer.
    """
    source = find_opener(config.loader)(
        pixels_alone(config.data), seed=config.seed, rank=0, world=1, quarantine_file=None
    )
    try:
        yield from chain.from_iterable(iter(lambda: next(source, ()), ()))
    finally:
        source.close()


def pixels_alone(data: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a loader that reads pictures and clips for reconstruction and nothing else, where it has any."""
    ratios = {task: ratio for task, ratio in data.get("ratios", {}).items() if task in _PIXELS}
    if not ratios:
        return dict(data)
    sources = [source for source in data.get("sources", ()) if source.get("task") in ratios]
    return {**data, "ratios": ratios, "every_step": [], "sources": sources}


def _teacher(config: RunConfig, tower: TextTower | None, device: torch.device) -> ImageNetwork | None:
    """SigLIP 2's image tower where its weights are named and its text tower is the run's."""
    if config.choices.siglip2 is None or config.text.tower != "siglip2" or tower is None:
        return None
    teacher = make_image_network(config.choices.siglip2, device)
    if teacher.width != tower.width:
        raise InputError(
            f"{config.choices.siglip2}: gives vectors of {teacher.width} numbers, the text tower of {tower.width}; "
            "name the two towers of one checkpoint"
        )
    return teacher


def choose_device(name: str) -> torch.device:
    """The device of this process: "cpu", "cuda" or "auto"; under torchrun the GPU of its local rank.

    Raises:
        InputError: no such device, or fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device '{name}'; use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here; use --device cpu")
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise InputError(f"{torch.cuda.device_count()} GPUs here for more processes; start one for each")
        torch.cuda.set_device(device)
    return device
