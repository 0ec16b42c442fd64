"""How fast the passes over tokens of fused FP8 blocks are, beside a copy of as many bytes in the same run.

    python -m benchmarks.fp8_passes                   # so400m's widths, 16,384 tokens
    python -m benchmarks.fp8_passes --tiles           # with other tiles than the kernels have, fastest first

A block of the encoder has layer norms and biases, one of the decoder RMS norms and a QK norm. Bytes are those that a
pass cannot do without, read once and written once; "of a copy" is the time that a copy of as many would take over the
time of the pass. Calls are replayed from a CUDA graph: what is timed is the device, not the processor that launches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import check_options, describe, find_device
from tokenizer.atomic import atomic_path
from tokenizer.cli.outcome import run
from tokenizer.fp8 import FP8Config
from tokenizer.fp8.choose import choose_backend
from tokenizer.fp8.fused.scales import Scales
from tokenizer.model.config import CONFIGS, TransformerConfig

Record = dict[str, Any]

_DELAYED = FP8Config(fp8_recipe="delayed", backend="triton")
_SQUARE = ((64, 64, 4), (64, 64, 8), (64, 128, 8), (128, 64, 4), (128, 64, 8))
_ROWS = {"heads": ((8, 4), (16, 4), (16, 8), (32, 8)), "heads_backward": ((32, 4), (64, 4), (64, 8), (128, 8))}
"""Rows, columns and warps that --tiles tries; rows and warps where a head is as wide as a tile."""


@dataclass(frozen=True)
class Pass:
    """A pass of a block, and the tile in `TILES` that it runs with."""

    name: str
    tile: str
    bytes: int
    call: Callable[[], object]


def passes(config: TransformerConfig, tokens: int, device: torch.device, scales: Scales) -> list[Pass]:
    """All of a block, forward and backward, on random numbers; `scales` are of one block."""
    from tokenizer.fp8.fused import launch

    generator = torch.Generator(device).manual_seed(0)
    rms, bias = config.norm == "rms", config.bias
    width, hidden, heads = config.width, config.mlp_width, config.heads
    rows = launch.padded(tokens)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    def site(number: int) -> launch.Site:
        return launch.Site(scales, number)

    x, update, wide, qkv = numbers(tokens, width), numbers(rows, width), numbers(rows, hidden), numbers(rows, 3 * width)
    more, above = numbers(rows, hidden), tuple(numbers(tokens, heads, width // heads) for _ in range(3))
    weight = torch.rand(width, generator=generator, device=device)
    offset = weight if bias else None
    learned = torch.rand(heads, width // heads, generator=generator, device=device)
    table = torch.rand(tokens, 1, width // heads // 2, 2, generator=generator, device=device)
    shape = launch.Heads(heads, width // heads, (learned, learned) if config.qk_norm else None, table)
    normed = launch.norm(x, None, weight, offset, site(0), rms=rms)
    kept = normed.x, normed.means, normed.factors
    # Bytes of one number of every token and channel, as bfloat16 or as FP8 both ways: both have two.
    narrow, deep = 2 * tokens * width, 2 * tokens * hidden

    def back(*, cast: bool) -> launch.NormGradients:
        target = site(5) if cast else None
        return launch.norm_backward(update, x, kept, weight, rms=rms, bias=bias, site=target, sums=cast and bias)

    return [
        Pass("norm", "norm", 2 * narrow, lambda: launch.norm(x, None, weight, offset, site(0), rms=rms)),
        Pass("heads", "heads", 4 * narrow, lambda: launch.split_heads(qkv, tokens, shape)),
        Pass("cast", "cast", 2 * narrow, lambda: launch.cast(x, site(1))),
        Pass("add, norm", "norm", 4 * narrow, lambda: launch.norm(x, update, weight, offset, site(2), rms=rms)),
        Pass("GELU", "gelu", 2 * deep, lambda: launch.gelu(wide, tokens, site(3))),
        Pass("cast, sums", "cast", 2 * narrow, lambda: launch.cast(x, site(7), sums=bias)),
        Pass(
            "GELU back", "gelu_backward", 3 * deep, lambda: launch.gelu_backward(more, wide, tokens, site(6), sums=bias)
        ),
        Pass("norm back, cast", "norm_backward", 5 * narrow, lambda: back(cast=True)),
        Pass(
            "heads back",
            "heads_backward",
            (8 if config.qk_norm else 6) * narrow,
            lambda: launch.split_heads_backward(above, qkv, shape, site(4), sums=bias),  # type: ignore[arg-type]
        ),
        Pass("norm back", "norm_backward", 4 * narrow, lambda: back(cast=False)),
    ]


def block_scales(device: torch.device) -> Scales:
    return Scales(_DELAYED, ["block"], device)


def device_seconds(call: Callable[[], object], repeats: int) -> float:
    """Of one call, the fastest of some replays of a graph of `repeats`."""
    for _ in range(2):  # the first one compiles, and looks for scales
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    best = float("inf")
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / repeats)
    return best


def copy_rate(device: torch.device, repeats: int) -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.empty(2**28, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / device_seconds(lambda: target.copy_(source), repeats)


def tiles_to_try(tile: str) -> Iterator[dict[str, int]]:
    if tile == "heads":
        yield from ({"ROWS": rows, "num_warps": warps} for rows, warps in _ROWS[tile])
        return
    for axis, shape in itertools.product((0, 1), _ROWS.get(tile, _SQUARE)):
        rows, *columns, warps = shape
        yield {"ROWS": rows, **({"COLUMNS": columns[0]} if columns else {}), "ROW_AXIS": axis, "num_warps": warps}


def measure(model: str, tokens: int, device: torch.device, options: argparse.Namespace) -> Iterator[Record]:
    """A record of each pass of encoder and decoder; with `options.tiles`, of each with each tile."""
    from tokenizer.fp8.fused.launch import TILES

    rate = copy_rate(device, options.repeats)
    sizes = CONFIGS[model]
    assert sizes.decoder is not None
    for part, config in (("encoder", sizes.encoder), ("decoder", sizes.decoder)):
        for one in passes(config, tokens, device, block_scales(device)):
            before = TILES[one.tile]
            for tile in tiles_to_try(one.tile) if options.tiles else [before]:
                TILES[one.tile] = tile
                try:
                    taken = device_seconds(one.call, options.repeats)
                finally:
                    TILES[one.tile] = before
                record: Record = {"part": part, "pass": one.name, "tile": one.tile}
                record |= tile
                record |= {"ms": 1e3 * taken, "MB": one.bytes / 1e6, "GB/s": one.bytes / taken / 1e9}
                yield record | {"of a copy": one.bytes / rate / taken}


def fastest(records: list[Record]) -> list[Record]:
    """Each kernel's tiles, by the time that all passes with it take in a block of both parts."""
    found: dict[tuple[str, tuple[int, ...]], Record] = {}
    for record in records:
        shape: Record = {key: record[key] for key in ("ROWS", "COLUMNS", "ROW_AXIS", "num_warps") if key in record}
        key = record["tile"], tuple(shape.values())
        found.setdefault(key, {"tile": record["tile"], **shape, "ms": 0.0})["ms"] += record["ms"]
    return sorted(found.values(), key=lambda record: (record["tile"], record["ms"]))


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    return run(lambda: _run(options, " ".join(["python -m benchmarks.fp8_passes", *arguments])))


