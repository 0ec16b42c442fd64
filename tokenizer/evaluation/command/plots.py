"""Rate and distortion as SVG inside a page: bits for each pixel (logarithmic) against a figure.

Each system has a colour; a large mark with the interval of its mean, and a faint dot for each sample.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

WIDTH, HEIGHT = 520, 340
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 44
COLOURS: Final = ("#1f5fa8", "#c4541a", "#2c8a4b", "#8a3fa0", "#a8861f", "#c02d55", "#3a8f9c", "#666666")


@dataclass(frozen=True, slots=True)
class Series:
    """One system. rate, value: of the mean; low, high: ends of the interval of the value; dots: (rate, value)."""

    name: str
    rate: float
    value: float
    low: float | None
    high: float | None
    dots: Sequence[tuple[float, float]]


def rate_distortion(series: Sequence[Series], x_title: str, y_title: str) -> str:
    """An SVG element; empty where there is nothing to draw."""
    series = [one for one in series if one.rate > 0]
    if not series:
        return ""
    rates = [rate for one in series for rate in (one.rate, *(dot[0] for dot in one.dots)) if rate > 0]
    values = [value for one in series for value in (one.value, *(dot[1] for dot in one.dots))]
    x, y = _Axis.logarithmic(rates), _Axis.linear(values)
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(y_title)} against {html.escape(x_title)}">',
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}" class="frame"/>',
    ]
    for tick in x.ticks:
        place = _across(x.place(tick))
        parts.append(f'<line x1="{place}" x2="{place}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="grid"/>')
        parts.append(f'<text x="{place}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>')
    for tick in y.ticks:
        place = _down(y.place(tick))
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place}" y2="{place}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{place}" dy="4" text-anchor="end">{tick:g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_title)}</text>')
    parts.append(
        f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y_title)}</text>'
    )
    for number, one in enumerate(series):
        parts += _marks(one, COLOURS[number % len(COLOURS)], x, y)
    return "".join([*parts, "</svg>", _legend([one.name for one in series])])


def _marks(one: Series, colour: str, x: _Axis, y: _Axis) -> list[str]:
    parts = [
        f'<circle cx="{_across(x.place(rate))}" cy="{_down(y.place(value))}" r="2.5" fill="{colour}" opacity="0.3"/>'
        for rate, value in one.dots
        if rate > 0
    ]
    across = _across(x.place(one.rate))
    if one.low is not None and one.high is not None:
        ends = f'y1="{_down(y.place(one.low))}" y2="{_down(y.place(one.high))}"'
        parts.append(f'<line x1="{across}" x2="{across}" {ends} stroke="{colour}" stroke-width="2"/>')
    parts.append(
        f'<circle cx="{across}" cy="{_down(y.place(one.value))}" r="6" fill="{colour}" stroke="white">'
        f"<title>{html.escape(one.name)}: {one.rate:.3g} bits, {one.value:.4g}</title></circle>"
    )
    return parts


def _legend(names: Sequence[str]) -> str:
    entries = (
        f'<li><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{html.escape(name)}</li>'
        for number, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(entries)}</ul>'


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    ticks: Sequence[float]
    is_logarithmic: bool

    @classmethod
    def linear(cls, values: Sequence[float]) -> _Axis:
        low, high = min(values), max(values)
        step = _step((high - low or abs(high) or 1.0) / 5)
        first, last = math.floor(low / step), math.ceil(high / step)
        last = max(last, first + 1)
        return cls(first * step, last * step, [round(n * step, 10) for n in range(first, last + 1)], False)

    @classmethod
    def logarithmic(cls, values: Sequence[float]) -> _Axis:
        low, high = min(values) / 1.15, max(values) * 1.15
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [n * 10.0**decade for decade in decades for n in (1, 2, 5)]
        return cls(low, high, [tick for tick in ticks if low <= tick <= high], True)

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        if self.is_logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _step(about: float) -> float:
    """A round number near `about`."""
    power = 10.0 ** math.floor(math.log10(about))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= about * 0.999))


def _across(place: float) -> float:
    return round(LEFT + place * (WIDTH - LEFT - RIGHT), 1)


def _down(place: float) -> float:
    return round(HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM), 1)


def series_of(
    figure: str, rows: Mapping[str, Mapping[str, object]], samples: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> list[Series]:
    """One series for each system that has the figure and bits for each pixel.

    Args:
        rows: of results.json, by system.
        samples: figures of each sample, by system.
    """
    found = []
    for system, row in rows.items():
        figures = row["figures"]
        assert isinstance(figures, dict)
        if figure not in figures or "bits_per_pixel" not in figures:
            continue
        dots = [
            (one["bits"] / one["pixels"], one[figure])
            for one in samples.get(system, {}).values()
            if figure in one and one.get("pixels")
        ]
        value, rate = figures[figure], figures["bits_per_pixel"]["value"]
        found.append(Series(system, rate, value["value"], value["low"], value["high"], dots))
    return found
