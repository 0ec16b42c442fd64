"""FP8 beside bfloat16: on CUDA how fast, on a CPU (where FP8 is emulated) how exact.

    python -m benchmarks.fp8                      # on CUDA: single layers, then training steps, in tokens/s
    python -m benchmarks.fp8 --train 200 --seeds 4    # on a CPU: losses of nano after 200 steps too (an hour)

What trains is the whole nano, from one start for each seed, on the same crops; losses are means of the last tenth of
the steps, and over the seeds. On CUDA, layers are the four linear layers of a block, forward and backward, at packed
token counts that are a multiple of 16 and at ones that are not (and so are padded). A step is encode, decode, L1 and
both backward passes under bfloat16 autocast. Calls take turns, so that their quotients are worth something.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import tokenizer
from benchmarks.machine import check_options, describe, find_device, seconds_in_turns
from tokenizer.atomic import atomic_path
from tokenizer.cli.outcome import run
from tokenizer.config import config_to_dict
from tokenizer.errors import InputError
from tokenizer.fp8 import FP8Config, convert
from tokenizer.fp8.choose import choose_backend
from tokenizer.fp8.conversion import swap
from tokenizer.fp8.emulate import EmulatedLinear
from tokenizer.media import load_image
from tokenizer.megatron.fp8 import block_linears
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import CONFIGS, ATokenConfig
from tokenizer.patches import visuals_to_tokens
from tokenizer.sparse import SparseTokens

PICTURE = Path(tokenizer.__file__).parent / "demo" / "coffee.jpg"
RECIPES: tuple[tuple[Literal["hybrid", "e4m3"], Literal["tensorwise", "delayed"]], ...] = (
    ("hybrid", "tensorwise"),
    ("hybrid", "delayed"),
    ("e4m3", "tensorwise"),
)

Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How calls are timed: compiled by torch or not, and how often."""

    compile: bool
    repeats: int


# ---------------------------------------------------------------------- how exact: emulated, on a CPU


