"""`atoken data show`: a contact sheet, figures, plots and a page of any set of shards, also those of other makers.

Into the folder go

    sheet.png          samples with label and caption
    plots.png          sizes, lengths, tokens, captions, labels
    statistics.json    the same as numbers
    index.html         all of it, in one file
    broken.jsonl       samples that cannot be read, one a line; missing where there are none

Of a set that is larger than the limit, the first samples of every shard are looked at, equally many of each.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from data.faults import Quarantine
from data.looking.figures import Figures, table
from data.looking.fonts import Fonts
from data.looking.look import Look
from data.looking.page import write_page
from data.looking.plots import draw_plots
from data.looking.sheet import BOXES, draw_sheet
from data.order import shuffled
from data.samples import Item
from data.shards.manifest import Shard, ShardSet, read_set
from data.tap import read_items
from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError

HEAD = ("", "min", "5%", "median", "95%", "max", "mean")

WRITTEN = ("index.html", "sheet.png", "plots.png", "statistics.json")
"""All that is written besides broken.jsonl, the page first."""

_WORKERS_FROM = 2000
"""Samples from which on starting processes pays."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a set holds.

    shards: as they were named. out: folder of the results.
    figures: as in statistics.json.
    """

    shards: str
    out: str
    figures: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {"shards": self.shards, "out": self.out, **self.figures}

    def lines(self) -> list[str]:
        """The figures that are no quantities."""
        figures = self.figures
        shards = "1 shard" if figures["shards"] == 1 else f"{figures['shards']} shards"
        told = [
            f"{figures['samples']} {figures['kind']} in {shards}, "
            f"{figures['bytes'] / 1e6:.1f} MB; looked at {figures['looked_at']}"
        ]
        labels = f", {figures['with_label']:.0%} with one of {figures['labels']} labels" if figures["labels"] else ""
        told.append(f"{figures['with_caption']:.0%} with captions{labels}")
        broken = ", ".join(f"{cause}: {count}" for cause, count in figures["broken"].items())
        told.append(f"broken: {broken} (named in broken.jsonl)" if broken else "broken: none")
        if "latent_space" in figures["facts"]:
            told.append(_latents_line(figures["facts"]))
        if figures["left_out_when_made"]:
            told.append(f"left out when the set was made: {figures['left_out_when_made']} (named in its manifest)")
        return told

    def as_text(self) -> str:
        """For people: a few lines and a table."""
        shown = Table(*HEAD, title=self.shards, title_justify="left")
        for column in shown.columns[1:]:
            column.justify = "right"
        for row in table(self.figures):
            shown.add_row(*row)
        buffer = io.StringIO()
        Console(file=buffer, width=100).print(shown)
        rows = [row.rstrip() for row in buffer.getvalue().splitlines()]
        return "\n".join([*self.lines(), *rows, f"written to {self.out}: {', '.join(WRITTEN)}"])


def show(
    shards: str, out: Path, *, count: int = 48, seed: int = 0, limit: int = 10_000, console: Console | None = None
) -> Report:
    """Look at a set of shards.

    Args:
        shards: a folder, manifest, tar, pattern or URL, as `read_set` takes it.
        out: folder for what is written; made where it is missing, and files of an earlier look replaced.
        count: samples on the sheet, drawn from those that are looked at.
        seed: of which ones.
        limit: samples that are looked at, at most.
        console: for progress; by default stderr.

    Raises:
        InputError: no set there, a missing package, or not one sample that can be read.
    """
    fonts = Fonts()
    console = console or Console(stderr=True)
    found = read_set(shards, console=console)
    part = first_samples(found, limit, seed)
    look = Look(found.kind, _drawn(part, count, seed), BOXES[found.kind])
    out.mkdir(parents=True, exist_ok=True)
    (out / "broken.jsonl").unlink(missing_ok=True)
    quarantine = Quarantine(max_share=1.0, file=out / "broken.jsonl")
    figures, shown = _looked(part, look, quarantine, console)
    if not figures.samples:
        raise InputError(f"{shards}: no sample can be read ({quarantine.summary()}); see {out / 'broken.jsonl'}")
    told = {
        "kind": found.kind,
        "samples": found.samples,
        "shards": len(found.shards),
        "bytes": found.bytes,
        **figures.as_json(),
        "broken": dict(quarantine.causes.most_common()),
        "left_out_when_made": len(found.skipped),
        "facts": dict(found.facts),
    }
    report = Report(shards, str(out), told)
    with atomic_path(out / "statistics.json") as temporary:
        temporary.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    draw_plots(out / "plots.png", figures, found.facts.get("statistics"), fonts)
    draw_sheet(out / "sheet.png", shown, found.kind, fonts)
    write_page(
        out / "index.html", shards, report.lines(), HEAD, table(told), shown, found.kind, plots=out / "plots.png"
    )
    return report


def first_samples(found: ShardSet, limit: int, seed: int) -> ShardSet:
    """The first samples of every shard, equally many of each and `limit` in all; of some shards where they are more.

    Args:
        seed: of which shards are looked at.
    """
    if found.samples <= limit:
        return found
    full = [number for number, shard in enumerate(found.shards) if shard.samples]
    chosen = sorted(full[place] for place in shuffled(len(full), "shards to look at", seed)[:limit])
    left, shares = limit, dict[int, Shard]()
    # The shortest first: what they lack, others give.
    for rank, number in enumerate(sorted(chosen, key=lambda number: found.shards[number].samples)):
        shard = found.shards[number]
        share = min(shard.samples, left // (len(chosen) - rank))
        left -= share
        shares[number] = dataclasses.replace(shard, samples=share)
    return dataclasses.replace(found, shards=tuple(shares[number] for number in chosen))


def _latents_line(facts: Mapping[str, Any]) -> str:
    line = f"{facts.get('latents', 'latents')} of {facts.get('model')}, latent space {facts['latent_space']}"
    statistics = facts.get("statistics")
    if not statistics:
        return line
    spans = [
        f"{name} {min(values):.3g} to {max(values):.3g}" for name in ("mean", "std") if (values := statistics[name])
    ]
    return f"{line}; {len(statistics['mean'])} channels, {' and '.join(spans)}"


def _drawn(part: ShardSet, count: int, seed: int) -> frozenset[tuple[str, int]]:
    """Shard and number of the samples on the sheet."""
    places = [(shard.url, index) for shard in part.shards for index in range(shard.samples)]
    return frozenset(places[place] for place in shuffled(len(places), "samples to show", seed)[:count])


def _looked(part: ShardSet, look: Look, quarantine: Quarantine, console: Console) -> tuple[Figures, list[Item]]:
    figures, shown = Figures(), list[Item]()
    workers = len(os.sched_getaffinity(0)) if part.samples >= _WORKERS_FROM else 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("looking", total=part.samples)
        for item in read_items(part, look, workers=workers, quarantine=quarantine):
            figures.add(item)
            if item.facts["shown"]:
                shown.append(item)
            progress.update(bar, completed=quarantine.good + quarantine.bad)
    return figures, sorted(shown, key=lambda item: item.id)
