"""What is measured: an engine with a model of its own, stepping on one batch.

Every model starts from the same seed. Float32 parameters are the native engine's whatever the precision; Megatron's are
bfloat16 with bf16, and float32 inside its optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from benchmarks.training_parts import memory
from benchmarks.training_parts.batches import gaussian_sizes, make_step
from tokenizer.errors import InputError
from tokenizer.fp8 import FP8Config
from tokenizer.losses.weights import LossWeights
from tokenizer.megatron.pretrain import layout_of
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import ATokenConfig
from tokenizer.text.alignment import AlignmentConfig, TextAlignment
from tokenizer.training.curriculum.config import RunConfig, StageConfig
from tokenizer.training.curriculum.engine import Engine
from tokenizer.training.curriculum.flops import Count, Work
from tokenizer.training.curriculum.model import TrainedModel
from tokenizer.training.curriculum.objective import make_objective
from tokenizer.training.curriculum.processes import Processes
from tokenizer.training.curriculum.tasks import ASSET_RECONSTRUCTION, is_understanding
from tokenizer.training.curriculum.torch_engine import TorchEngine

EngineName = Literal["native", "megatron"]
Precision = Literal["fp32", "bf16", "fp8"]
Specs = Literal["local", "transformer_engine"]


@dataclass(frozen=True)
class Setting:
    """What all engines step on.

    sizes: of the model. task: of the batches. tokens: budget of a micro-batch. micro_batches: of a step.
    compile, attention: of the native engine, as a run's. fp8: what "fp8" means. alike: pictures have one size.
    """

    sizes: ATokenConfig
    task: str
    tokens: int
    micro_batches: int
    device: torch.device
    compile: bool = False
    attention: Literal["varlen", "cudnn"] = "varlen"
    fp8: FP8Config = field(default_factory=FP8Config)
    alike: bool = False


@dataclass(frozen=True)
class Times:
    """Seconds of a step: of the passes forward and backward, and of clipping, optimizer and average."""

    passes: float
    update: float

    @property
    def whole(self) -> float:
        return self.passes + self.update


class Subject:
    """An engine and its batches; `step` is what is timed.

    Args:
        engine: "native" or "megatron"; the latter inside `megatron_process`.
        specs: of Megatron's layers.

    Attributes:
        tokens, work: of a step.
        times: of every step after the first, which is made here: it allocates what the optimizer keeps.
        held, transient: bytes that stay between steps, and the most that a step takes besides.
    """

    def __init__(self, engine: EngineName, precision: Precision, setting: Setting, specs: Specs = "local") -> None:
        self.engine, self.precision, self.device = engine, precision, setting.device
        self.times: list[Times] = []
        self.transient: int | None = 0
        self._number = 0
        before = memory.held(self.device)
        model = make_model(setting)
        work, config = Work(model), run_config(setting, precision, specs)
        self.batches = make_step(
            setting.task,
            setting.tokens,
            setting.micro_batches,
            setting.sizes,
            self.device,
            gaussian_sizes(setting.sizes).resolution,
            alike=setting.alike,
        )
        self.tokens = sum(batch.tokens.num_tokens for batch in self.batches)
        self.work = _sum(work.count(batch.tokens, batch.task) for batch in self.batches)
        with self._inside():
            if engine == "native":
                self._engine = _native(model, config, setting)
            else:
                self._engine = _megatron(model, config, self.device)
        del model
        self.step()
        self.times.clear()
        after = memory.held(self.device)
        self.held = after - before if after is not None and before is not None else None

    def step(self) -> None:
        """One training step of a run: forward, backward, clip, optimizer, average."""
        held = memory.held(self.device)
        memory.forget_peak(self.device)
        with self._inside():
            start = time.perf_counter()
            losses = self._engine.forward_backward(self.batches)
            _wait(self.device)
            middle = time.perf_counter()
            outcome = self._engine.clip_and_step(self._number, losses["loss"])
            _wait(self.device)
            end = time.perf_counter()
        if not outcome.done:
            raise InputError(
                f"step {self._number} of {self.engine} in {self.precision} was not finite; nothing to time"
            )
        self._number += 1
        self.times.append(Times(middle - start, end - middle))
        peak = memory.peak(self.device)
        if self.transient is not None:
            known = peak is not None and held is not None
            self.transient = max(self.transient, peak - held) if known else None  # type: ignore[operator]

    @property
    def best(self) -> Times:
        """The fastest step so far."""
        return min(self.times, key=lambda times: times.whole)

    @property
    def peak(self) -> int | None:
        """Bytes that this engine alone would hold at most."""
        return None if self.held is None or self.transient is None else self.held + self.transient

    def _inside(self) -> AbstractContextManager[None]:
        """Where Megatron's calls of CUDA mean the CPU; the native engine is not slowed down by it."""
        if self.engine == "native" or self.device.type != "cpu":
            return nullcontext()
        from tokenizer.megatron.cpu import on_cpu

        return on_cpu()


