"""The report of a parity check, for people and for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenizer.parity.compare import Row
from tokenizer.parity.weights import STATE


def print_table(rows: list[Row], console: Console) -> None:
    """One line for each tensor; weights that came back bit for bit share one line a file."""
    table = Table("file", "tensor", "dtype", "error", "tolerance", "verdict")
    for row in _folded(rows):
        style = "" if row.passed else "bold red"
        verdict = row.verdict + (f": {row.detail}" if row.detail else "")
        table.add_row(
            row.file,
            row.tensor,
            row.dtype,
            _number(row.error, row.measure),
            _number(row.tolerance),
            verdict,
            style=style,
        )
    console.print(table)
    console.print(summary(rows))


def summary(rows: list[Row]) -> str:
    """One line: how many tensors, how many failed, and the first of them."""
    failed = [row for row in rows if not row.passed]
    compared = sum(row.error is not None for row in rows)
    if not failed:
        return f"all {compared} compared tensors agree"
    first = f"{failed[0].file}:{failed[0].tensor}" if failed[0].tensor else failed[0].file
    return f"{len(failed)} of {len(rows)} lines failed ({compared} tensors compared); the first is {first}"


def as_json(rows: list[Row], **header: Any) -> str:
    """The same as one JSON object; errors that are not numbers become null."""
    lines = []
    for row in rows:
        line = dataclasses.asdict(row) | {"passed": row.passed}
        if row.error is not None and not abs(row.error) < float("inf"):
            line["error"] = None
        lines.append(line)
    passed = all(row.passed for row in rows)
    return json.dumps({**header, "passed": passed, "rows": lines}, indent=1)


def _folded(rows: list[Row]) -> Iterable[Row]:
    weights: dict[str, list[Row]] = {}
    for row in rows:
        if row.file.startswith(STATE) and row.tensor and row.verdict == "ok":
            weights.setdefault(row.file, []).append(row)
    for row in rows:
        same = weights.get(row.file, [])
        if row not in same:
            yield row
        elif row is same[0]:
            worst = max(same, key=lambda other: other.error or 0.0)
            yield dataclasses.replace(worst, tensor=f"({len(same)} weights)")


def _number(value: float | None, measure: str = "") -> str:
    return "" if value is None else f"{value:.1e} {measure}".strip()
