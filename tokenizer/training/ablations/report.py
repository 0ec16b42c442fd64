"""The report of ablations: README.md with tables, a plot for each study; what runs have written, and no more."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizer.atomic import atomic_path
from tokenizer.errors import require_package
from tokenizer.training.ablations.curves import Cost, Curves, cost_of, curves_of, points_of
from tokenizer.training.ablations.plan import Study
from tokenizer.training.ablations.running import MACHINE

README = "README.md"

WIDEST = 5
"""Panels beside each other, at most."""

_HEAD = """\
# Ablations

What the paper shows by leaving something out, rerun at small sizes from the files in `{configs}`. The command at the
end trained the runs, measured them and wrote this page; no figure is from elsewhere. Each way was trained once, with
one seed: a difference says what these two runs gave, and a small one may come out the other way with another seed.
"""


def write_report(studies: Mapping[str, Study], out: Path, docs: Path, *, command: str, configs: str) -> None:
    """Write README.md and STUDY.png into `docs`, each whole or not at all.

    Args:
        studies: whose runs have all ended, by name. out: folder of their runs.
        command: that this was made by. configs: where the files of the runs are.

    Raises:
        InputError: matplotlib is not installed, or a log of a run is unreadable.
    """
    parts = [_HEAD.format(configs=configs)]
    for name, study in studies.items():
        curves = {
            size: {variant.name: curves_of(study, variant, out / name) for variant in variants}
            for size, variants in study.sizes().items()
        }
        draw(study, curves, docs / f"{name}.png")
        parts.append(_section(name, study, curves, out / name))
    parts.append(f"## Made by\n\n```sh\n{command}\n```\n")
    with atomic_path(docs / README) as path:
        path.write_text("\n".join(parts), encoding="utf-8")


def draw(study: Study, curves: Mapping[str, Mapping[str, Curves]], out: Path) -> None:
    """A panel for each size and figure, a line for each variant, dotted lines where its runs follow each other."""
    require_package("matplotlib", "drawing curves", "train")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(size, column) for size in curves for column in study.columns]
    count = len(study.columns)
    wide = count if count <= WIDEST else -(-count // 2)
    high = -(-len(panels) // wide)
    figure, axes = pyplot.subplots(high, wide, figsize=(3.2 * wide, 2.7 * high), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (size, column) in zip(axes.flat, panels, strict=False):
        for number, (name, found) in enumerate(curves[size].items()):
            points = found.points[column]
            colour = f"C{number}"
            axis.plot([p[0] for p in points], [p[1] for p in points], "o-", markersize=3, color=colour, label=name)
            for border in found.borders:
                axis.axvline(border, color=colour, linestyle=":", linewidth=1)
        axis.set_title(f"{size}: {study.columns[column]}", fontsize="small")
        axis.set_xlabel("step", fontsize="small")
        axis.tick_params(labelsize="small")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.tight_layout()
    with atomic_path(out) as path:
        figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _section(name: str, study: Study, curves: Mapping[str, Mapping[str, Curves]], runs: Path) -> str:
    lines = [f"## {study.title}", "", study.question, "", study.measured, "", f"![{study.title}]({name}.png)", ""]
    for size, variants in curves.items():
        rows: dict[str, tuple[list[float | None], Cost]] = {}
        if (start := study.start_of(size)) is not None:
            before = [points_of(runs / start, column, perceptual=study.perceptual) for column in study.columns]
            rows["start of both"] = [points[-1][1] if points else None for points in before], cost_of(runs / start)
        for variant, found in variants.items():
            rows[variant] = [found.final(column) for column in study.columns], found.cost
        lines += [f"### {size}", "", *table(list(study.columns.values()), rows, list(variants)), ""]
    for column, label in study.constants.items():
        values = {
            points[-1][1] for run in study.runs if (points := points_of(runs / run.name, column, perceptual=False))
        }
        lines += [f"- {label}: {', '.join(f'{value:.4g}' for value in sorted(values))}"]
    machines = dict.fromkeys(_machine(runs / run.name / MACHINE) for run in study.runs)
    lines += [*([""] if study.constants else []), f"Trained on {'; '.join(machines)}.", ""]
    return "\n".join(lines)


def table(
    columns: Sequence[str], rows: Mapping[str, tuple[Sequence[float | None], Cost]], compared: Sequence[str]
) -> list[str]:
    """A Markdown table.

    Args:
        columns: titles of the figures.
        rows: figures and cost, by name.
        compared: where these are two rows, the second minus the first stands below.
    """
    lines = [
        "| | " + " | ".join([*columns, "steps", "tokens", "seconds"]) + " |",
        "|---|" + "---:|" * (len(columns) + 3),
    ]
    for name, (values, cost) in rows.items():
        cells = ["-" if value is None else f"{value:.4g}" for value in values]
        lines.append(f"| {name} | " + " | ".join([*cells, *_costs(cost)]) + " |")
    if len(compared) == 2:
        first, second = (rows[name][0] for name in compared)
        cells = ["-" if a is None or b is None else f"{b - a:+.3g}" for a, b in zip(first, second, strict=True)]
        lines.append(f"| *{compared[1]} - {compared[0]}* | " + " | ".join([*cells, "", "", ""]) + " |")
    return lines


def _costs(cost: Cost) -> list[str]:
    return [f"{cost.steps}", f"{cost.tokens:,}", f"{cost.seconds:.0f}"]


def _machine(path: Path) -> str:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    threads = f", {found['threads']} threads" if found["threads"] else ""
    return f"{found['device']}{threads}, torch {found['torch']}, Python {found['python']}"