def make_model(setting: Setting) -> TrainedModel:
    """The parts that the task trains, float32, drawn from one seed."""
    sizes, device = setting.sizes, setting.device
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        network = ATokenNetwork(sizes)
        network.reset_parameters(generator)
        alignment = gaussians = None
        if is_understanding(setting.task):
            width = sizes.encoder.width
            alignment = TextAlignment(
                AlignmentConfig(width=width, text_width=width, tower="siglip2", tower_name="made up", projection=False)
            )
        if setting.task == ASSET_RECONSTRUCTION:
            from tokenizer.gaussians.decoder import GaussianDecoder

            gaussians = GaussianDecoder(gaussian_sizes(sizes))
            gaussians.reset_parameters(generator)
    return TrainedModel(network, alignment, gaussians).train()


def run_config(setting: Setting, precision: Precision, specs: Specs) -> RunConfig:
    """Settings of a run as published, without perceptual networks: they are no part of the model."""
    return RunConfig(
        name=setting.sizes.name,
        stage=StageConfig(number=1, name="benchmark"),
        model=setting.sizes,
        steps=1000,
        data={},
        out="nowhere",
        loss=LossWeights(lpips=0.0, gram=0.0, clip=0.0),
        gaussians=gaussian_sizes(setting.sizes) if setting.task == ASSET_RECONSTRUCTION else None,
        precision="fp32" if precision == "fp32" else "bf16",
        fp8=setting.fp8 if precision == "fp8" else None,
        compile=setting.compile,
        attention=setting.attention,
        megatron={"transformer_impl": specs},
    )


def _native(model: TrainedModel, config: RunConfig, setting: Setting) -> Engine:
    objective = make_objective(config, setting.device)
    return TorchEngine(model, objective, config, Processes(setting.device), setting.device, "single")


def _megatron(model: TrainedModel, config: RunConfig, device: torch.device) -> Engine:
    from tokenizer.megatron.copies import Copies
    from tokenizer.megatron.training import MegatronEngine

    objective, layout = make_objective(config, device), layout_of(config, "benchmark")
    return MegatronEngine(model, objective, config, layout, Copies(device), device)


@contextmanager
def megatron_process(setting: Setting, specs: Specs) -> Iterator[None]:
    """Megatron's groups for a process that is alone; Megatron must have been loaded (`load_megatron`)."""
    from megatron.core import parallel_state

    from tokenizer.megatron.build import initialise_parallel
    from tokenizer.megatron.cpu import on_cpu

    on_a_cpu = setting.device.type == "cpu"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo" if on_a_cpu else "nccl", store=store, rank=0, world_size=1)
    try:
        with on_cpu() if on_a_cpu else nullcontext():
            initialise_parallel(setting.sizes, layout_of(run_config(setting, "fp32", specs), "benchmark"))
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _sum(counts: Iterator[Count] | Sequence[Count]) -> Count:
    every = list(counts)
    return Count(sum(count.weights for count in every), sum(count.attention for count in every))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