def product_errors(config: FP8Config, *, rows: int = 64, inputs: int = 1152, outputs: int = 4304) -> dict[str, float]:
    """Relative errors |a - b| / |b| of a layer's output and gradients beside float64, of normal numbers.

    Real tensors have larger outliers and about the same errors: a float's relative error does not depend on its size.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (
        torch.randn(shape, generator=generator) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight = nn.Parameter(weight * inputs**-0.5)
    layer = EmulatedLinear(linear, config)
    x.requires_grad_(True)
    for _ in range(2):  # the second call of a delayed layer scales by the first
        layer.zero_grad()
        x.grad = None
        output = layer(x)
        output.backward(1e-6 * gradient)
    assert x.grad is not None and linear.weight.grad is not None  # noqa: PT018
    true_x, true_weight, true_gradient = (t.detach().double() for t in (x, linear.weight, 1e-6 * gradient))
    return {
        "output": relative_error(output, true_x @ true_weight.T),
        "input gradient": relative_error(x.grad, true_gradient @ true_weight),
        "weight gradient": relative_error(linear.weight.grad, true_gradient.T @ true_x),
    }


def relative_error(found: Tensor, true: Tensor) -> float:
    return float(torch.linalg.vector_norm(found.detach().double() - true) / torch.linalg.vector_norm(true))


def picture_batch(pixels: Tensor, config: ATokenConfig, seed: int, crops: int, side: int) -> SparseTokens:
    """Random square crops of a picture [H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    corners = [
        [int(torch.randint(0, size - side + 1, (), generator=generator)) for size in pixels.shape[:2]]
        for _ in range(crops)
    ]
    return visuals_to_tokens([pixels[y : y + side, x : x + side] for y, x in corners], config.patch_size)[0]


def training_losses(
    config: ATokenConfig, fp8: FP8Config | None, steps: int, *, crops: int, side: int, rate: float = 1e-3, seed: int = 0
) -> list[float]:
    """L1 of each of `steps` training steps on crops of the demo's picture, in bfloat16 without `fp8`.

    Start (drawn by `seed`) and data are the same whatever `fp8` is. The rate rises for 20 steps and falls to zero as a
    cosine.
    """
    network = ATokenNetwork(config)
    network.reset_parameters(torch.Generator().manual_seed(seed))
    if fp8 is not None:
        convert(network, fp8, torch.device("cpu"))
    pixels = torch.from_numpy(load_image(PICTURE)).float() / 127.5 - 1
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = reconstruction_loss(network, picture_batch(pixels, config, step, crops, side))
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def reconstruction_loss(network: ATokenNetwork, tokens: SparseTokens) -> Tensor:
    """L1 of the decoded means, under bfloat16 autocast."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        decoded = network.decode(network.encode(tokens).latents)
    return F.l1_loss(decoded.features.float(), tokens.features)


def late_loss(losses: list[float]) -> float:
    """Mean of the last tenth."""
    late = losses[-max(1, len(losses) // 10) :]
    return sum(late) / len(late)


def accuracy_records(train: int, crops: int, side: int, *, seeds: int = 1, powers: bool = True) -> list[Record]:
    """Errors of single products; with `train` steps also the late loss of nano beside bfloat16's, of all seeds."""

    def late_losses(fp8: FP8Config | None) -> list[float]:
        nano = functools.partial(training_losses, CONFIGS["nano"], fp8, train, crops=crops, side=side)
        return [late_loss(nano(seed=seed)) for seed in range(seeds)]

    plain = late_losses(None) if train else []
    records = []
    for fp8_format, recipe in RECIPES:
        config = FP8Config(fp8_format=fp8_format, fp8_recipe=recipe, power_of_two_scales=powers, backend="emulated")
        record: Record = {"format": fp8_format, "recipe": recipe, **product_errors(config)}
        if plain:
            losses = late_losses(config)
            record |= {"loss": statistics.fmean(losses), "bf16 loss": statistics.fmean(plain)}
            record |= {"loss / bf16": record["loss"] / record["bf16 loss"]}
            ratios = [mine / other for mine, other in zip(losses, plain, strict=True)]
            record |= {"lowest": min(ratios), "highest": max(ratios)}
        records.append(record)
    return records


# ---------------------------------------------------------------------- how fast: CUDA


def layer_records(
    model: str, fp8: FP8Config, device: torch.device, counts: list[int], options: Options
) -> list[Record]:
    """Forward and backward of each linear layer of an encoder's block, bfloat16 and FP8 in turns."""
    backend = choose_backend(fp8, device)
    records = []
    for name, (outputs, inputs) in block_linears(CONFIGS[model].encoder, 1).items():
        plain, swapped = (nn.Sequential(nn.Linear(inputs, outputs, device=device)) for _ in range(2))
        swap(swapped, ["0"], [swapped], backend, fp8)
        if options.compile:
            plain.compile()
            swapped.compile()
        for count in counts:
            x = torch.randn(count, inputs, device=device, dtype=torch.bfloat16, requires_grad=True)
            gradient = torch.randn(count, outputs, device=device, dtype=torch.bfloat16)
            calls = [functools.partial(_layer_step, layer, x, gradient) for layer in (plain, swapped)]
            bf16, in_fp8 = seconds_in_turns(calls, device, options.repeats)
            work = 6 * count * inputs * outputs
            records.append(
                {
                    "layer": name,
                    "shape": f"{outputs} x {inputs}",
                    "tokens": count,
                    "bf16 TFLOP/s": work / bf16 / 1e12,
                    "FP8 TFLOP/s": work / in_fp8 / 1e12,
                    "FP8 / bf16": bf16 / in_fp8,
                }
            )
    return records


def _layer_step(layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16):
        output = layer(x)
    output.backward(gradient)


def step_records(model: str, fp8: FP8Config, device: torch.device, pictures: int, options: Options) -> list[Record]:
    """Training steps of a whole network on pictures of 256 x 256, bfloat16 and FP8 in turns."""
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.rand(256, 256, 3, generator=generator) * 2 - 1 for _ in range(pictures)]
    tokens = visuals_to_tokens(pixels, CONFIGS[model].patch_size)[0].to(device)
    calls: list[Callable[[], object]] = []
    memory = []
    for config in (None, fp8):
        before = torch.cuda.memory_allocated(device)
        with torch.device(device):
            network = ATokenNetwork(CONFIGS[model])
        network.reset_parameters(torch.Generator(device=device).manual_seed(0))
        if config is not None:
            convert(network, config, device)
        if options.compile:
            for stack in network.transformers():
                for block in stack.blocks:
                    block.compile()
        calls.append(functools.partial(_step, network, tokens))
        calls[-1]()
        torch.cuda.reset_peak_memory_stats(device)
        calls[-1]()
        memory.append((torch.cuda.max_memory_allocated(device) - before) / 2**30)
    times = seconds_in_turns(calls, device, options.repeats)
    return [
        {
            "model": model,
            "in": name,
            "tokens": tokens.num_tokens,
            "tokens/s": tokens.num_tokens / taken,
            "beside bf16": times[0] / taken,
            "GiB without optimizer": used,
        }
        for name, taken, used in zip(("bf16", "FP8"), times, memory, strict=True)
    ]


