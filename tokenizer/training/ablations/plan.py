"""What is compared: studies, their runs and variants, as they stand in one YAML file beside the files of the runs.

gram:
  title: Gram loss against none
  question: ...
  measured: ...
  columns: {photographs/psnr: "photographs, dB"}
  runs:
    - {name: start, base: gram.yaml, set: {steps: 1, start: {kind: codes}}}
    - {name: without, base: gram.yaml, after: start, set: {loss.gram: 0.0}}
    - {name: with, base: gram.yaml, after: start}
  variants:
    - {name: no Gram term, size: nano, runs: [without]}
    - {name: Gram term, size: nano, runs: [with]}
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizer.config import load_config, parse_config, read_mapping
from tokenizer.errors import InputError
from tokenizer.training.curriculum.config import RunConfig

PLAN = Path("configs/tokenizer/ablations/ablations.yaml")
"""The committed plan, from the folder of the repository."""

SETS = "datasets/sets"
"""Where the runs' files look for shards."""

BUILD = "scripts/build_nano_data.sh"
"""What makes these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """One run.

    name: of its folder. base: its file, beside the plan. after: the run that it starts from.
    set: settings that differ, by dotted key.
    """

    name: str
    base: str
    after: str | None = None
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One side of a comparison: runs that follow each other, each from the one before.

    size: of the model, for people; variants of one size are compared with each other.
    """

    name: str
    size: str
    runs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """One ablation.

    title, question, measured: for the report: what is asked, and on what it was measured how.
    perceptual: measure checkpoints as `perception` does, instead of taking the runs' own validation.
    columns: figures by name ("SOURCE/METRIC" of the validation, or one of `perception`), and what people call them.
    constants: figures that no model changes, in the same way.
    runs, variants: a run stands behind those that it starts from.

    Raises:
        InputError: a run that is unknown where it is named, or there twice, or variants whose runs do not follow each
            other.
    """

    title: str
    question: str
    measured: str
    columns: dict[str, str]
    runs: tuple[RunPlan, ...]
    variants: tuple[Variant, ...]
    constants: dict[str, str] = field(default_factory=dict)
    perceptual: bool = False

    def __post_init__(self) -> None:
        names: list[str] = []
        for run in self.runs:
            if run.name in names:
                raise InputError(f"two runs are called {run.name}")
            if run.after is not None and run.after not in names:
                raise InputError(f"run {run.name} starts after {run.after}, which must stand before it")
            names.append(run.name)
        for variant in self.variants:
            if unknown := [name for name in variant.runs if name not in names]:
                raise InputError(f"variant {variant.name}: no such runs: {', '.join(unknown)}")
            if not variant.runs or any(self.run(b).after != a for a, b in itertools.pairwise(variant.runs)):
                raise InputError(f"variant {variant.name}: needs runs of which each starts after the one before")

    def run(self, name: str) -> RunPlan:
        """The run of that name."""
        return next(run for run in self.runs if run.name == name)

    def sizes(self) -> dict[str, list[Variant]]:
        """Variants by size, in their order."""
        found: dict[str, list[Variant]] = {}
        for variant in self.variants:
            found.setdefault(variant.size, []).append(variant)
        return found

    def start_of(self, size: str) -> str | None:
        """The run that all variants of a size start from, where there is one."""
        starts = {self.run(variant.runs[0]).after for variant in self.sizes()[size]}
        return starts.pop() if len(starts) == 1 else None


def read_plan(path: Path) -> dict[str, Study]:
    """The studies of a plan, by name.

    Raises:
        InputError: an unreadable file, or anything in it that is unknown, missing or does not fit.
    """
    studies = {}
    for name, values in read_mapping(path).items():
        where = f"{path}: {name}"
        if not isinstance(values, Mapping):
            raise InputError(f"{where}: must be a study, with title, runs and variants")
        parts = {
            key: tuple(parse_config(kind, one, f"{where}, {key}") for one in _listed(values, key, where))
            for key, kind in (("runs", RunPlan), ("variants", Variant))
        }
        studies[str(name)] = parse_config(Study, {**values, **parts}, where)
    return studies


def config_of(
    study: Study, name: str, folder: Path, *, plan: Path, sets: Path | None = None, steps_factor: float = 1.0
) -> RunConfig:
    """The whole configuration of a run.

    Args:
        name: of the run. folder: of the study's runs; this one writes to FOLDER/NAME.
        plan: the file that the study was read from.
        sets: where shards are, if not in `SETS`.
        steps_factor: multiplies steps, and steps between validations, checkpoints and lines of the logs.

    Raises:
        InputError: settings that are unknown or make no sense.
    """
    run = study.run(name)
    # JSON is YAML, on one line.
    overrides = [f"{key}={json.dumps(value)}" for key, value in run.set.items()]
    if run.after is not None:
        overrides.append(f"start={json.dumps({'kind': 'model', 'source': str(folder / run.after)})}")
    config = load_config(RunConfig, plan.parent / run.base, overrides)
    if sets is not None:
        sources = [_moved(source, sets) for source in config.data.get("sources", ())]
        held_out = tuple(_moved(source, sets) for source in config.validation.sources)
        config = replace(
            config,
            data={**config.data, "sources": sources},
            validation=replace(config.validation, sources=held_out),
        )

    def scaled(steps: int) -> int:
        return max(1, round(steps * steps_factor))

    return replace(
        config,
        out=str(folder / name),
        steps=scaled(config.steps),
        validation=replace(config.validation, every=scaled(config.validation.every)),
        checkpoint=replace(config.checkpoint, every=scaled(config.checkpoint.every)),
        log=replace(config.log, every=scaled(config.log.every), pictures_every=scaled(config.log.pictures_every)),
    )


def check_shards(config: RunConfig) -> None:
    """See that the folders of a run's shards are there.

    Raises:
        InputError: one is not.
    """
    for source in (*config.data.get("sources", ()), *config.validation.sources):
        shards = str(source.get("shards", ""))
        if "://" not in shards and not Path(shards).exists():
            raise InputError(f"{shards}: no shards here; build them with {BUILD}, or name their folder with --sets")


def _listed(values: Mapping[str, Any], key: str, where: str) -> list[Mapping[str, Any]]:
    listed = values.get(key)
    if not isinstance(listed, list) or not all(isinstance(one, Mapping) for one in listed):
        raise InputError(f"{where}: {key} must be a list of settings in braces")
    return listed


def _moved(source: Mapping[str, Any], sets: Path) -> dict[str, Any]:
    shards = Path(str(source["shards"]))
    inside = shards.is_relative_to(SETS)
    return {**source, "shards": str(sets / shards.relative_to(SETS))} if inside else dict(source)
