"""`python -m tokenizer.training.curriculum.curves RUN ... --out curves.png`: what stages measured while they trained.

Runs stand one behind the other in the order given, each from the step at which the one before ended; dotted lines are
where a stage begins. A panel for the training loss, with gaps at steps that were not finite, one for each held-out set
whose PSNR was measured, and one for the zero-shot accuracies, with the share of the most frequent class dashed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizer.atomic import atomic_path
from tokenizer.cli.outcome import run
from tokenizer.errors import InputError, require_package
from tokenizer.training.curriculum.records import METRICS, lines_of

_WINDOW = 5
"""Records that a training curve is averaged over."""

Points = list[tuple[int, float]]
"""Step and value; NaN where a line has a gap."""


@dataclass(frozen=True, slots=True)
class Panel:
    """lines: by name. dashed: constants to compare with, by the name of their line."""

    title: str
    lines: dict[str, Points]
    dashed: dict[str, float]


@dataclass(frozen=True, slots=True)
class Stages:
    """panels, and where each run begins: its first step and its name."""

    panels: list[Panel]
    starts: list[tuple[int, str]]


def read_stages(runs: Sequence[Path]) -> Stages:
    """What runs measured, one behind the other.

    Raises:
        InputError: a log is missing, unreadable or empty.
    """
    loss: Points = []
    sets: dict[str, dict[str, Points]] = defaultdict(lambda: defaultdict(list))
    starts: list[tuple[int, str]] = []
    first = 0
    for folder in runs:
        lines = lines_of(folder / METRICS)
        if not lines:
            raise InputError(f"{folder / METRICS}: the log is empty")
        starts.append((first, folder.name))
        # JSON knows no NaN: the loss of a step that was skipped is null.
        trained = [
            (line["step"], math.nan if line["loss"] is None else line["loss"]) for line in lines if "loss" in line
        ]
        loss += _smooth([(first + step, float(value)) for step, value in trained])
        for line in lines:
            for key, value in line.items():
                if key.startswith("validation/") and value is not None:
                    name, _, figure = key.removeprefix("validation/").rpartition("/")
                    sets[figure][name].append((first + line["step"], float(value)))
        first += max(int(line["step"]) for line in lines)
    drawable = any(math.isfinite(value) for _, value in loss)
    panels = [Panel("training loss", {"loss": loss}, {})] if drawable else []
    panels += [Panel(f"{name}, PSNR dB", {name: points}, {}) for name, points in sets["psnr"].items()]
    if sets["accuracy"]:
        frequent = {name: points[-1][1] for name, points in sets["majority"].items()}
        panels.append(Panel("zero-shot accuracy", dict(sets["accuracy"]), frequent))
    return Stages(panels, starts)


def draw_stages(stages: Stages, out: Path) -> None:
    """Draw all panels side by side into a picture, whole or not at all.

    Raises:
        InputError: matplotlib is missing or cannot write such a file, or there is nothing to draw.
    """
    require_package("matplotlib", "drawing curves", "train")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.backend_bases import FigureCanvasBase

    if out.suffix.removeprefix(".") not in FigureCanvasBase.get_supported_filetypes():
        raise InputError(f"{out}: no picture of this sort can be drawn; let its name end in .png")
    if not stages.panels:
        raise InputError("the runs have logged nothing that could be drawn yet")
    wide = min(3, len(stages.panels))
    high = -(-len(stages.panels) // wide)
    figure, axes = pyplot.subplots(high, wide, figsize=(4 * wide, 2.8 * high), squeeze=False)
    for axis in axes.flat[len(stages.panels) :]:
        axis.remove()
    for axis, panel in zip(axes.flat, stages.panels, strict=False):
        for number, (name, points) in enumerate(panel.lines.items()):
            style = "-" if len(points) > 60 else "o-"
            axis.plot(*zip(*points, strict=True), style, markersize=3, color=f"C{number}", label=name)
            if name in panel.dashed:
                axis.axhline(panel.dashed[name], color=f"C{number}", linestyle="--", linewidth=1)
        for step, _ in stages.starts[1:]:
            axis.axvline(step, color="grey", linestyle=":", linewidth=1)
        axis.set_title(panel.title, fontsize="small")
        axis.set_xlabel("step", fontsize="small")
        axis.tick_params(labelsize="small")
        axis.grid(alpha=0.3)
        if len(panel.lines) > 1 or panel.dashed:
            axis.legend(fontsize="small")
    top = axes[0][0]
    for step, name in stages.starts:
        top.annotate(name, (step, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", fontsize="xx-small")
    figure.tight_layout()
    with atomic_path(out) as path:
        figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _smooth(points: Points) -> Points:
    """Each value averaged with those just before it that are numbers; what is none stays none."""
    smoothed = []
    for place, (step, own) in enumerate(points):
        values = [value for _, value in points[max(0, place + 1 - _WINDOW) : place + 1] if not math.isnan(value)]
        smoothed.append((step, own if math.isnan(own) else sum(values) / len(values)))
    return smoothed


def main(arguments: list[str]) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tokenizer.training.curriculum.curves", description=__doc__)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, in the order of their stages"
    )
    parser.add_argument("--out", type=Path, required=True, help="the picture to write (.png)")
    options = parser.parse_args(arguments)

    def command() -> None:
        draw_stages(read_stages(options.runs), options.out)
        print(options.out)

    return run(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
