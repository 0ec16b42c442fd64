"""Caption cleaning: the released steps in their order, in many scripts, and nothing more than them."""

from __future__ import annotations

import importlib.util
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.text import clean_caption
from tokenizer.errors import InputError
from tokenizer.text import clean

QUICK = settings(max_examples=60, deadline=None, derandomize=True)

# One word of many scripts each, and everything that a step of the cleaning acts on.
WORDS = (
    *("Cat", "O'Brien", "snake_case", "«Été»", "naïve", "ΣΊΣΥΦΟΣ", "Straße", "İstanbul", "Привет,", "Việt"),
    *(
        "猫。",
        "東京タワー",
        "한국어",
        "قطة،",
        "שָׁלוֹם",
        "हिन्दी।",
        "தமிழ்",
        "ไทย",
        "👩‍🚀",
        "🇯🇵",
        "e\u0301",
        "q\u0323\u0307",
    ),
    *("&amp;", "&lt;b&gt;", "&amp;quot;", "“so”", "Ã©tÃ©", "---", "_", "\t", "\u3000", "3:1"),
)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("  A Photo_of a CAT, sitting!  ", "a photo of a cat sitting"),
        ("line\none\t\ttwo\u3000three", "line one two three"),
        ("Tom &amp;amp; Jerry", "tom jerry"),
        ("&lt;b&gt;bold&lt;/b&gt;", "bboldb"),
        ("caf&amp;eacute;", "café"),
        ("the cafÃ© â€œopenâ€\x9d", "the café open"),
        ("it\u2019s “fine”", "its fine"),
        ("一只猫\uff0c坐着。", "一只猫坐着。"),
        ("قطة تجلس، هنا؟", "قطة تجلس، هنا؟"),
        ("एक बिल्ली_बैठी है।", "एक बिल्ली बैठी है।"),
        ("Кот, СИДИТ", "кот сидит"),
        ("ΟΔΟΣ", "οδος"),
        ("Cafe\u0301", "café"),
        ("q\u0323\u0307!", "q\u0323\u0307"),
        ("İ", "i\u0307"),
        ("👩‍🚀 in SPACE 🇯🇵", "👩‍🚀 in space 🇯🇵"),
        ("...", ""),
        ("", ""),
    ],
)
def test_captions_become(raw: str, expected: str) -> None:
    assert clean_caption(raw) == expected


@QUICK
@given(st.lists(st.sampled_from(WORDS), max_size=6), st.sampled_from(("", " ", "_", ", ", "\n")))
def test_cleaning_a_clean_caption_changes_nothing(words: list[str], between: str) -> None:
    once = clean_caption(between.join(words))
    assert clean_caption(once) == once


@QUICK
@given(st.text())
def test_what_remains_has_no_ascii_punctuation_no_capitals_and_single_spaces(raw: str) -> None:
    once = clean_caption(raw)
    assert not set(once) & set(string.punctuation)
    assert once == once.lower()
    assert once == " ".join(once.split())


def test_a_mark_moved_to_a_letter_is_joined_only_by_a_second_cleaning() -> None:
    once = clean_caption("cafe-\u0301")
    assert once == "cafe\u0301"
    assert clean_caption(once) == "caf\u00e9"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    clean._repair.cache_clear()
    with pytest.raises(InputError, match=r"cleaning captions needs the package 'ftfy'.*'\.\[data\]'"):
        clean_caption("a cat")
