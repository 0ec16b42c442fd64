"""`python -m tokenizer.parity FOLDER`: exit 0 if all agrees, 1 if not, 2 if FOLDER is no recording."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from tokenizer.errors import InputError
from tokenizer.parity.recording import Recording
from tokenizer.parity.report import as_json, print_table
from tokenizer.parity.runner import check

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
_WIDTH = 150


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        device = _device(options.device)
        rows = check(Recording(options.folder), device, _DTYPES[options.dtype], options.only)
        if not rows:
            raise InputError(f"no tensor of {options.folder} is named like '{options.only}' (FILE or FILE:TENSOR)")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(as_json(rows, folder=str(options.folder), device=str(device), dtype=options.dtype))
    else:
        console = Console()
        print_table(rows, console if console.is_terminal else Console(width=_WIDTH))
    return 0 if all(row.passed for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenizer.parity",
        description="Compare this project with a recording of the reference, tensor by tensor.",
        epilog="example: python -m tokenizer.parity tests/golden --only 'video*:rec*'",
    )
    parser.add_argument("folder", type=Path, help="a folder with README.json and safetensors files (FORMAT 16)")
    parser.add_argument("--device", default="cpu", help="where to compute, for example cuda (default: cpu)")
    parser.add_argument(
        "--dtype",
        choices=list(_DTYPES),
        default="float32",
        help="precision of the networks (default: float32); bfloat16 is allowed 3e-2 of a tensor's standard deviation "
        "root mean square and 0.25 at most. f64/ tensors are always computed in float64",
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="FILE or FILE:TENSOR, with * and ?")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{name}' cannot be used: {' '.join(str(error).split())[:120]}") from None
    return device


if __name__ == "__main__":
    sys.exit(main())