def _run(options: argparse.Namespace, command: str) -> None:
    check_options(options, "tokens", "repeats")
    device, console = find_device(options.device), Console()
    choose_backend(_DELAYED, device)
    report: Record = {"command": command, **describe(device)}
    report |= {"model": options.model, "tokens": options.tokens, "passes": []}
    report["passes"] += measure(options.model, options.tokens, device, options)
    shown = fastest(report["passes"]) if options.tiles else report["passes"]
    console.print(_table(f"{options.model}, {options.tokens} tokens, {report['device']}", shown))
    if not options.tiles:
        for part in ("encoder", "decoder"):
            total = sum(record["ms"] for record in shown if record["part"] == part)
            console.print(f"a block of the {part}: {total:.3f} ms")
    if options.out:
        with atomic_path(options.out) as path:
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"wrote {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fp8_passes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="so400m-c", choices=sorted(n for n, c in CONFIGS.items() if c.decoder))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--tiles", action="store_true", help="try other tiles, a minute or two of compiling")
    parser.add_argument("--repeats", type=int, default=10, help="calls in a graph")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file too")
    return parser


def _table(title: str, records: list[Record]) -> Table:
    table = Table(title=title)
    columns = dict.fromkeys(key for record in records for key in record)
    for column in columns:
        table.add_column(column, justify="left" if column in ("part", "pass", "tile") else "right")
    for record in records:
        cells = (record.get(column, "") for column in columns)
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
