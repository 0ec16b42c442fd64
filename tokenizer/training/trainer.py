"""The plain loop: one process, one device, exact on resume."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tokenizer.atomic import atomic_path
from tokenizer.config import config_to_dict
from tokenizer.errors import InputError
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.training.config import TrainConfig
from tokenizer.training.objective import Objective, psnr_by_kind
from tokenizer.training.optimizer import MovingAverage, make_optimizers, rate_factor, set_rates
from tokenizer.training.progress import training_progress
from tokenizer.training.state import load_state, save_state
from tokenizer.training.store import TrainingStore

LOG_FILE = "log.jsonl"
MAX_BAD_STEPS = 20
_VALIDATION_STREAM = 2**32
"""Validation batches are drawn from seeds that no training step uses."""


class Trainer:
    """Trains `network` as `config` says; `run` goes on where an earlier run in the same folder stopped.

    Args:
        config: the run.
        network: with its starting parameters, float32.
        perceptual: see `Objective`.
        device: where to train.
    """

    def __init__(
        self,
        config: TrainConfig,
        network: ATokenNetwork,
        perceptual: torch.nn.Module | None,
        device: torch.device,
    ) -> None:
        self.config = config
        self.device = device
        self.network = network.to(device)
        self.objective = Objective(config.loss, perceptual.to(device) if perceptual is not None else None)
        self.store = TrainingStore(config.data, config.batch)
        held_out = TrainingStore(config.data, config.batch, validation=True)
        patch = network.config.patch_size
        self.validation = [held_out.batch(config.batch, patch, (config.seed, _VALIDATION_STREAM, i)) for i in range(4)]
        self.optimizers = make_optimizers(self.network, config.optimizer)
        self.average = MovingAverage(self.network, config.optimizer.ema)
        self.generator = torch.Generator(device=device).manual_seed(config.seed)
        self.folder = Path(config.out)
        self.settings = config_to_dict(config)
        self.bad_steps = 0
        self.console = Console(stderr=True)

    def run(self) -> ATokenNetwork:
        """Train to the end and return the network with averaged weights.

        Raises:
            InputError: too many steps with a loss or gradient that is not finite; the state before them is on disk.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        step = load_state(
            self.folder, self.network, self.average.network, self.optimizers, self.generator, self.settings
        )
        forget_log_after(self.folder / LOG_FILE, step)
        if step == 0:
            self._log({"step": 0, **self._validate()})
        with training_progress(self.console) as bar:
            task = bar.add_task(self.config.name, total=self.config.steps, completed=step, note="")
            while step < self.config.steps:
                record = self._step(step)
                step += 1
                validated = step % self.config.validate_every == 0 or step == self.config.steps
                if validated:
                    record |= self._validate()
                    shown = {key: value for key, value in record.items() if key.startswith(("psnr", "loss"))}
                    bar.console.print(
                        f"step {step}: " + "  ".join(f"{key} {value:.3f}" for key, value in shown.items())
                    )
                if step % 10 == 0 or validated:
                    self._log({"step": step, **record})
                bar.update(task, completed=step, note=f"loss {record['loss']:.4f}")
                if step % self.config.save_every == 0 or step == self.config.steps:
                    self._save(step)
        return self.average.network

    def _step(self, step: int) -> dict[str, float]:
        started = time.perf_counter()
        batch = self.store.batch(self.config.batch, self.network.config.patch_size, (self.config.seed, step))
        waited = time.perf_counter() - started
        factor = rate_factor(step, self.config.steps, self.config.optimizer)
        set_rates(self.optimizers, factor)
        with self._autocast():
            loss, terms = self.objective(self.network, _to(batch, self.device), step, self.generator)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optimizer.max_grad_norm)
        if math.isfinite(float(loss.detach())) and math.isfinite(float(norm)):
            for optimizer in self.optimizers:
                optimizer.step()
            self.average.update(self.network, step)
            self.bad_steps = 0
        else:
            self._count_bad_step(step)
        self.network.zero_grad(set_to_none=True)
        return {
            "loss": float(loss.detach()),
            **{name: float(term) for name, term in terms.items()},
            "grad norm": float(norm),
            "rate": factor,
            "tokens": batch.patches.num_tokens,
            "seconds": time.perf_counter() - started,
            "data seconds": waited,
        }

    def _count_bad_step(self, step: int) -> None:
        self.bad_steps += 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise InputError(
                f"{MAX_BAD_STEPS} steps in a row up to step {step} had a loss or gradient that is not finite; "
                "lower optimizer.lr or look at the data"
            )

    def _validate(self) -> dict[str, float]:
        with self._autocast():
            found = psnr_by_kind(self.average.network, [_to(batch, self.device) for batch in self.validation])
        return {f"psnr {kind}": value for kind, value in found.items()}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def _save(self, step: int) -> None:
        save_state(
            self.folder, step, self.network, self.average.network, self.optimizers, self.generator, self.settings
        )

    def _log(self, record: dict[str, Any]) -> None:
        with (self.folder / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def forget_log_after(path: Path, step: int) -> None:
    """Drop what a stopped run logged after its last state; those steps come again."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    with atomic_path(path) as temporary:
        temporary.write_text("".join(line for line in lines if _precedes(line, step)), encoding="utf-8")


def _precedes(line: str, step: int) -> bool:
    """Whether a line of the log is whole and belongs to what a state of `step` steps holds."""
    try:
        return step > 0 and int(json.loads(line)["step"]) <= step
    except json.JSONDecodeError:
        return False


def _to(batch: Any, device: torch.device) -> Any:
    import dataclasses

    return batch if device.type == "cpu" else dataclasses.replace(batch, patches=batch.patches.to(device))
