"""`python -m tokenizer.fp8 --model so400m-c`: which layers compute in FP8, which do not, and why. Needs no weights."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Hashable, Iterable

import torch
from rich.console import Console
from rich.table import Table

from tokenizer.errors import InputError
from tokenizer.fp8.config import FP8Config
from tokenizer.fp8.layers import LayerPlan, plan
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import CONFIGS

_WIDTH = 150
_NUMBER = re.compile(r"(?<=\.blocks)\.(\d+)(?=\.)")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        config = FP8Config(
            keep=tuple(options.keep),
            num_layers_at_start_in_bf16=options.start,
            num_layers_at_end_in_bf16=options.end,
        )
        with torch.device("meta"):
            network = ATokenNetwork(CONFIGS[options.model])
        rows = plan(network, config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console = Console()
    console = console if console.is_terminal else Console(width=_WIDTH)
    console.print(_table(options.model, rows))
    fp8, every = sum(row.weights for row in rows if row.decision == "fp8"), sum(row.weights for row in rows)
    console.print(f"{fp8 / every:.1%} of the weights of linear layers are multiplied in FP8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tokenizer.fp8", description=__doc__)
    parser.add_argument("--model", default="so400m-c", choices=sorted(CONFIGS))
    parser.add_argument("--keep", nargs="*", default=[], metavar="PATTERN", help="further layers to leave in bf16")
    parser.add_argument("--start", type=int, default=0, help="num_layers_at_start_in_bf16")
    parser.add_argument("--end", type=int, default=0, help="num_layers_at_end_in_bf16")
    return parser


def _table(model: str, rows: Iterable[LayerPlan]) -> Table:
    table = Table(title=f"FP8 layers of {model}")
    for column in ("layer", "shape", "in", "why"):
        table.add_column(column)
    for name, row in _merged(rows):
        table.add_row(name, " x ".join(map(str, row.shape)), row.decision, row.reason)
    return table


def _merged(rows: Iterable[LayerPlan]) -> list[tuple[str, LayerPlan]]:
    """One line for layers of blocks that differ in nothing but the block's number."""
    alike: dict[Hashable, list[LayerPlan]] = {}
    for row in rows:
        key = _NUMBER.sub(".N", row.name), row.shape, row.decision, row.reason
        alike.setdefault(key, []).append(row)
    lines = []
    for group in alike.values():
        numbers = [int(match[1]) for row in group if (match := _NUMBER.search(row.name))]
        span = f".{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else r".\1"
        lines.append((_NUMBER.sub(span, group[0].name), group[0]))
    return lines


if __name__ == "__main__":
    sys.exit(main())
