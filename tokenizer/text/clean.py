"""Captions as the text tower of SigLIP 2 was trained to read them (FORMAT 12).

The steps and their order are those of the released code, so that a caption reaches the tokenizer of the text tower
as it did in training. Only ASCII punctuation goes, and what ftfy turns into it: curly quotes and full-width forms.
Other scripts keep theirs ("。", "،", "।"), and emoji and combining marks carry over.
"""

from __future__ import annotations

import functools
import html
import string
from collections.abc import Callable

from tokenizer.errors import require_package

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean_caption(text: str) -> str:
    """The caption as the text tower reads it: repaired, without ASCII punctuation, in lower case, single-spaced.

    In this order: ftfy repairs wrong encodings, straightens quotes and narrows full-width forms, HTML entities are
    resolved twice, the ends are stripped, "_" becomes a space, ASCII punctuation is removed, letters
    become lower case, and every run of white space becomes one space.

    Cleaning a clean caption changes nothing, but for one case: removing punctuation can put a combining mark behind a
    letter ("e-" and U+0301), and only a second cleaning would join the two into one character.

    Args:
        text: a caption in any script; may be empty.

    Returns:
        The clean caption; empty when nothing but punctuation and space was there.

    Raises:
        InputError: the package ftfy is not installed.
    """
    text = html.unescape(html.unescape(_repair()(text))).strip()
    text = text.replace("_", " ").translate(_NO_PUNCTUATION).lower()
    return " ".join(text.split())


@functools.cache
def _repair() -> Callable[[str], str]:
    require_package("ftfy", "cleaning captions", "data")
    import ftfy

    return ftfy.fix_text
