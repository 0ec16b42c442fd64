"""Benchmarks refuse options that make no sense in one line, before anything is measured."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.machine import check_options

MEASURING = {
    "assets": "measure_asset",
    "data": "cases",
    "evaluation": "AToken",
    "fp8": "accuracy_records",
    "fp8_passes": "choose_backend",
    "rasterize": "measure_rasterizer",
    "tokenizer": "ATokenNetwork",
    "training": "measure",
}
"""What each benchmark calls once its options have been looked at."""

COUNTS = {
    "assets": ("threads", "repeats"),
    "data": ("count", "repeats"),
    "evaluation": ("pictures", "repeats"),
    "fp8": ("tokens", "pictures", "repeats", "seeds", "crops", "side"),
    "fp8_passes": ("tokens", "repeats"),
    "rasterize": ("gaussians", "size", "threads", "repeats"),
    "tokenizer": ("batches", "repeats"),
    "training": ("tokens", "micro-batches", "steps", "depth"),
}


def refusal(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """What a benchmark says of arguments that it refuses, without having measured."""
    module = importlib.import_module(f"benchmarks.{name}")

    def measured(*_: object, **__: object) -> None:
        raise AssertionError("it went on to measure")

    with monkeypatch.context() as patched:
        patched.setattr(module, MEASURING[name], measured)
        assert module.main(arguments) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return str(said)


@pytest.mark.parametrize("name", MEASURING)
def test_numbers_from_one_up(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    device = [] if name == "data" else ["--device", "cpu"]
    for option in COUNTS[name]:
        for number in ("0", "-3"):
            said = refusal(name, [*device, f"--{option}", number], monkeypatch, capsys)
            assert said == f"error: --{option} must be at least 1, got {number}\n"
    if name == "fp8":
        assert "--train must not be negative" in refusal(name, [*device, "--train", "-1"], monkeypatch, capsys)


@pytest.mark.parametrize("name", sorted(MEASURING.keys() - {"rasterize"}))
def test_results_that_cannot_be_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = [] if name == "data" else ["--device", "cpu"]
    (tmp_path / "file").write_text("")
    cases = {
        "/proc/x/y": "cannot be written: No such file or directory",
        str(tmp_path): "is a folder; name a file",
        str(tmp_path / "file" / "y"): "cannot be written: ",
    }
    for out, message in cases.items():
        assert f"error: --out {out}: {message}" in refusal(name, [*device, "--out", out], monkeypatch, capsys)


@pytest.mark.parametrize("name", sorted(MEASURING.keys() - {"data"}))
def test_devices_that_are_not_here(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # `benchmarks.training` knows two names alone, and argparse refuses others.
    for device in () if name == "training" else ("gpu", "cuda:99", "meta"):
        assert refusal(name, ["--device", device], monkeypatch, capsys).startswith(f"error: --device {device}: ")
    if not torch.cuda.is_available():
        assert refusal(name, ["--device", "cuda"], monkeypatch, capsys).startswith("error: --device cuda: ")


def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "new" / "results.json"
    check_options(argparse.Namespace(out=out, tokens=None, batches=[1, 4]), "tokens", "batches")
    assert list(out.parent.iterdir()) == []
    out.write_text("earlier")
    check_options(argparse.Namespace(out=out))
    assert [(path.name, path.read_text()) for path in out.parent.iterdir()] == [("results.json", "earlier")]
