"""`python -m benchmarks.tokenizer`: encode and decode rate of an so400m-sized network beside the matrix-product rate.

Weights are random; images are 256 x 256 (256 tokens each). Rates count the multiply-adds of linear layers, position
tables and attention as two operations each, and are divided by the rate of a large matrix product measured in the same
process: all cases of a direction and as much work of matrix products take turns, and the fastest time of each counts.
The mixed batch holds as many tokens as a batch of 4 pictures, in pictures of different shapes; "beside batch 4"
compares their time a token.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.machine import check_options, describe, find_device, matrix_products, seconds_in_turns
from tokenizer.atomic import atomic_path
from tokenizer.cli.outcome import run
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.attention import attention_backend
from tokenizer.model.config import CONFIGS, TransformerConfig
from tokenizer.model.positions import GRID
from tokenizer.patches import grid_positions
from tokenizer.sparse import SparseTokens

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIXED = [(16, 20), (8, 24), (20, 12), (4, 28), (12, 12), (2, 8)]
"""Rows and columns of the pictures of the mixed batch: 1,024 tokens in all, as many as 4 pictures of 256 x 256."""


@dataclass(frozen=True)
class Case:
    """A batch by the grids of its pictures."""

    name: str
    grids: list[tuple[int, int]]

    @property
    def count(self) -> int:
        """Tokens of the batch."""
        return sum(rows * columns for rows, columns in self.grids)

    def tokens(self, channels: int, dtype: torch.dtype, device: torch.device) -> SparseTokens:
        parts = []
        generator = torch.Generator().manual_seed(0)
        for rows, columns in self.grids:
            positions = grid_positions((1, rows, columns))
            features = torch.rand(len(positions), channels, generator=generator) * 2 - 1
            parts.append(SparseTokens(features, positions, [len(positions)]))
        return SparseTokens.cat(parts).to(device, dtype)


def flops(config: TransformerConfig, linears: nn.Module, lengths: list[int]) -> float:
    """Operations of one pass: linear layers and position table for every token, attention by item."""
    tokens = sum(lengths)
    weights = sum(m.weight.numel() for m in linears.modules() if isinstance(m, nn.Linear))
    table = GRID * GRID * config.width if config.learned_positions else 0
    attention = sum(4 * length**2 * config.width * config.depth for length in lengths)
    return 2.0 * tokens * (weights + table) + attention


def measure(network: ATokenNetwork, cases: list[Case], repeats: int) -> list[dict[str, Any]]:
    """Encode and decode each case; one record each."""
    config, device, dtype = network.config, network.device, network.dtype
    decoder, decoder_config = network.decoder, config.decoder
    assert decoder is not None
    assert decoder_config is not None
    # Query, output and MLP of the pool run once an item, not once a token; they are left out of the count.
    once = sum(p.numel() for p in network.encoder.pool.parameters()) - network.encoder.pool.key_value.weight.numel()
    directions: list[tuple[str, Callable[[SparseTokens], object], int, Callable[[list[int]], float]]] = [
        (
            "encode",
            network.encode,
            config.patch_features,
            lambda lengths: flops(config.encoder, network.encoder, lengths) - 2.0 * sum(lengths) * once,
        ),
        (
            "decode",
            network.decode,
            config.latent_channels,
            lambda lengths: flops(decoder_config, decoder, lengths),
        ),
    ]
    records = []
    for direction, call, channels, work_of in directions:
        batches = [case.tokens(channels, dtype, device) for case in cases]
        works = [work_of([rows * columns for rows, columns in case.grids]) for case in cases]
        products, product_work = matrix_products(device, dtype, max(works))
        with torch.no_grad():
            product_time, *times = seconds_in_turns(
                [products, *(functools.partial(call, tokens) for tokens in batches)], device, repeats
            )
        rate = product_work / product_time
        a_token = {case.name: taken / case.count for case, taken in zip(cases, times, strict=True)}
        for case, taken, work in zip(cases, times, works, strict=True):
            records.append(
                {
                    "case": case.name,
                    "direction": direction,
                    "tokens": case.count,
                    "seconds": taken,
                    "microseconds a token": a_token[case.name] * 1e6,
                    "beside batch 4": a_token[case.name] / a_token["batch 4"] if "batch 4" in a_token else None,
                    "GFLOP/s": work / taken / 1e9,
                    "matrix GFLOP/s": rate / 1e9,
                    "ratio": work / taken / rate,
                }
            )
    return records


def cases(batches: list[int]) -> list[Case]:
    """Batches of 256 x 256 pictures, and a mixed one of about as many tokens as a batch of 4."""
    equal = [Case(f"batch {count}", [(16, 16)] * count) for count in batches]
    return [*equal, Case("mixed sizes", MIXED)]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizer", description=__doc__)
    parser.add_argument("--config", default="so400m-c", choices=sorted(CONFIGS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=sorted(DTYPES))
    parser.add_argument("--batches", nargs="*", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile the blocks, without graph breaks")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file too")
    options = parser.parse_args(arguments)
    return run(lambda: _run(options, " ".join(["python -m benchmarks.tokenizer", *arguments])))


def _run(options: argparse.Namespace, command: str) -> None:
    check_options(options, "batches", "repeats")
    device = find_device(options.device)
    batches = options.batches or ([1, 4] if device.type == "cpu" else [1, 4, 64])
    report: dict[str, Any] = {"command": command, **describe(device)}
    report |= {"config": options.config, "compiled": options.compile, "records": []}
    console = Console()
    for name in options.dtype:
        with torch.device(device):
            network = ATokenNetwork(CONFIGS[options.config])
        network.reset_parameters(torch.Generator(device=device).manual_seed(0))
        network = network.to(DTYPES[name]).eval().requires_grad_(False)
        if options.compile:
            for block in (block for stack in network.transformers() for block in stack.blocks):
                block.compile(fullgraph=True)
        report[f"attention {name}"] = attention_backend(device, DTYPES[name])
        report["records"] += [{"dtype": name, **record} for record in measure(network, cases(batches), options.repeats)]
        console.print(f"[dim]{name} done[/dim]")
        del network
    console.print(_table(report))
    if options.out:
        with atomic_path(options.out) as path:
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"wrote {options.out}")


def _table(report: dict[str, Any]) -> Table:
    title = f"{report['config']} on {report['device']}, {report['threads']} threads, torch {report['torch']}"
    table = Table(title=title)
    for column in (
        "type",
        "batch",
        "direction",
        "tokens",
        "seconds",
        "µs a token",
        "beside batch 4",
        "GFLOP/s",
        "matrix GFLOP/s",
        "ratio",
    ):
        table.add_column(column, justify="left" if column in ("type", "batch", "direction") else "right")
    for record in report["records"]:
        table.add_row(
            record["dtype"],
            record["case"],
            record["direction"],
            str(record["tokens"]),
            f"{record['seconds']:.3f}",
            f"{record['microseconds a token']:.1f}",
            "" if record["beside batch 4"] is None else f"{record['beside batch 4']:.2f}",
            f"{record['GFLOP/s']:.0f}",
            f"{record['matrix GFLOP/s']:.0f}",
            f"{record['ratio']:.2f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
