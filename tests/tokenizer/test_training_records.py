"""What a run writes: TensorBoard has the scalars of the JSONL files, over restarts too; without it one line says so."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tokenizer.curriculum_data import lines
from tokenizer.training.curriculum import curves
from tokenizer.training.curriculum.curves import read_stages
from tokenizer.training.curriculum.records import METRICS, SPEED, TENSORBOARD, Records

Curves = dict[str, dict[int, float]]


def scalars(run: Path, *, wall: bool = False) -> Curves:
    """Curves of a run's TensorBoard logs by name and step; without those of time unless `wall`."""
    module: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    board = module.EventAccumulator(str(run / TENSORBOARD), size_guidance={"scalars": 0})
    board.Reload()
    times = {name for line in lines(run / SPEED) for name in line}
    return {
        name: {event.step: event.value for event in board.Scalars(name)}
        for name in board.Tags()["scalars"]
        if wall or name not in times
    }


def written(run: Path) -> Curves:
    """The same of its JSONL files, as float32, which TensorBoard keeps."""
    found: Curves = {}
    for file in (METRICS, SPEED):
        for line in lines(run / file):
            for name, value in line.items():
                if name != "step":
                    number = math.nan if value is None else float(np.float32(value))
                    found.setdefault(name, {})[line["step"]] = number
    return found


needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


@needs_tensorboard
def test_tensorboard_has_the_scalars_of_the_log(tmp_path: Path) -> None:
    """A run that wrote five steps, had a checkpoint after three, and goes on from there with other numbers."""
    with Records(tmp_path, "run", 6, active=True) as records:
        records.start(0)
        for step in range(1, 6):
            records.metrics(step, {"loss": 1 / step, "norm/total": 10.0 * step})
            records.speed(step, {"seconds": 0.1 * step})
    with Records(tmp_path, "run", 6, active=True) as records:
        records.start(3)
        for step in range(4, 7):
            records.metrics(step, {"loss": 2 / step, "norm/total": math.nan if step == 5 else 1.0})
            records.speed(step, {"seconds": 0.2 * step})
    found, expected = scalars(tmp_path, wall=True), written(tmp_path)
    assert found.keys() == expected.keys() == {"loss", "norm/total", "seconds"}
    for name, curve in expected.items():
        assert list(curve) == list(range(1, 7))
        np.testing.assert_array_equal(list(found[name].values()), list(curve.values()))
    assert expected["loss"][3] == np.float32(1 / 3)
    assert expected["loss"][4] == np.float32(2 / 4)
    assert lines(tmp_path / METRICS)[4]["norm/total"] is None


@needs_tensorboard
def test_what_a_checkpoint_leaves_behind_is_on_disk(tmp_path: Path) -> None:
    """TensorBoard's writer keeps events for minutes; a run that is killed would not write them again."""
    with Records(tmp_path, "run", 6, active=True) as records:
        records.start(0)
        records.metrics(1, {"loss": 0.5})
        records.speed(1, {"seconds": 1.0})
        records.flush()
        assert scalars(tmp_path, wall=True) == {"loss": {1: 0.5}, "seconds": {1: 1.0}}


def test_without_tensorboard_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tokenizer.training.curriculum.records.has_tensorboard", lambda: False)
    for active in (True, False):
        with Records(tmp_path, "run", 6, active=active) as records:
            records.start(0)
            records.metrics(1, {"loss": 0.5})
    said = capsys.readouterr().err.splitlines()
    assert said == ["tensorboard is not installed (pip install -e '.[train]'): curves go to the JSONL files alone"]
    assert lines(tmp_path / METRICS) == [{"step": 1, "loss": 0.5}]
    assert not (tmp_path / TENSORBOARD).exists()


def _log(run: Path, lines: list[dict[str, object]]) -> Path:
    run.mkdir()
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_curves_of_stages_follow_each_other(tmp_path: Path) -> None:
    first = _log(
        tmp_path / "one",
        [
            {"step": 0, "validation/photographs/psnr": 20.0},
            {"step": 10, "loss": 4.0, "validation/photographs/psnr": 22.0},
            {"step": 20, "loss": 2.0, "validation/photographs/psnr": None},
        ],
    )
    second = _log(
        tmp_path / "two",
        [{"step": 5, "loss": 6.0, "validation/chairs/accuracy": 0.5, "validation/chairs/majority": 0.25}],
    )
    stages = read_stages([first, second])
    assert stages.starts == [(0, "one"), (20, "two")]
    loss, photographs, accuracy = stages.panels
    assert loss.lines == {"loss": [(10, 4.0), (20, 3.0), (25, 6.0)]}
    assert photographs.lines == {"photographs": [(0, 20.0), (10, 22.0)]}
    assert accuracy.lines == {"chairs": [(25, 0.5)]}
    assert accuracy.dashed == {"chairs": 0.25}
    assert curves.main([str(first), str(second), "--out", str(tmp_path / "curves.png")]) == 0
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 800


def test_curves_without_a_log_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert curves.main([str(tmp_path), "--out", str(tmp_path / "curves.png")]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "is not the log of a run" in message
    assert not (tmp_path / "curves.png").exists()