def _step(network: ATokenNetwork, tokens: SparseTokens) -> None:
    network.zero_grad()
    reconstruction_loss(network, tokens).backward()


# ---------------------------------------------------------------------- command


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    return run(lambda: _run(options, " ".join(["python -m benchmarks.fp8", *arguments])))


def _run(options: argparse.Namespace, command: str) -> None:
    check_options(options, "tokens", "pictures", "repeats", "seeds", "crops", "side")
    if options.train < 0:
        raise InputError(f"--train must not be negative, got {options.train}")
    device, console = find_device(options.device), Console()
    report: Record = {"command": command, **describe(device)}
    if device.type == "cpu":
        console.print("no CUDA here: FP8 is emulated, which says how exact it is and nothing of its speed")
        if options.train:  # whose sizes may change after a measurement
            report["trained"] = config_to_dict(CONFIGS["nano"])
        report["accuracy"] = accuracy_records(
            options.train, options.crops, options.side, seeds=options.seeds, powers=options.power_of_two_scales
        )
    else:
        _measure_speed(report, options, device)
    for part in ("accuracy", "layers", "steps"):
        if part in report:
            console.print(_table(f"{part}, {report['device']}, torch {report['torch']}", report[part]))
    if options.out:
        with atomic_path(options.out) as path:
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"wrote {options.out}")


def _measure_speed(report: Record, options: argparse.Namespace, device: torch.device) -> None:
    fp8 = FP8Config(fp8_recipe=options.recipe, backend=options.backend, power_of_two_scales=options.power_of_two_scales)
    backend = choose_backend(fp8, device)
    if options.compile and backend == "transformer_engine":
        raise InputError("--compile is for torchao; Transformer Engine's layers are not compiled")
    timing = Options(options.compile, options.repeats)
    report |= {"backend": backend, "recipe": options.recipe, "compiled": options.compile}
    if backend != "triton":  # it has whole blocks alone
        report["layers"] = layer_records(options.model, fp8, device, options.tokens, timing)
    report["steps"] = step_records(options.model, fp8, device, options.pictures, timing)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fp8", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="so400m-c", choices=sorted(CONFIGS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipe", default="tensorwise", choices=("tensorwise", "delayed"))
    parser.add_argument("--backend", default="auto", choices=("auto", "transformer_engine", "torchao"))
    parser.add_argument("--power-of-two-scales", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action="store_true", help="compile both sides; torchao is slow without")
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384, 16379], help="of single layers")
    parser.add_argument("--pictures", type=int, default=64, help="256 x 256 pictures of a training step")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--train", type=int, default=0, metavar="STEPS", help="on a CPU: train nano for so many steps")
    parser.add_argument("--seeds", type=int, default=1, help="of --train: so many starts, and their mean")
    parser.add_argument("--crops", type=int, default=2, help="of a batch of --train")
    parser.add_argument("--side", type=int, default=96, help="pixels a side of a crop; a patch has 16")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file too")
    return parser


def _table(title: str, records: list[Record]) -> Table:
    table = Table(title=title)
    for column, value in records[0].items():
        table.add_column(column, justify="left" if isinstance(value, str) else "right")
    for record in records:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in record.values()))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
