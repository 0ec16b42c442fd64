"""`python -m tokenizer.training.ablations --out runs/ablations`: train, measure, report."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from tokenizer.errors import InputError
from tokenizer.training.ablations.perception import Perception
from tokenizer.training.ablations.plan import BUILD, PLAN, SETS, Study, check_shards, config_of, read_plan
from tokenizer.training.ablations.report import README, write_report
from tokenizer.training.ablations.running import Command, atoken, is_finished, train_run
from tokenizer.training.curriculum.config import RunConfig
from tokenizer.training.curriculum.launch import choose_device


def main(arguments: Sequence[str], command: Command = atoken) -> int:
    """The command; `command` trains a run."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options, list(arguments), command)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    return 1


def _run(options: argparse.Namespace, arguments: Sequence[str], command: Command) -> int:
    console = Console(stderr=True)
    studies = read_plan(options.plan)
    if unknown := [name for name in options.only or () if name not in studies]:
        raise InputError(f"{options.plan}: no study called {', '.join(unknown)}; known: {', '.join(studies)}")
    if not options.steps_factor > 0:
        raise InputError(f"--steps-factor must be above 0, got {options.steps_factor}")
    configs = {name: _configs(study, name, options) for name, study in studies.items()}
    wanted = [name for name in studies if name in (options.only or studies)]
    # Everything that can be missing is found before the first run, which may take an hour.
    waiting = [config for name in wanted for config in configs[name].values() if not is_finished(config)]
    for config in waiting:
        check_shards(config)
    # A report of one study keeps what is there of others, as long as they are as they would be trained now.
    told = [name for name in studies if name in wanted or _is_told(configs[name])]
    perceptual = [name for name in told if studies[name].perceptual]
    perception = Perception(choose_device(options.device)) if perceptual else None
    for number, config in enumerate(waiting, start=1):
        console.print(
            f"run {number} of {len(waiting)}: {config.out}, {config.steps} steps", highlight=False, soft_wrap=True
        )
        if status := train_run(config, options.device, command):
            console.print(f"{config.out} has not ended; the same command goes on", highlight=False, soft_wrap=True)
            return status
    if perception is not None:
        for config in (config for name in perceptual for config in configs[name].values()):
            console.print(f"measuring {config.out}", highlight=False, soft_wrap=True)
            perception.measure_run(config)
    made_by = shlex.join(["python", "-m", "tokenizer.training.ablations", *arguments])
    folder = os.path.relpath(options.plan.parent)
    write_report({name: studies[name] for name in told}, options.out, options.docs, command=made_by, configs=folder)
    console.print(f"wrote {options.docs / README}", highlight=False, soft_wrap=True)
    return 0


def _configs(study: Study, name: str, options: argparse.Namespace) -> dict[str, RunConfig]:
    return {
        run.name: config_of(
            study,
            run.name,
            options.out / name,
            plan=options.plan,
            sets=options.sets,
            steps_factor=options.steps_factor,
        )
        for run in study.runs
    }


def _is_told(configs: Mapping[str, RunConfig]) -> bool:
    try:
        return all(is_finished(config) for config in configs.values())
    except InputError:  # of other settings, which this report is not about
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tokenizer.training.ablations", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=Path("docs/ablations"), help="folder of the report")
    parser.add_argument("--only", action="append", metavar="NAME", help="this study alone; may be given more than once")
    parser.add_argument("--plan", type=Path, default=PLAN, help="the studies, beside the files of their runs")
    parser.add_argument("--sets", type=Path, help=f"where the shards of {SETS} are, which {BUILD} makes")
    parser.add_argument("--steps-factor", type=float, default=1.0, help="multiplies all numbers of steps")
    parser.add_argument("--device", default="auto", help="cpu or cuda; auto takes CUDA where there is one")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
