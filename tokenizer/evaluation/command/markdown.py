"""results.md: the tables, for people and for other documents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizer.atomic import atomic_path
from tokenizer.evaluation.command.results import COLUMNS, Results, best_rows, columns_of, shown_value

FILE = "results.md"
_TITLES = {"image": "Pictures", "video": "Clips", "asset": "3D assets"}


def write_markdown(out: Path, results: Results) -> None:
    """Write results.md, whole or not at all."""
    with atomic_path(out / FILE) as temporary:
        temporary.write_text(as_markdown(results), encoding="utf-8")


def as_markdown(results: Results) -> str:
    """The whole document."""
    data, preset, machine = results["data"], results["preset"], results["machine"]
    lines = [
        f"# Evaluation on {data['source']}",
        "",
        f"Preset `{preset['name']}`: {preset['protocol']}",
        "",
        f"{count_line(results)} Seed {results['seed']}, {machine['device']}, torch {machine['versions']['torch']}.",
        "Figures in brackets are 95 % bootstrap intervals over samples.",
        "",
    ]
    for kind, rows in results["kinds"].items():
        lines += [f"## {_TITLES[kind]}", "", *table(rows), ""]
        lines += [f"- {COLUMNS[name].title}: {COLUMNS[name].meaning}." for name in columns_of(rows)]
        lines += [""]
    lines += ["## Systems", "", *_systems(results["systems"]), ""]
    lines += ["## Networks that measure", "", *_networks(results["networks"]), ""]
    if results["notes"]:
        lines += ["## Notes", "", *(f"- {note}" for note in results["notes"]), ""]
    if results["left_out"]["samples"]:
        lines += ["## Left out", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in results["left_out"]["reasons"].items()]
        lines += [""]
    lines += ["```sh", results["command"], "```"]
    return "\n".join(lines) + "\n"


def table(rows: Mapping[str, Any], columns: list[str] | None = None, *, interval: bool = True) -> list[str]:
    """A Markdown table of systems; the best values are bold."""
    columns = columns_of(rows) if columns is None else columns
    best = {name: best_rows(name, rows) for name in columns}
    lines = [
        "| system | samples | " + " | ".join(COLUMNS[name].title for name in columns) + " |",
        "|---|---:|" + "---:|" * len(columns),
    ]
    for system, row in rows.items():
        cells = [
            _cell(name, row["figures"].get(name), bold=system in best[name], interval=interval) for name in columns
        ]
        lines.append(f"| {_escaped(system)} | {row['samples']} | {' | '.join(cells)} |")
    return lines


def count_line(results: Results) -> str:
    """How many samples of each kind, and how many were left out."""
    counts = (
        ", ".join(f"{count} {kind}{'s' * (count != 1)}" for kind, count in results["samples"].items()) or "no samples"
    )
    left = results["left_out"]["samples"]
    return f"{counts} measured, {left} left out."


def _cell(name: str, figure: Mapping[str, Any] | None, *, bold: bool, interval: bool) -> str:
    if figure is None:
        return ""
    text = shown_value(name, figure, interval=interval)
    return f"**{text}**" if bold else text


def _systems(systems: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, facts in systems.items():
        told = ", ".join(f"{key.replace('_', ' ')} {_told(value)}" for key, value in facts.items() if value is not None)
        lines.append(f"- {_escaped(name)}: {told}")
    return lines


def _networks(networks: Mapping[str, Any]) -> list[str]:
    return [
        f"- {name}: " + ", ".join(f"{key.replace('_', ' ')} {_told(value)}" for key, value in facts.items())
        for name, facts in networks.items()
    ] or ["none"]


def _told(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64 and all(letter in "0123456789abcdef" for letter in value):
        return f"`{value[:16]}…`"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
