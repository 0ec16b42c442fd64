"""The loop of a run: batches in, steps, logs, validation, checkpoints; it goes on where an earlier one stopped.

What a step does depends on the settings, the number of the step and the weights before it, and on nothing else: batches
come from the loader's state, noise from the seed and the step. So a run that was killed at any moment and started again
gives, bit for bit on a CPU, what it would have given.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from tokenizer.atomic import atomic_path
from tokenizer.config import changed_settings, config_to_dict
from tokenizer.errors import InputError
from tokenizer.gaussians.decoder import GaussianDecoder
from tokenizer.tensorio import write_pt
from tokenizer.training.curriculum.checkpoint import SHARDS, Checkpoints, read_loop, read_tensors
from tokenizer.training.curriculum.config import RunConfig
from tokenizer.training.curriculum.engine import Engine, Outcome, ShardedEngine
from tokenizer.training.curriculum.flops import Work
from tokenizer.training.curriculum.interruption import Interruption, exit_status
from tokenizer.training.curriculum.packed import check_voxels
from tokenizer.training.curriculum.pictures import Pair, pairs_of, save_sheet
from tokenizer.training.curriculum.preparation import Prepared, Preparer
from tokenizer.training.curriculum.processes import Processes
from tokenizer.training.curriculum.records import Records
from tokenizer.training.curriculum.start import MODEL, STEPS
from tokenizer.training.curriculum.tasks import is_understanding
from tokenizer.training.curriculum.validation import Validation
from tokenizer.training.feeding import StepBatch, StepSource
from tokenizer.training.progress import BAD_STEPS, Progress

PICTURES = "pictures"
"""Folder in that of a run."""

MAY_CHANGE = frozenset(
    {"steps", "out", "data", "validation", "log", "checkpoint", "accumulation", "engine", "max_bad_steps"}
    | {"peak_tflops", "start", "megatron", "fp8", "compile", "recompute", "attention"}
    | {f"optimizer.{name}" for name in ("lr", "min_lr", "plain_lr", "warmup", "schedule", "decay_fraction")}
    | {f"optimizer.{name}" for name in ("weight_decay", "max_grad_norm", "ema", "ema_warmup")}
    | {"text.folder", "gaussians.packing"}
)
"""Settings that a run may go on with changed. The loader judges its own; without a checkpoint `start` has its say. FP8
is how products are rounded, not what is trained: a run may end in bfloat16, or go on in FP8 after a careful start; and
which kernels compute, and when, is up to the machine that it goes on with, and so is where frozen networks lie. How
voxels were packed is told of data that stay what they are. Rates may be lowered where steps failed."""

MEASURED_ON = frozenset({"validation.sources", "validation.limit", "validation.budget"})
"""Settings with which scores cannot be compared with those of before; what is above the budget is not measured."""


@dataclass(slots=True)
class LoopProgress(Progress):
    """tokens: trained on, in all processes. best: score and step of the best checkpoint."""

    tokens: int = 0
    best: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Interval:
    """Steps of this process since the last line of the logs, without what else is done between them.

    tokens, work: trained on, and operations. seconds: of the steps. waited: of these for data.
    """

    tokens: float = 0.0
    work: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0


class Loop:
    """Runs a configuration to its end.

    Args:
        config: the run. folder: where it writes.
        engine, preparer, source, validation: its parts, of this process.
        work: counts operations; peak: operations a second of this process's device.
        records, checkpoints, processes: see there.
        gaussians: the model's decoder, for pictures.
        alignment: settings of the text alignment, kept in checkpoints.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        preparer: Preparer,
        source: StepSource,
        validation: Validation,
        records: Records,
        checkpoints: Checkpoints,
        processes: Processes,
        *,
        work: Work,
        peak: float,
        gaussians: GaussianDecoder | None = None,
        alignment: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.folder = config, Path(config.out)
        self.engine, self.preparer, self.source, self.validation = engine, preparer, source, validation
        self.records, self.checkpoints, self.processes = records, checkpoints, processes
        self.work, self.peak, self.gaussians, self.alignment = work, peak, gaussians, alignment
        self.settings = config_to_dict(config)
        self.progress = LoopProgress()
        self._interval = _Interval()
        self._saved = -1

    def run(self) -> int:
        """Train to the end, or until a signal asks to stop.

        Returns:
            0, or the exit status of `tokenizer.training.curriculum.interruption`.

        Raises:
            InputError: a checkpoint of other settings, data that end, or too many bad steps; what was done is on disk.
        """
        with Interruption() as interruption, self.records:
            self._resume()
            progress = self.progress
            if progress.step == 0:
                self._validate()
            if progress.step >= self.config.steps:
                self.records.say(
                    f"nothing is left to do: {progress.step} steps are done, and steps is {self.config.steps}"
                )
            stopped = 0
            while progress.step < self.config.steps and not stopped:
                self._step()
                stopped = int(self.processes.largest(interruption.signal))
                if stopped or progress.step % self.config.checkpoint.every == 0 or progress.step == self.config.steps:
                    self._save()
            if stopped and progress.step < self.config.steps:
                self.records.say(f"stopped after step {progress.step}; start again to go on")
                return exit_status(stopped)
            progress.judge(self.folder, self.records.say)
            self._save_model()
        return 0

    def _save_model(self) -> None:
        path = self.folder / MODEL
        if self.processes.first:
            with atomic_path(path) as new:
                self.engine.save_model(new)
                (new / STEPS).write_text(json.dumps({"steps": self.progress.step}), encoding="utf-8")
            self.records.say(f"wrote {path}")
        else:
            self.engine.save_model(path)
        self.processes.wait()

    # ------------------------------------------------------------------ a step

    def _step(self) -> None:
        step, began = self.progress.step, time.perf_counter()
        turns = self._turns(step)
        waited = time.perf_counter() - began
        if self.gaussians is not None:
            check_voxels(chain.from_iterable(turns), self.gaussians.config)
        prepared = self.preparer(turns, step)
        losses = self.engine.forward_backward(prepared)
        outcome = self.engine.clip_and_step(step, losses["loss"])
        self._count(prepared)
        self._interval.waited += waited
        self._interval.seconds += time.perf_counter() - began
        self.progress.count(outcome.done)
        if not outcome.done:
            self._bad_step(step, prepared)
        self._log(losses, outcome)
        if self.progress.step % self.config.log.pictures_every == 0:
            self._pictures(prepared)
        if self.progress.step % self.config.validation.every == 0 or self.progress.step == self.config.steps:
            self._validate()

    def _turns(self, step: int) -> list[Sequence[StepBatch]]:
        """What the loader gives for a step.

        Raises:
            InputError: the data ended or cannot be read, here or in another process; all that was done is saved first.
        """
        before = self.source.state_dict()
        turns, failure = [], None
        try:
            turns = [next(self.source) for _ in range(self.config.accumulation)]
        except StopIteration:
            failure = InputError(f"the training data ended after {step} steps; let its sources have epochs without end")
        except InputError as error:
            failure = error
        if self.processes.largest(float(failure is not None)):
            self._save(before)
            raise failure or InputError(f"another process has no data for step {step}")
        return turns

    def _count(self, prepared: Sequence[Prepared]) -> None:
        counted = [part for part in prepared if part.share]
        self.progress.tokens += int(sum({part.task: part.totals.tokens for part in counted}.values()))
        self._interval.tokens += sum(part.patches.places().num_tokens for part in counted)
        self._interval.work += sum(self.work.of(part.patches.places(), part.task) for part in counted)

    def _bad_step(self, step: int, prepared: Sequence[Prepared]) -> None:
        """Keep the batches of a step that was not finite, and of some before; stop after too many in a row."""
        progress = self.progress
        path = self.folder / BAD_STEPS / f"step-{step:06d}-process-{self.processes.rank}.pt"
        if self.processes.leads:
            with atomic_path(path) as temporary:
                write_pt([_inspectable(part) for part in prepared], temporary)
            # A step of every hundred would fill any disk in time.
            kept = sorted(path.parent.glob(f"step-*-process-{self.processes.rank}.pt"), key=lambda p: (len(p.name), p))
            for old in kept[: -2 * self.config.max_bad_steps]:
                old.unlink(missing_ok=True)
        self.records.say(f"step {step}: loss or gradient is not finite; skipped, its batches are in {path}")
        if progress.bad_row >= self.config.max_bad_steps:
            self._save()
            raise InputError(
                f"{progress.bad_row} steps in a row up to step {step} had a loss or gradient that is not finite; start "
                f"again with a lower optimizer.lr, or look at the batches in {path.parent}"
            )

    # ------------------------------------------------------------------ what people see

    def _log(self, losses: dict[str, float], outcome: Outcome) -> None:
        progress = self.progress
        note = f"loss {losses['loss']:.4f}"
        self.records.advance(progress.step, note)
        if progress.step % self.config.log.every and progress.step != self.config.steps:
            return
        packing = self._packing()
        self.records.metrics(
            progress.step,
            {
                **losses,
                **{f"norm/{part}": norm for part, norm in outcome.norms.items()},
                **{f"rate/{group}": rate for group, rate in outcome.rates.items()},
                **packing,
                "tokens": progress.tokens,
                "bad steps": progress.bad,
            },
        )
        seconds = self._interval.seconds
        tokens, work = self.processes.sum([self._interval.tokens, self._interval.work])
        self.records.speed(
            progress.step,
            {
                "seconds": seconds,
                "tokens a second": tokens / seconds,
                "utilisation": work / seconds / self.peak / self.processes.world,
                "data wait": self.processes.largest(self._interval.waited / seconds),
            },
        )
        self.records.report(progress.step, f"{note}, {tokens / seconds:,.0f} tokens/s")
        self._interval = _Interval()

    def _packing(self) -> dict[str, float]:
        """How much of the batches is left free by task, and how many samples were too large for any, if some were."""
        found = {str(task): (report.running, report.skipped) for task, report in self.source.reports.items()}
        own = [count for waste, skipped in found.values() for count in (waste.wasted, waste.tokens, skipped)]
        every = self.processes.sum(own)
        logged = {}
        for task, wasted, tokens, skipped in zip(found, every[::3], every[1::3], every[2::3], strict=True):
            logged[f"waste/{task}"] = wasted / max(1.0, wasted + tokens)
            if skipped:
                logged[f"too large/{task}"] = skipped
        return logged

    def _validate(self) -> None:
        found = self.validation()
        if not found:
            return
        progress = self.progress
        self.records.metrics(progress.step, found)
        shown = "  ".join(f"{name.removeprefix('validation/')} {value:.3f}" for name, value in found.items())
        self.records.say(f"step {progress.step}: {shown}")
        score = self.validation.score(found)
        if score is not None and progress.step and score > progress.best.get("score", float("-inf")):
            progress.best = {"score": score, "step": progress.step}
            self._save()

    def _pictures(self, prepared: Sequence[Prepared]) -> None:
        """Sheets of held-out sources, or without any of this step's batches."""
        count = self.config.log.pictures
        sheets: dict[str, list[Pair]] = self.validation.pictures(count)
        if not sheets:
            # The first micro-batch of each task, the same in all processes: an engine may need them all.
            for part in {part.task: part for part in reversed(prepared)}.values():
                if not is_understanding(part.task):
                    outputs = self.engine.infer(part.tokens, part.task)
                    patch = self.preparer.patch_size
                    pairs = pairs_of(part.task, part.tokens, part.views, outputs, patch, count, self.gaussians)
                    sheets.update({part.task: pairs} if pairs else {})
        if self.processes.first:
            for name, pairs in sheets.items():
                save_sheet(pairs, self.folder / PICTURES / f"step-{self.progress.step:06d}" / f"{name}.png")

    # ------------------------------------------------------------------ checkpoints

    def _save(self, loader: dict[str, Any] | None = None) -> None:
        """Write a checkpoint, with the loader as it was, or else as it is."""
        if self._saved == self.progress.step:
            return
        tensors = self.engine.state_dict()
        if isinstance(self.engine, ShardedEngine):
            self.engine.save_shards(self.checkpoints.pending(self.progress.step))
        chance = self.processes.gather(torch.get_rng_state())
        loaders = self.processes.gather(loader or self.source.state_dict())
        if self.processes.first:
            progress = self.progress
            loop = {
                "progress": asdict(progress),
                "settings": self.settings,
                "alignment": self.alignment,
                "loaders": loaders,
            }
            best = int(progress.best["step"]) if progress.best else None
            self.records.flush()
            self.checkpoints.save(progress.step, {**tensors, "rng": chance}, loop, best)
        self.processes.wait()
        self._saved = self.progress.step

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        if self.processes.first:
            self.checkpoints.clean()
        newest = self.processes.from_first(str(self.checkpoints.newest() or "") if self.processes.first else "")
        if newest:
            path = Path(newest)
            loop = read_loop(path)
            self._check_settings(path, loop["settings"])
            self._check_tower(path, loop["alignment"])
            self._check_engine(path)
            self.source.load_state_dict(loop["loaders"])
            tensors = read_tensors(path)
            self.engine.load_state_dict(tensors)
            if isinstance(self.engine, ShardedEngine):
                self.engine.load_shards(path / SHARDS)
            if len(tensors["rng"]) == self.processes.world:
                torch.set_rng_state(tensors["rng"][self.processes.rank].clone())
            self.progress = LoopProgress(**loop["progress"])
            self._saved = self.progress.step
            if self.progress.best and {*changed_settings(self.config, loop["settings"])} & MEASURED_ON:
                self.progress.best = {}
                self.records.say("other held-out samples than before: which checkpoint is the best is judged anew")
            self.records.say(f"going on from step {self.progress.step}")
        self.records.start(self.progress.step)

    def _check_settings(self, path: Path, then: dict[str, Any]) -> None:
        different = changed_settings(self.config, then)
        if rates := [name for name in different if name.startswith("optimizer.") and name in MAY_CHANGE]:
            self.records.say(f"other than before: {', '.join(rates)}")
        may = MAY_CHANGE
        # With the folder of SigLIP 2, or without, the objective is another; in another place it is the same.
        if self.config.choices.siglip2 and then.get("choices", {}).get("siglip2"):
            may |= {"choices.siglip2"}
        changed = [name for name in different if not {name, name.split(".")[0]} & may]
        if changed:
            raise InputError(
                f"{path} belongs to a run with other settings ({', '.join(changed)}); choose another out= folder or "
                "remove it"
            )

    def _check_tower(self, path: Path, alignment: dict[str, Any] | None) -> None:
        then, now = ((found or {}).get("tower_name") for found in (alignment, self.alignment))
        if then != now:
            raise InputError(f"{path} was trained with the text tower {then}, but text.folder holds {now}")

    def _check_engine(self, path: Path) -> None:
        sharded = isinstance(self.engine, ShardedEngine)
        if (path / SHARDS).is_dir() != sharded:
            raise InputError(
                f"{path} was written by {'atoken train' if sharded else 'tokenizer.megatron.pretrain'}; go on with "
                "that, or begin another run from this one with start.kind=model"
            )


def _inspectable(part: Prepared) -> dict[str, Any]:
    """A micro-batch as plain values and tensors."""
    return {
        "task": part.task,
        "ids": list(part.ids),
        "captions": list(part.captions),
        "features": part.tokens.features.cpu(),
        "positions": part.tokens.host_positions,
        "lengths": part.tokens.lengths,
    }
