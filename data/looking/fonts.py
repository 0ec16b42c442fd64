"""Fonts for captions in any script: DejaVu, which comes with matplotlib, or an installed font that has more glyphs."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable
from pathlib import Path

from PIL import ImageFont

from tokenizer.errors import require_package

_ENDINGS = (".ttf", ".otf", ".ttc")


class Fonts:
    """Finds a font for a text. Looking through the installed ones takes a moment, so it is done when one is needed.

    Raises:
        InputError: matplotlib is not installed.
    """

    def __init__(self) -> None:
        require_package("matplotlib", "contact sheets and plots", "data")
        import matplotlib

        self.fallback = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"

    def path_for(self, text: str) -> Path:
        """The font that has most of the characters of `text`; what it lacks is drawn as boxes."""
        wanted = {ord(character) for character in text if not _needs_no_glyph(character)}
        if wanted <= _characters(self.fallback):
            return self.fallback
        candidates = [self.fallback, *_installed()]
        return min(candidates, key=lambda path: len(wanted - _characters(path)))  # of equals the first

    def font_for(self, text: str, size: int) -> ImageFont.FreeTypeFont:
        """The same, ready to draw, `size` pixels high."""
        return _loaded(self.path_for(text), size)


def wrapped(text: str, measure: Callable[[str], float], width: float, lines: int) -> list[str]:
    """`text` in at most so many lines of at most `width`; what does not fit ends in "…".

    Lines break at spaces where there are some, else (long words, scripts without spaces) at any character.

    Args:
        measure: width of a text.
    """
    rest = " ".join(text.split())
    made: list[str] = []
    while rest and len(made) < lines:
        fits = _fitting(rest, measure, width)
        if fits < len(rest) and len(made) == lines - 1:
            end = max(1, _fitting(rest, lambda part: measure(part + "…"), width))
            return [*made, rest[:end].rstrip() + "…"]
        end = fits
        if fits < len(rest) and not rest[fits].isspace():
            end = rest.rfind(" ", 0, fits) + 1 or fits
        made.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return made


def _fitting(text: str, measure: Callable[[str], float], width: float) -> int:
    """How many of the first characters fit, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measure(text[:middle]) <= width else (low, middle - 1)
    return low


def _needs_no_glyph(character: str) -> bool:
    """Spaces and what only changes its neighbours: joiners, variation selectors, directions."""
    return character.isspace() or unicodedata.category(character) in ("Cf", "Cc") or "\ufe00" <= character <= "\ufe0f"


@functools.cache
def _installed() -> tuple[Path, ...]:
    from matplotlib import font_manager

    found = {Path(name) for name in font_manager.findSystemFonts()}
    # Upright and regular ones first, else in alphabetical order: the same choice on every run.
    return tuple(
        sorted(
            (path for path in found if path.suffix.lower() in _ENDINGS),
            key=lambda path: ("regular" not in path.stem.lower(), path.name),
        )
    )


@functools.cache
def _characters(path: Path) -> frozenset[int]:
    """What a font has glyphs for; nothing where it cannot be read or drawn (bitmaps)."""
    from fontTools.ttLib import TTFont, TTLibError  # type: ignore[import-untyped]

    try:
        with TTFont(path, fontNumber=0, lazy=True) as font:
            if "glyf" not in font and "CFF " not in font and "CFF2" not in font:
                return frozenset()
            return frozenset(font.getBestCmap() or {})
    except (TTLibError, OSError, AssertionError, ValueError, KeyError):
        return frozenset()


@functools.cache
def _loaded(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)
