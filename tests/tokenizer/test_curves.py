"""Curves of runs whose logs have holes, and of ones that cannot be drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from tokenizer.training.curriculum.curves import main, read_stages
from tokenizer.training.curriculum.records import METRICS, Records


def logged(run: Path, losses: list[float]) -> Path:
    """A run of so many steps, logged as training does it."""
    with Records(run, run.name, len(losses), active=True) as records:
        records.start(0)
        for step, loss in enumerate(losses, start=1):
            records.metrics(step, {"loss": loss})
    return run


def test_a_step_that_was_skipped_is_a_gap_and_counts_in_no_mean(tmp_path: Path) -> None:
    run = logged(tmp_path / "run", [4.0, math.nan, 2.0, math.inf, 6.0, 4.0, 4.0])
    assert json.loads((run / METRICS).read_text().splitlines()[1])["loss"] is None
    (panel,) = read_stages([run]).panels
    steps, values = zip(*panel.lines["loss"], strict=True)
    assert steps == (1, 2, 3, 4, 5, 6, 7)
    # Each the mean of five records at most, without those that are no numbers.
    assert values == pytest.approx((4.0, math.nan, 3.0, math.nan, 4.0, 4.0, 4.0), nan_ok=True)
    assert main([str(run), "--out", str(tmp_path / "c.png")]) == 0
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width > 300


def test_what_cannot_be_drawn_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, skipped = logged(tmp_path / "run", [4.0, 2.0]), logged(tmp_path / "skipped", [math.nan, math.nan])
    (tmp_path / "file").write_text("")
    cases = {
        (str(skipped), str(tmp_path / "c.png")): "error: the runs have logged nothing that could be drawn yet",
        (str(run), "/proc/x/c.png"): "error: /proc/x: No such file or directory",
        (str(run), str(tmp_path / "file" / "c.png")): f"error: {tmp_path / 'file'}: ",
        (str(run), str(tmp_path / "c.xyz")): f"error: {tmp_path / 'c.xyz'}: no picture of this sort can be drawn",
        (str(run), str(tmp_path / "c")): f"error: {tmp_path / 'c'}: no picture of this sort can be drawn",
    }
    for (source, out), message in cases.items():
        assert main([source, "--out", out]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(message)
        assert said.err.count("\n") == 1
    assert not list(tmp_path.glob("c*"))
