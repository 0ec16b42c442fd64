"""Plots of what a set holds, on one page; which ones depends on what its samples measure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.looking.figures import Figures, number, quantiles
from data.looking.fonts import Fonts
from tokenizer.atomic import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOUR = "#1450a0"
_ACROSS = 3
_PANEL = (5.0, 3.6)
_LONGEST_LABEL = 28

Plot = Callable[["Axes"], None]


def draw_plots(path: Path, figures: Figures, statistics: Mapping[str, Any] | None, fonts: Fonts) -> None:
    """Write the plots as PNG.

    Args:
        statistics: of the latents of a tokenised set, as in its manifest.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plots = _chosen(figures, statistics, fonts)
    across = min(_ACROSS, len(plots))
    down = -(-len(plots) // across)
    figure = Figure(figsize=(_PANEL[0] * across, _PANEL[1] * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for panel, plot in zip(panels, plots, strict=False):
        plot(panel)
    for panel in panels[len(plots) :]:
        panel.set_axis_off()
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as a box, as the sheet does
        FigureCanvasAgg(figure)
        figure.savefig(temporary, format="png", dpi=100)


def _chosen(figures: Figures, statistics: Mapping[str, Any] | None, fonts: Fonts) -> list[Plot]:
    plots: list[Plot] = []
    if "height" in figures.values:
        plots += [
            lambda panel: _sizes(panel, figures),
            _histogram(figures, "aspect", "aspect (width / height)", log=True),
        ]
    if "seconds" in figures.values:
        plots += [
            _histogram(figures, "seconds", "length of videos, s"),
            _histogram(figures, "frames", "frames of videos"),
        ]
    if "voxels" in figures.values:
        plots.append(_histogram(figures, "voxels", "voxels of assets"))
    native = ", at native resolution" if "height" in figures.values else ""
    plots.append(_histogram(figures, "tokens", f"tokens of a sample{native}"))
    if figures.captions:
        plots.append(_histogram(figures, "caption_words", "words of captions"))
        plots.append(_histogram(figures, "caption_characters", "characters of captions"))
    if figures.labels:
        plots.append(lambda panel: _labels(panel, figures, fonts))
    if statistics:
        plots.append(lambda panel: _channels(panel, statistics))
    return plots


def _sizes(panel: Axes, figures: Figures) -> None:
    width, height = figures.array("width"), figures.array("height")
    # Faint where there are many, so that heaps show.
    panel.scatter(width, height, s=12, alpha=min(1.0, max(0.05, 30 / len(width))), color=_COLOUR, linewidths=0)
    panel.set(xlabel="width, pixels", ylabel="height, pixels", title="sizes")
    if min(width.min(), height.min()) * 8 < max(width.max(), height.max()):
        _logarithmic(panel, "x", width)
        _logarithmic(panel, "y", height)


def _histogram(figures: Figures, name: str, title: str, *, log: bool | None = None) -> Plot:
    from matplotlib.ticker import MaxNLocator

    values = figures.array(name)

    def draw(panel: Axes) -> None:
        wide = values.min() > 0 and values.max() > 30 * values.min() if log is None else log
        panel.hist(values, bins=_bins(values, log=wide).tolist(), color=_COLOUR)
        panel.set(title=title, ylabel="samples")
        if wide:
            _logarithmic(panel, "x", values)
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
        median = quantiles(values)["median"]  # that of the table
        panel.axvline(median, color="black", linewidth=1, linestyle="--", label=f"median {number(median)}")
        panel.legend(framealpha=0.85)  # bars may lie behind

    return draw


def _logarithmic(panel: Axes, axis: Literal["x", "y"], values: NDArray[np.float64]) -> None:
    """With ticks that are plain numbers, as many as there is room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    span = float(values.max() / values.min())
    subs = (1, 1.5, 2, 3, 4, 5, 7) if span < 10 else (1, 2, 5) if span < 1000 else (1,)
    panel.set(**{f"{axis}scale": "log"})
    ticks = panel.xaxis if axis == "x" else panel.yaxis
    ticks.set_major_locator(LogLocator(subs=subs))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_locator(NullLocator())


def _bins(values: NDArray[np.float64], *, log: bool) -> NDArray[np.float64]:
    """Up to 40 bins; whole numbers do not fall between them."""
    low, high = float(values.min()), float(values.max())
    if log:
        return np.geomspace(low / 1.05, high * 1.05, 41)
    if np.all(values == values.round()):
        step = max(1, -(-int(high - low + 1) // 40))
        return np.arange(low - 0.5, high + step + 0.5, step)
    margin = 0.5 if high == low else 0.0
    return np.linspace(low - margin, high + margin, 41)


def _labels(panel: Axes, figures: Figures, fonts: Fonts) -> None:
    from matplotlib.font_manager import FontProperties

    top = figures.top_labels()[::-1]
    names = [label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…" for label, _ in top]
    places = range(len(top))
    panel.barh(places, [count for _, count in top], color=_COLOUR)
    panel.set_yticks(places, names)
    for text, name in zip(panel.get_yticklabels(), names, strict=True):
        text.set_parse_math(False)
        text.set_fontproperties(FontProperties(fname=fonts.path_for(name), size=6 if len(top) > 12 else 9))
    panel.set(title=f"labels ({len(figures.labels)} in all)", xlabel="samples")


def _channels(panel: Axes, statistics: Mapping[str, Any]) -> None:
    mean, std = (np.array(statistics[name], dtype=np.float64) for name in ("mean", "std"))
    panel.errorbar(range(len(mean)), mean, std, fmt=".", color=_COLOUR, elinewidth=1)
    panel.axhline(0, color="black", linewidth=0.5)
    panel.set(title="latents: mean and standard deviation", xlabel="channel")
