"""Numbers in text files of any size: taken piece by piece, so that memory stays near that of the result."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Final

import numpy as np

from tokenizer.assets.mesh import Floats

PIECE: Final = 2**22
"""Bytes of text that are taken apart at a time; Python's strings need some ten times as much."""


def as_utf8(data: bytes) -> bytes:
    """Text with line feeds and spaces alone, in UTF-8 without a mark, from what editors on other systems write."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16", errors="replace").encode()
    data = data.removeprefix(codecs.BOM_UTF8)
    for other, usual in ((b"\r\n", b"\n"), (b"\r", b"\n"), (b"\t", b" ")):
        if other in data:
            data = data.replace(other, usual)
    return data


def pieces(text: bytes) -> Iterator[bytes]:
    """The text in pieces of whole lines."""
    start = 0
    while start < len(text):
        end = text.find(b"\n", start + PIECE)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def all_numbers(text: bytes) -> Floats:
    """Every number of a text that holds nothing else, [N] float64; `ValueError` for other words."""
    parts = [np.fromiter(map(float, piece.split()), np.float64) for piece in pieces(text)]
    return np.concatenate(parts) if parts else np.empty(0)


def rows(lines: Sequence[bytes], at_least: int) -> Floats:
    """Lines of numbers as [lines, numbers] float64; short lines are filled up with NaN to the longest of them."""
    words = [line.partition(b"#")[0].split() for line in lines]
    widths = {len(row) for row in words}
    width = max(at_least, *widths) if widths else at_least
    if widths != {width}:
        words = [row + [b"nan"] * (width - len(row)) for row in words]
    return np.fromiter(map(float, chain.from_iterable(words)), np.float64).reshape(-1, width)


def display_colours(columns: Floats) -> Floats:
    """[N, 4] in 0..1 from [N, 3 or 4] of text files, which write colours in 0..1 or in 0..255; NaN becomes white."""
    alpha = np.ones((len(columns), 4 - columns.shape[1]))
    rgba: Floats = np.nan_to_num(np.concatenate([columns / scale_of_colours(columns), alpha], axis=1), nan=1.0)
    return rgba


def scale_of_colours(values: Floats) -> float:
    """255 or 1, which colours with no other sign of it count up to."""
    # Not from 1 on: rounding leads beyond it, and colours of bright light do.
    return 255.0 if (values > 2).any() else 1.0
