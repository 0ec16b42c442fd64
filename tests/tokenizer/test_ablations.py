"""Ablations: the committed files, a study from start to report on tiny data, and what is refused."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data.config import DataConfig
from tests.tokenizer.curriculum_data import ROOT, lines, make_sets, pictures_alone
from tokenizer.cli import main as atoken
from tokenizer.config import config_to_dict, parse_config
from tokenizer.errors import InputError
from tokenizer.evaluation.metrics import psnr
from tokenizer.training.ablations.__main__ import main
from tokenizer.training.ablations.curves import Cost, curves_of
from tokenizer.training.ablations.perception import FIGURES, Perception
from tokenizer.training.ablations.plan import PLAN, Study, config_of, read_plan
from tokenizer.training.ablations.report import table
from tokenizer.training.ablations.running import atoken as atoken_process
from tokenizer.training.curriculum import records
from tokenizer.training.curriculum.config import RunConfig, network_config
from tokenizer.training.curriculum.pictures import Pair

COMMITTED = ROOT / PLAN


def committed() -> dict[str, dict[str, RunConfig]]:
    """All runs by study and name."""
    return {
        name: {run.name: config_of(study, run.name, Path("runs") / name, plan=COMMITTED) for run in study.runs}
        for name, study in read_plan(COMMITTED).items()
    }


def told(config: RunConfig, *left_out: str) -> dict[str, object]:
    return {key: value for key, value in config_to_dict(config).items() if key not in left_out}


def test_committed_runs_are_whole_and_start_where_others_end() -> None:
    for name, runs in committed().items():
        for run, config in runs.items():
            parse_config(DataConfig, config.data, run)
            assert config.out == f"runs/{name}/{run}"
            assert config.start.kind == ("codes" if run.endswith("start") else "model")
            if config.start.source is not None:
                before = runs[Path(config.start.source).name]
                assert replace(network_config(before), name="") == replace(network_config(config), name="")


def test_gram_is_all_that_differs() -> None:
    gram = committed()["gram"]
    assert told(gram["with"], "loss", "out") == told(gram["without"], "loss", "out")
    assert replace(gram["with"].loss, gram=0.0) == gram["without"].loss
    # The published weights relative to each other (PAPER 2).
    loss = gram["with"].loss
    assert (loss.lpips / loss.l1, loss.gram / loss.lpips, loss.reconstruction) == (10, 100, 0.2)


def test_the_curriculum_takes_as_many_steps_and_ends_in_the_same_data() -> None:
    study, runs = read_plan(COMMITTED)["curriculum"], committed()["curriculum"]
    assert set(study.sizes()) == {"nano", "small"}
    for size, (single, curriculum) in study.sizes().items():
        (alone,), stages = ([runs[name] for name in variant.runs] for variant in (single, curriculum))
        assert sum(config.steps for config in stages) == alone.steps
        assert told(stages[-1], "out", "start", "steps") == told(alone, "out", "start", "steps")
        assert study.start_of(size) == f"{size}-start"
        for stage, later in itertools.pairwise(stages):
            tasks = {*stage.data["ratios"], "image_understanding"}
            assert tasks < {*later.data["ratios"], "image_understanding"}
            assert [s for s in later.data["sources"] if s["task"] in tasks] == stage.data["sources"]
            assert stage.validation == later.validation
    nano, small = (network_config(runs[f"{size}-single"]) for size in ("nano", "small"))
    assert small.encoder.width < nano.encoder.width
    assert small.skip == nano.skip


def mean_psnr(pairs: Sequence[Pair]) -> float:
    return sum(psnr(*pair) for pair in pairs) / len(pairs)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny shards, and a plan of two ways of two runs each."""
    folder = tmp_path_factory.mktemp("ablations")
    make_sets(folder, videos=False)
    (folder / "datasets").rename(folder / "elsewhere")
    decode = {"min_side": 64, "max_side": 64}
    settings = config_to_dict(pictures_alone("steps=2", "checkpoint={every: 1, keep_last: 9}", "validation.every=1"))
    for source in (*settings["data"]["sources"], *settings["validation"]["sources"]):
        source |= {"shards": "datasets/sets/images", "decode": decode}
    (folder / "base.yaml").write_text(yaml.safe_dump(settings))
    columns = {"psnr": "PSNR, dB", "count": "pictures", "ssim": "SSIM"}
    runs = [
        {"name": "start", "base": "base.yaml", "set": {"steps": 1}},
        {"name": "low", "base": "base.yaml", "after": "start", "set": {"optimizer.lr": 1e-3}},
        {"name": "lower", "base": "base.yaml", "after": "low", "set": {"optimizer.lr": 1e-3}},
        {"name": "high", "base": "base.yaml", "after": "start"},
    ]
    variants = [
        {"name": "slow", "size": "tiny", "runs": ["low", "lower"]},
        {"name": "fast", "size": "tiny", "runs": ["high"]},
    ]
    texts = {"title": "Rates", "question": "Which?", "measured": "Squares."}
    study = {**texts, "perceptual": True, "columns": columns, "runs": runs, "variants": variants}
    (folder / "plan.yaml").write_text(yaml.safe_dump({"rates": study}, sort_keys=False))
    return folder


