"""report.html: tables that sort, plots, pictures and players in one file that needs nothing else.

Like the pages of `atoken view` it must work from a disk, from a mail and in ten years: everything is in it, and its
content security policy forbids it to load anything. Names of files and systems are text, never markup.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tokenizer.atomic import atomic_path
from tokenizer.evaluation.command.examples import Example, Panel
from tokenizer.evaluation.command.markdown import count_line
from tokenizer.evaluation.command.measurement import Measurement
from tokenizer.evaluation.command.names import printable
from tokenizer.evaluation.command.plots import rate_distortion, series_of
from tokenizer.evaluation.command.results import COLUMNS, Column, Results, best_rows, columns_of, shown_value

FILE = "report.html"

_TITLES: Final = {"image": "Pictures", "video": "Clips", "asset": "3D assets"}
_PLOTTED: Final = ("psnr", "ssim", "lpips_alexnet", "lpips_vgg16")

_STYLE: Final = """
:root { color-scheme: light; font: 15px/1.45 system-ui, sans-serif; color: #1d2329; background: #fff; }
body { margin: 0 auto; max-width: 1240px; padding: 24px; }
h1 { font-size: 1.6rem; margin: 0 0 4px; } h2 { margin: 32px 0 8px; } h3 { margin: 20px 0 6px; font-size: 1rem; }
p { margin: 6px 0; max-width: 80ch; } .dim { color: #5c6670; font-size: 0.87rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.87rem; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid #e2e6ea; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #1f5fa8; } th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; } td.best { font-weight: 700; }
td small { color: #5c6670; font-weight: 400; }
.plots, .panels { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
.plot { width: 520px; max-width: 100%; font-size: 11px; fill: #1d2329; }
.plot .frame { fill: none; stroke: #9aa4ad; } .plot .grid { stroke: #e2e6ea; }
.legend { list-style: none; margin: 2px 0 0 58px; padding: 0; font-size: 0.8rem; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 6px; }
figure { margin: 0; max-width: 100%; display: table; }
figcaption { font-size: 0.8rem; display: table-caption; caption-side: bottom; }
figcaption b { font-weight: 600; } img, video { max-width: 100%; display: block; background: #eef1f4; }
.asset figure, .video figure { display: block; width: 100%; }
.asset figcaption, .video figcaption { display: block; }
 .asset img { width: 100%; max-width: 1200px; }
@media (max-width: 700px) { .video figure { overflow-x: auto; } .video video { max-width: none; } }
details { margin: 8px 0; } pre { overflow-x: auto; background: #f4f6f8; padding: 10px; font-size: 0.8rem; }
code { overflow-wrap: anywhere; }
"""

_SCRIPT: Final = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.querySelectorAll("th")];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const first = head.dataset.first;
    const order = head.ariaSort === first ? (first === "ascending" ? "descending" : "ascending") : first;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.ariaSort = order;
    const sign = order === "ascending" ? 1 : -1;
    const value = (row) => row.cells[column].dataset.value;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (column ? x - y : x.localeCompare(y));
    });
    table.tBodies[0].append(...rows);
  }));
}
document.documentElement.dataset.state = "drawn";
"""

_POLICY: Final = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)


def write_html(out: Path, results: Results, measurement: Measurement, examples: Sequence[Example]) -> None:
    """Write report.html, whole or not at all."""
    with atomic_path(out / FILE) as temporary:
        temporary.write_text(printable(as_html(results, measurement, examples)), encoding="utf-8")


def as_html(results: Results, measurement: Measurement, examples: Sequence[Example]) -> str:
    """The whole page."""
    title = f"Evaluation on {results['data']['source']}"
    preset, machine = results["preset"], results["machine"]
    body = [
        f"<h1>{_text(title)}</h1>",
        f"<p>Preset <b>{_text(preset['name'])}</b>: {_text(preset['protocol'])}</p>",
        f"<p>{_text(count_line(results))} Seed {results['seed']}; {_text(machine['device'])}, "
        f"torch {_text(machine['versions']['torch'])}. Figures in brackets are 95 % bootstrap intervals over samples; "
        "click a heading to sort.</p>",
    ]
    for kind, rows in results["kinds"].items():
        samples = {system: records.samples() for (of, system), records in measurement.records.items() if of == kind}
        body += [f'<section id="{kind}"><h2>{_TITLES[kind]}</h2>', _table(rows), _meanings(columns_of(rows))]
        body += [_plots(rows, samples)]
        body += [_example(example) for example in examples if example.kind == kind]
        body += ["</section>"]
    body += [_notes(results), _provenance(results)]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width"><meta name="generator" content="atoken evaluate">'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(part for part in body if part)
        + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _table(rows: Mapping[str, Any]) -> str:
    columns = columns_of(rows)
    best = {name: best_rows(name, rows) for name in columns}
    heads = "".join(_heading(COLUMNS[name]) for name in columns)
    lines = []
    for system, row in rows.items():
        cells = "".join(_cell(name, row["figures"].get(name), system in best[name]) for name in columns)
        lines.append(
            f'<tr><td data-value="{_text(system)}">{_text(system)}</td>'
            f'<td data-value="{row["samples"]}">{row["samples"]}</td>{cells}</tr>'
        )
    return (
        '<div class="wide"><table class="sortable"><thead><tr>'
        '<th data-first="ascending"><button>system</button></th>'
        f'<th data-first="descending"><button>samples</button></th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _heading(column: Column) -> str:
    """The first click shows the best row first."""
    first = "ascending" if column.better < 0 else "descending"
    return f'<th data-first="{first}" title="{_text(column.meaning)}"><button>{_text(column.title)}</button></th>'


def _cell(name: str, figure: Mapping[str, Any] | None, is_best: bool) -> str:
    if figure is None:
        return '<td data-value=""></td>'
    value, _, interval = shown_value(name, figure).partition(" ")
    small = f" <small>{_text(interval)}</small>" if interval else ""
    return f'<td data-value="{figure["value"]!r}"{" class=best" if is_best else ""}>{_text(value)}{small}</td>'


def _meanings(columns: Sequence[str]) -> str:
    lines = "".join(f"<li>{_text(COLUMNS[name].title)}: {_text(COLUMNS[name].meaning)}</li>" for name in columns)
    return f'<details class="dim"><summary>What the columns are</summary><ul>{lines}</ul></details>'


def _plots(rows: Mapping[str, Any], samples: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    plots = [
        f"<div>{plot}</div>"
        for name in _PLOTTED
        if (plot := rate_distortion(series_of(name, rows, samples), "bits for each pixel", COLUMNS[name].title))
    ]
    if not plots:
        return ""
    return (
        '<h3>Rate and distortion</h3><p class="dim">Large marks are means with their intervals, dots are samples.</p>'
        f'<div class="plots">{"".join(plots)}</div>'
    )


def _example(example: Example) -> str:
    note = f' <span class="dim">{_text(example.note)}</span>' if example.note else ""
    panels = "".join(_panel(panel) for panel in example.panels)
    return (
        f"<h3>{example.rank.capitalize()}: <code>{_text(example.sample)}</code>{note}</h3>"
        f'<div class="panels {example.kind}">{panels}</div>'
    )


def _panel(panel: Panel) -> str:
    figures = ", ".join(
        f"{COLUMNS[name].title} {panel.figures[name]:.{COLUMNS[name].digits}f}"
        for name in ("psnr", "ssim", "lpips_vgg16", "lpips_alexnet")
        if name in panel.figures
    )
    if "pixels" in panel.figures:
        figures += f", {panel.figures['bits'] / panel.figures['pixels']:.3f} bits/pixel"
    told = _text(figures)
    if panel.media.startswith("video/"):
        shown = f'<video controls loop muted playsinline preload="auto" src="{panel.uri}"></video>'
    else:
        shown = f'<img alt="{_text(panel.title)}" src="{panel.uri}">'
    return f"<figure>{shown}<figcaption><b>{_text(panel.title)}</b> {told}</figcaption></figure>"


def _notes(results: Results) -> str:
    parts = []
    if results["notes"]:
        parts.append(f"<h2>Notes</h2><ul>{''.join(f'<li>{_text(note)}</li>' for note in results['notes'])}</ul>")
    left = results["left_out"]
    if left["samples"]:
        lines = "".join(f"<li><code>{_text(name)}</code>: {_text(why)}</li>" for name, why in left["reasons"].items())
        parts.append(f"<h2>Left out</h2><p>{left['samples']} samples could not be measured.</p><ul>{lines}</ul>")
    return "".join(parts)


def _provenance(results: Results) -> str:
    kept = {key: results[key] for key in ("command", "machine", "data", "preset", "systems", "networks", "intervals")}
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    return f"<h2>What was measured, with what</h2><pre>{_text(results['command'])}</pre>" + (
        f"<details><summary>Versions, checksums, settings</summary><pre>{_text(text)}</pre></details>"
    )


def _text(value: object) -> str:
    return html.escape(str(value))
