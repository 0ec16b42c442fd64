"""How fast a whole training step is: forward, backward, clip, AdamW, average; the native engine beside Megatron's.

    python -m benchmarks.training --model base --tokens 1024
    python -m benchmarks.training --fp8 --compile --fp8-recipe delayed --fp8-backend triton    # on CUDA: bf16 and FP8
    python -m benchmarks.training --model nano --task asset_reconstruction

Batches are random and packed, weights are random, and images are reconstructed without perceptual networks, which are
no part of the model. Engines run in this process (Megatron with local layers on a CPU, with Transformer Engine's on
CUDA where it can be imported) and step in turns with as much work of large matrix products; the fastest time of each
counts, and rates are divided by that of the products. On CUDA a group that takes turns is two models, for they must fit
beside each other; with --apart each takes turns with the products alone.

Passes (forward and backward) and update (clip, optimizer, average) are timed apart: an update costs the same whatever
the batch, so that small steps are slow by it. From both follows the number of tokens from which a step reaches 0.7 of
the matrix rate. Columns of the table: "weights alone" is the ratio without the operations of attention, "passes alone"
that of the passes in their time; GiB is what an engine alone takes at its peak, parameters, gradients, moments,
averages and activations; "speed" compares with the first engine of those that took turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.machine import check_options, describe, find_device
from benchmarks.training_parts.measure import GOAL, forget_models, groups_of, has_bfloat16, measure, measure_apart
from benchmarks.training_parts.subjects import EngineName, Precision, Setting, Specs, megatron_process
from tokenizer.atomic import atomic_path
from tokenizer.cli.outcome import run
from tokenizer.errors import InputError
from tokenizer.fp8 import FP8Config
from tokenizer.fp8.choose import choose_backend
from tokenizer.megatron.engine import load_megatron
from tokenizer.model.attention import attention_backend
from tokenizer.model.config import CONFIGS, ATokenConfig
from tokenizer.training.curriculum.tasks import IMAGE_RECONSTRUCTION, TASKS

MODELS = {"cpu": ["nano", "base"], "cuda": ["base", "so400m-c"]}
TOKENS = {"cpu": {"nano": 4096, "base": 1024}, "cuda": {"nano": 65536, "base": 16384}}
OTHER_TOKENS = {"cpu": 256, "cuda": 8192}
"""Of models that `TOKENS` does not name. On CUDA two so400m with all that training keeps must fit one GPU."""

Record = dict[str, Any]


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    return run(lambda: _run(options, " ".join(["python -m benchmarks.training", *arguments])))


def _run(options: argparse.Namespace, command: str) -> None:
    device, console = find_device(options.device), Console()
    report: Record = {"command": command, **describe(device)}
    precision: Precision = options.dtype or ("fp32" if device.type == "cpu" else "bf16")
    _check(options, precision, device)
    engines, specs = _engines(options.engines, device, console)
    choices = FP8Config(
        fp8_recipe=options.fp8_recipe, backend=options.fp8_backend, fast_accumulation=options.fp8_fast_accumulation
    )
    fp8 = _with_fp8(engines, specs, choices, report, device, console) if options.fp8 else []
    kind = torch.float32 if precision == "fp32" else torch.bfloat16
    by_cudnn = options.attention == "cudnn" and device.type == "cuda"
    attention = "cudnn" if by_cudnn else attention_backend(device, kind)
    report |= {"task": options.task, "attention": attention, "megatron layers": specs}
    report |= {"alike": options.alike, "compiled": options.compile, "steps": options.steps, "records": []}
    for model in options.model or MODELS[device.type]:
        sizes = _sizes(model, options.depth, console)
        tokens = options.tokens or TOKENS[device.type].get(model, OTHER_TOKENS[device.type])
        setting = Setting(
            sizes,
            options.task,
            tokens,
            options.micro_batches,
            device,
            compile=options.compile,
            attention=options.attention,
            fp8=choices,
            alike=options.alike,
        )
        megatron: AbstractContextManager[None] = nullcontext()
        if "megatron" in engines:
            megatron = megatron_process(setting, specs)
        with megatron:
            for number, group in enumerate(groups_of(engines, precision, fp8=fp8)):
                found = (measure_apart if options.apart else measure)(group, setting, options.steps, specs)
                known = {"model": model, "depth": sizes.encoder.depth, "group": number}
                report["records"] += [{**known, "micro-batches": options.micro_batches, **record} for record in found]
                # A group that fails later takes nothing of this with it.
                _write(report, options.out)
                forget_models(device)
    for table in _tables(report):
        console.print(table)
    for line in _remarks(report["records"]):
        console.print(line)
    if options.out:
        console.print(f"wrote {options.out}")


def _check(options: argparse.Namespace, precision: Precision, device: torch.device) -> None:
    if options.fp8 and (device.type != "cuda" or precision != "bf16"):
        raise InputError(
            "--fp8 is compared with bf16 on CUDA; on a CPU it is emulated, which says nothing of its speed"
        )
    if options.attention == "cudnn" and options.task.startswith("image") and not options.alike:
        raise InputError("--attention cudnn takes batches of visuals of one length alone; add --alike")
    check_options(options, "steps", "micro_batches", "tokens", "depth")
    if precision == "bf16" and not has_bfloat16(device):
        raise InputError(f"{device} has no instructions for bfloat16, it takes many times as long; use --dtype fp32")


def _sizes(model: str, depth: int | None, console: Console) -> ATokenConfig:
    sizes = CONFIGS[model]
    if depth is None:
        return sizes
    assert sizes.decoder is not None
    console.print(f"{model} is measured with {depth} blocks each in encoder and decoder, not {sizes.encoder.depth}")
    return replace(sizes, encoder=replace(sizes.encoder, depth=depth), decoder=replace(sizes.decoder, depth=depth))


def _engines(wanted: Sequence[EngineName], device: torch.device, console: Console) -> tuple[list[EngineName], Specs]:
    """Those of the engines that are here, and Megatron's layers; Megatron is loaded.

    Raises:
        InputError: none is here.
    """
    if "megatron" not in wanted:
        return list(wanted), "local"
    specs: Specs = "local"
    try:
        if device.type == "cuda":
            try:
                load_megatron(transformer_engine=True)
                specs = "transformer_engine"
            except InputError as error:
                console.print(f"Megatron with local layers: {error}")
        if specs == "local":
            load_megatron()
    except InputError as error:
        if "native" not in wanted:
            raise
        console.print(f"the native engine alone: {error}")
        return ["native"], "local"
    return list(wanted), specs


def _with_fp8(
    engines: Sequence[EngineName],
    specs: Specs,
    fp8: FP8Config,
    report: Record,
    device: torch.device,
    console: Console,
) -> list[EngineName]:
    """The engines that compute in FP8 here.

    Raises:
        InputError: no engine does.
    """
    able: list[EngineName] = []
    if "native" in engines:
        fast = "" if fp8.fast_accumulation == "forward" else f", fast accumulation {fp8.fast_accumulation}"
        report["native FP8"] = f"{choose_backend(fp8, device)}, {fp8.fp8_recipe}{fast}"
        able.append("native")
    if "megatron" in engines and specs == "transformer_engine":
        able.append("megatron")
    elif "megatron" in engines:
        console.print("Megatron in bf16 alone: its local layers have no FP8")
    if not able:
        raise InputError("no engine that was asked for has FP8 here; leave --fp8 out or add the native one")
    return able


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", nargs="*", choices=sorted(CONFIGS), help="nano and base; base and so400m-c on CUDA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, help="at most so many in a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each engine, after two others")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="fp32 on a CPU, bf16 on CUDA")
    parser.add_argument("--engines", nargs="+", default=["native", "megatron"], choices=("native", "megatron"))
    parser.add_argument("--fp8", action="store_true", help="on CUDA: FP8 beside bf16")
    parser.add_argument("--fp8-recipe", default="tensorwise", choices=("tensorwise", "delayed"))
    parser.add_argument("--fp8-backend", default="auto", choices=("auto", "transformer_engine", "torchao", "triton"))
    parser.add_argument(
        "--fp8-fast-accumulation", default="forward", choices=("forward", "all"), help="products summed with 14 bits"
    )
    parser.add_argument("--compile", action="store_true", help="the native engine's blocks; torchao is slow without")
    parser.add_argument(
        "--attention", default="varlen", choices=("varlen", "cudnn"), help="of the native engine on CUDA"
    )
    parser.add_argument("--alike", action="store_true", help="pictures of 16 x 16 patches, instead of many shapes")
    parser.add_argument("--apart", action="store_true", help="one model after the other, where a GPU cannot hold two")
    parser.add_argument("--task", default=IMAGE_RECONSTRUCTION, choices=TASKS)
    parser.add_argument("--depth", type=int, help="blocks of encoder and decoder, where the whole model is too slow")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file too")
    return parser


def _write(report: Record, out: Path | None) -> None:
    if out is not None:
        with atomic_path(out) as path:
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _tables(report: Record) -> list[Table]:
    """One for each model, narrow enough for 80 columns."""
    threads = f", {report['threads']} threads" if report["threads"] else ""
    tables: dict[str, Table] = {}
    for record in report["records"]:
        title = f"{record['model']}: {report['task']} on {report['device']}{threads}, torch {report['torch']}"
        if title not in tables:
            tables[title] = Table(title=title, box=SIMPLE_HEAD, padding=0, show_edge=False)
            for number, name in enumerate(_COLUMNS):
                tables[title].add_column(name, justify="right" if number else "left", no_wrap=True)
            group = record["group"]
        elif group != record["group"]:
            tables[title].add_section()
            group = record["group"]
        tables[title].add_row(*_cells(record))
    return list(tables.values())


_COLUMNS = (
    *("engine", "tokens", "passes\ns", "update\ns", "tokens\n/s", "ratio", "weights\nalone"),
    *("passes\nalone", "GiB", "speed"),
)


def _cells(record: Record) -> list[str]:
    return [
        f"{record['engine']} {record['precision']}",
        str(record["tokens"]),
        f"{record['passes seconds']:.3f}",
        f"{record['update seconds']:.3f}",
        f"{record['tokens/s']:.0f}",
        f"{record['ratio']:.2f}",
        f"{record['ratio without attention']:.2f}",
        f"{record['ratio of passes']:.2f}",
        "-" if record["GiB"] is None else f"{record['GiB']:.2f}",
        f"{record['beside the first']:.2f}",
    ]


def _remarks(records: Sequence[Record]) -> list[str]:
    """What the table has no column for."""
    lines = []
    for record in records:
        needed = record["tokens for the goal"]
        reached = f"from {needed} tokens a step on" if needed is not None else "never, for passes alone are slower"
        name = f"{record['model']} {record['engine']} {record['precision']}"
        lines.append(f"{name}: {GOAL} of {record['matrix GFLOP/s']:.0f} GFLOP/s {reached}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