def test_a_study_is_trained_once_and_reports_what_it_measured(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "has_tensorboard", lambda: False)
    # Large networks see enough in the next test.
    monkeypatch.setattr(Perception, "__init__", lambda self, device: setattr(self, "device", device))
    monkeypatch.setattr(Perception, "figures", lambda _, pairs: {"psnr": mean_psnr(pairs), "count": len(pairs)})
    monkeypatch.chdir(here)
    calls: list[str] = []
    killed_once: list[str] = []

    def command(arguments: Sequence[str]) -> int:
        calls.append(Path(arguments[2]).stem)
        if calls[-1] == "high" and not killed_once:
            killed_once.append("high")
            return 143
        with pytest.raises(SystemExit) as end:
            atoken(list(arguments))
        return int(str(end.value.code))

    options = ["--out", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs"), "--plan", "plan.yaml"]
    assert main([*options, "--device", "cpu"], command) == 1
    assert "datasets/sets/images: no shards here; build them with scripts/build_nano_data.sh" in capsys.readouterr().err
    options += ["--sets", "elsewhere/smoke", "--device", "cpu"]
    assert main(options, command) == 143
    assert main(options, command) == 0
    assert calls == ["start", "low", "lower", "high", "high"]  # what had ended before is not trained again

    study, runs = read_plan(here / "plan.yaml")["rates"], tmp_path / "runs" / "rates"
    slow = curves_of(study, study.variants[0], runs)
    assert [step for step, _ in slow.points["psnr"]] == [0, 1, 2, 3, 4]
    assert slow.borders == [2]
    assert slow.cost.steps == 4
    assert slow.cost.tokens == sum(lines(runs / name / "metrics.jsonl")[-2]["tokens"] for name in ("low", "lower"))
    # 8-bit pixels and a mean over pictures: validation says nearly the same.
    theirs = lines(runs / "lower" / "metrics.jsonl")[-1]["validation/pictures/psnr"]
    assert slow.final("psnr") == pytest.approx(theirs, abs=0.1)
    report = (tmp_path / "docs" / "README.md").read_text()
    (row,) = [line for line in report.splitlines() if line.startswith("| fast |")]
    measured = lines(runs / "high" / "measured.jsonl")[-1]
    assert row.split(" | ")[1:4] == [f"{measured['psnr']:.4g}", "8", "-"]
    assert "--plan plan.yaml --sets elsewhere/smoke" in report
    assert (tmp_path / "docs" / "rates.png").read_bytes().startswith(b"\x89PNG")

    assert main([*options, "--steps-factor", "2"], command) == 1
    assert re.search(r"start: holds a run of other settings \(.*steps.*\); remove it", capsys.readouterr().err)
    assert len(calls) == 5


def test_runs_are_trained_by_the_command_itself(capfd: pytest.CaptureFixture[str]) -> None:
    assert atoken_process(["train", "--config", "nowhere.yaml"]) == 1
    assert capfd.readouterr().err == "error: nowhere.yaml: cannot be read: No such file or directory\n"


def test_figures_tell_a_copy_from_a_blur() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (64, 128, 3)).astype(np.uint8)  # two pieces
    blurred = np.repeat(np.repeat(picture[::2, ::2], 2, 0), 2, 1)
    perception = Perception(torch.device("cpu"))
    same, worse = (perception.figures([(picture, other)]) for other in (picture, blurred))
    assert tuple(same) == FIGURES
    assert [same["psnr"], same["ssim"]] == pytest.approx([100, 1])
    assert [same[name] for name in FIGURES[2:]] == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert all(worse[name] > 0.01 for name in FIGURES[2:])


def test_a_table_shows_differences_of_two() -> None:
    rows: dict[str, tuple[list[float | None], Cost]] = {
        "start": ([1.0, None], Cost(1, 10, 0.6)),
        "a": ([20.0, 0.5], Cost(2, 2000, 3.4)),
        "b": ([21.5, None], Cost(2, 2000, 3.4)),
    }
    assert table(["dB", "accuracy"], rows, ["a", "b"]) == [
        "| | dB | accuracy | steps | tokens | seconds |",
        "|---|---:|---:|---:|---:|---:|",
        "| start | 1 | - | 1 | 10 | 1 |",
        "| a | 20 | 0.5 | 2 | 2,000 | 3 |",
        "| b | 21.5 | - | 2 | 2,000 | 3 |",
        "| *b - a* | +1.5 | - |  |  |  |",
    ]


def test_a_plan_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    def study(**changes: object) -> Path:
        runs = [{"name": "a", "base": "x.yaml"}, {"name": "b", "base": "x.yaml", "after": "a"}]
        variants = [{"name": "v", "size": "s", "runs": ["a", "b"]}]
        texts = {"title": "t", "question": "q", "measured": "m", "columns": {"x/psnr": "dB"}}
        path = tmp_path / "plan.yaml"
        path.write_text(json.dumps({"study": {**texts, "runs": runs, "variants": variants, **changes}}))
        return path

    assert isinstance(read_plan(study())["study"], Study)
    for changes, message in (
        ({"runs": [{"name": "a", "base": "x", "before": "b"}]}, "study, runs: unknown key 'before'"),
        ({"runs": {"a": {"base": "x"}}}, "study: runs must be a list"),
        ({"runs": [{"name": "a", "base": "x", "after": "b"}]}, "run a starts after b, which must stand before it"),
        ({"variants": [{"name": "v", "size": "s", "runs": ["c"]}]}, "variant v: no such runs: c"),
        ({"variants": [{"name": "v", "size": "s", "runs": ["b", "a"]}]}, "each starts after the one before"),
        ({"titel": "t"}, "unknown key 'titel'; did you mean 'title'"),
    ):
        with pytest.raises(InputError, match=message):
            read_plan(study(**changes))
