"""A contact sheet: small pictures in a grid, with label and caption under each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data.looking.fonts import Fonts, wrapped
from data.samples import Item, Kind
from tokenizer.atomic import atomic_path

BOXES: dict[Kind, tuple[int, int]] = {
    "images": (160, 160),
    "videos": (110, 360),
    "assets": (160, 160),
    "latents": (160, 160),
}
"""Rows and columns that the picture of a sample has to fit."""

_SHEET_WIDTH = 1600
_MARGIN = 12
_TEXT, _LINE = 12, 15
_LINES = 3
_INK, _FAINT, _PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)
_LABEL = (20, 80, 160)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of text under a picture."""

    text: str
    colour: tuple[int, int, int]


def draw_sheet(path: Path, items: Sequence[Item], kind: Kind, fonts: Fonts) -> None:
    """Write the sheet as PNG.

    Args:
        items: at least one, with pixels where there is a picture; see `data.looking.look`.
    """
    rows, columns = BOXES[kind]
    across = min(len(items), math.ceil(math.sqrt(len(items) * 1.5)), _SHEET_WIDTH // (columns + _MARGIN))
    down = -(-len(items) // across)
    texts = [_lines(item, columns, fonts) for item in items]
    cell = (rows + max(len(lines) for lines in texts) * _LINE + 2 * _MARGIN, columns + _MARGIN)
    sheet = Image.new("RGB", (across * cell[1] + _MARGIN, down * cell[0] + _MARGIN), _PAPER)
    drawing = ImageDraw.Draw(sheet)
    for number, (item, lines) in enumerate(zip(items, texts, strict=True)):
        left, top = _MARGIN + number % across * cell[1], _MARGIN + number // across * cell[0]
        _place(sheet, item, left, top, (rows, columns))
        for line_number, line in enumerate(lines):
            place = (left, top + rows + 2 + line_number * _LINE)
            drawing.text(place, line.text, line.colour, font=fonts.font_for(line.text, _TEXT))
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")


def enlarged(pixels: NDArray[np.uint8], box: tuple[int, int]) -> NDArray[np.uint8]:
    """Small pictures by a whole factor, so that every pixel shows, as large as the box allows."""
    factor = max(1, min(box[0] // pixels.shape[0], box[1] // pixels.shape[1]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def described(item: Item) -> str:
    """Its measures in one phrase."""
    facts, told = item.facts, list[str]()
    if "height" in facts:
        told.append(f"{facts['width']}x{facts['height']}")
    if "frames" in facts:
        told.append(f"{facts['frames']} frames, {facts['seconds']:.1f} s")
    told.append(f"{facts['voxels']} voxels" if "voxels" in facts else f"{item.tokens} tokens")
    return ", ".join(told)


def _place(sheet: Image.Image, item: Item, left: int, top: int, box: tuple[int, int]) -> None:
    if item.pixels is None:
        frame = (left, top, left + box[1] - 1, top + box[0] - 1)
        ImageDraw.Draw(sheet).rectangle(frame, outline=(200, 200, 200))
        return
    picture = Image.fromarray(enlarged(item.pixels.numpy(), box))
    picture.thumbnail((box[1], box[0]))
    sheet.paste(picture, (left + (box[1] - picture.width) // 2, top + (box[0] - picture.height) // 2))


def _lines(item: Item, width: int, fonts: Fonts) -> list[Line]:
    """Label, measures and caption, each where there is one; of nameless samples the key."""

    def cut(text: str, lines: int) -> list[str]:
        return wrapped(text, fonts.font_for(text, _TEXT).getlength, width, lines)

    label, caption = item.facts["label"], item.caption
    head = [Line(text, _LABEL) for text in cut(label, 1)] if label is not None else []
    head += [Line(text, _FAINT) for text in cut(described(item), 1)]
    if caption is None:
        return [*head, *(Line(text, _FAINT) for text in cut(item.id.partition("/")[2], 1))]
    return [*head, *(Line(text, _INK) for text in cut(caption, _LINES))]
