"""Frame rates that are no whole numbers, from a file through tokens to a file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.tokenizer.test_cli import Atoken, atoken  # noqa: F401
from tokenizer import TokenFile
from tokenizer.media import VideoReader, VideoWriter


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(24000, 1001), Fraction(60000, 1001), Fraction(25, 2)])
def test_rates_of_television_come_back_as_they_were(atoken: Atoken, rate: Fraction, tmp_path: Path) -> None:  # noqa: F811
    """A rate that is nearly the same is not: after an hour, sound would be seconds away."""
    with VideoWriter(tmp_path / "a.mp4", rate, 32, 32) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8))
    assert VideoReader(tmp_path / "a.mp4").fps == rate
    assert atoken("encode", "a.mp4", "--out", "a.atok").status == 0
    assert TokenFile.load("a.atok").origin.frame_rates == (float(rate),)
    assert atoken("decode", "a.atok", "--out", "b.mp4").status == 0
    assert VideoReader(tmp_path / "b.mp4").fps == rate
    assert atoken("reconstruct", "a.mp4", "--out", "c.mp4").status == 0
    assert VideoReader(tmp_path / "c.mp4").fps == rate
