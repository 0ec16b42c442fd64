"""Whole runs on tiny data: four stages in a row, kills, signals, damage, steps that fail, layouts, and bad input."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tokenizer.curriculum_data import ROOT, StubTower, lines, make_sets, pictures_alone, smoke
from tokenizer.api import AToken
from tokenizer.cli import main
from tokenizer.errors import InputError
from tokenizer.evaluation.command.understanding import find_alignment
from tokenizer.text import alignment
from tokenizer.text.alignment import load_text_alignment
from tokenizer.training.curriculum import launch, loop, records
from tokenizer.training.curriculum.checkpoint import newest_good
from tokenizer.training.curriculum.config import RunConfig
from tokenizer.training.curriculum.launch import train
from tokenizer.training.curriculum.start import starting_model
from tokenizer.training.curriculum.torch_engine import TorchEngine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seconds that real text towers and TensorBoard take to import."""
    for module in (launch, alignment):
        monkeypatch.setattr(module, "open_tower", lambda *_: StubTower())
    monkeypatch.setattr(records, "has_tensorboard", lambda: False)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke")
    make_sets(folder)
    return folder


@pytest.fixture
def here(sets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(sets)
    return sets


def worker(sets: Path, what: str, out: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "tokenizer" / "curriculum_worker.py"), what, str(out)]
    done = subprocess.run(command, cwd=sets, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_four_stages_follow_each_other(here: Path) -> None:
    for stage in (1, 2, 3, 4):
        assert train(smoke(stage), CPU) == 0
    measured = [lines(here / "runs" / f"smoke-stage{stage}" / "metrics.jsonl") for stage in (1, 2, 3, 4)]
    for before, after in itertools.pairwise(measured[:3]):
        # Growing latents and adding modalities change nothing of what was learned.
        assert after[0]["step"] == 0
        for metric in ("pictures/psnr", "labels/accuracy"):
            assert after[0][f"validation/{metric}"] == pytest.approx(before[-1][f"validation/{metric}"], rel=1e-4)
    for run in measured:
        assert run[-1]["validation/pictures/psnr"] > run[0]["validation/pictures/psnr"]
    assert {"loss", "norm/encoder", "norm/head", "rate/encoder", "tokens", "waste/asset_reconstruction"} <= set(
        measured[3][1]
    )
    last = here / "runs" / "smoke-stage4"
    assert {"tokens a second", "utilisation", "data wait"} <= set(lines(last / "speed.jsonl")[-1])
    assert sorted(p.name for p in (last / "pictures" / "step-000006").iterdir()) == [
        "assets.png",
        "clips.png",
        "pictures.png",
    ]
    model = AToken.from_pretrained(last / "model")
    assert model.quantizer is not None
    assert model.gaussian_decoder is not None
    aligned = load_text_alignment(last / "model")
    assert aligned.config.text_width == StubTower.width
    # What understands is part of the model that people load, measure and save.
    model.save_pretrained(last / "copy")
    copied = AToken.from_pretrained(last / "copy").text_alignment
    assert copied is not None
    found, reason = find_alignment(model, "smoke", None)
    assert reason is None
    assert found is not None
    assert isinstance(found.tower, StubTower)
    pooled = torch.randn(3, aligned.config.width)
    for own in (copied, found):
        assert torch.equal(own.encode_pooled(pooled), aligned.encode_pooled(pooled))


def test_a_killed_run_goes_on_bit_for_bit(sets: Path, tmp_path: Path) -> None:
    worker(sets, "kills", tmp_path)
    peace, killed = (tmp_path / name for name in ("peace", "killed"))
    assert (killed / "metrics.jsonl").read_text() == (peace / "metrics.jsonl").read_text()
    assert [line["step"] for line in lines(peace / "metrics.jsonl") if "loss" in line] == list(range(1, 13))
    state, other = (torch.load(run / "checkpoints" / "step-000012" / "weights.pt") for run in (peace, killed))
    assert {"model", "average", "optimizer", "rng"} <= state.keys()
    torch.testing.assert_close(other, state, rtol=0, atol=0)
    for folder in ("pictures", "model"):
        files = [
            {path.relative_to(run): path.read_bytes() for path in (run / folder).rglob("*.*")}
            for run in (peace, killed)
        ]
        assert len(files[0]) > 1
        assert files[0] == files[1]
    assert not list((killed / "checkpoints").glob(".*"))


def test_processes_that_share_gradients_or_weights_train_as_one(sets: Path, tmp_path: Path) -> None:
    worker(sets, "layouts", tmp_path)
    for layout in ("ddp", "fsdp2", "fsdp2-compiled", "fsdp2-nodes"):
        one: dict[str, Any] = torch.load(tmp_path / f"single{'-nodes' if layout.endswith('nodes') else ''}-0.pt")
        many: dict[str, Any] = torch.load(tmp_path / f"{layout}-0.pt")
        for before, after in zip(one["losses"], many["losses"], strict=True):
            assert before == pytest.approx(after, rel=1e-9, abs=1e-9)
        # At the end, and right after the averages were in the place of the weights.
        for wanted, found in ((one, many), (one["validated"], many["validated"])):
            for part in ("model", "average"):
                for name, tensor in wanted[part].items():
                    torch.testing.assert_close(found[part][name], tensor, rtol=0, atol=1e-7)
        # What one layout has written another reads whole, moments and all.
        again: dict[str, Any] = torch.load(tmp_path / f"{layout}-loaded.pt")
        for part in ("model", "average", "buffers"):
            assert all(torch.equal(tensor, again[part][name]) for name, tensor in one[part].items())
        for name, moments in one["optimizer"].items():
            assert all(torch.equal(tensor, again["optimizer"][name][kind]) for kind, tensor in moments.items())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.usefixtures("here")
def test_a_signal_saves_and_the_run_goes_on(tmp_path: Path, number: int, status: int) -> None:
    settings = ("steps=40", "checkpoint.every=100", "validation.every=100", "log.pictures_every=100")
    config = pictures_alone(*settings, f"out={tmp_path}/run")
    metrics = tmp_path / "run" / "metrics.jsonl"

    def interrupt() -> None:
        while not metrics.exists() or len(lines(metrics)) < 4:
            pass
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert train(config, CPU) == status
    thread.join()
    stopped = lines(metrics)[-1]["step"]
    newest = newest_good(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{stopped:06d}"
    assert signal.getsignal(number) != signal.SIG_IGN
    if number == signal.SIGTERM:
        assert train(config, CPU) == 0
        assert [line["step"] for line in lines(metrics) if "loss" in line] == list(range(1, 41))


@pytest.mark.usefixtures("here")
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("checkpoint.every=2", "checkpoint.keep_last=2", "validation.every=2", "log.pictures_every=100")
    assert train(pictures_alone("steps=6", *settings, f"out={tmp_path}/run"), CPU) == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000004", "step-000006"]
    weights = checkpoints / "step-000006" / "weights.pt"
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    assert train(pictures_alone("steps=6", *settings, f"out={tmp_path}/run"), CPU) == 0
    said = capsys.readouterr().err.replace("\n", "")
    assert "step-000006 is damaged (weights.pt is not what was written); going on from step-000004" in said
    assert newest_good(checkpoints) == checkpoints / "step-000006"  # written anew
    with pytest.raises(InputError, match=r"other settings \(seed\)"):
        train(pictures_alone("steps=6", *settings, "seed=1", f"out={tmp_path}/run"), CPU)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("other", ["validation.limit=1", "validation.budget=8"])
def test_the_best_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    scores = iter([1.0, 5.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(
        "tokenizer.training.curriculum.validation.Validation.__call__", lambda _: {"validation/x/psnr": next(scores)}
    )
    settings = ("steps=8", "checkpoint.every=2", "checkpoint.keep_last=1", "validation.every=2")
    assert train(pictures_alone(*settings, f"out={tmp_path}/run", "log.pictures_every=100"), CPU) == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000008"]
    loop = json.loads((tmp_path / "run" / "checkpoints" / "step-000008" / "loop.json").read_text())
    assert loop["progress"]["best"] == {"score": 5.0, "step": 2}

    # Scores on other samples are no match for it.
    scores = iter([2.0, 1.0])
    others = (*settings[1:], f"out={tmp_path}/run", "log.pictures_every=100", other)
    assert train(pictures_alone("steps=12", *others), CPU) == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000010", "step-000012"]


@pytest.mark.usefixtures("here")
def test_bad_steps_are_skipped_counted_kept_and_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = TorchEngine.forward_backward
    bad = {2, 4, 5}
    calls = iter(range(100))

    def wrong(self: TorchEngine, prepared: Any) -> dict[str, float]:
        found = right(self, prepared)
        return {**found, "loss": float("nan")} if next(calls) in bad else found

    monkeypatch.setattr(TorchEngine, "forward_backward", wrong)
    settings = ("steps=9", "max_bad_steps=2", "log.pictures_every=100", "validation.every=100")
    with pytest.raises(InputError, match="2 steps in a row up to step 5 had a loss or gradient that is not finite"):
        train(pictures_alone(*settings, f"out={tmp_path}/run"), CPU)
    rows = {line["step"]: line for line in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line}
    assert rows[3]["loss"] is None
    assert (rows[2]["bad steps"], rows[4]["bad steps"]) == (0, 1)
    kept = sorted((tmp_path / "run" / "bad-steps").iterdir())
    assert [path.name for path in kept] == [f"step-{step:06d}-process-0.pt" for step in sorted(bad)]
    (batch,) = torch.load(kept[0], weights_only=True)
    assert batch["task"] == "image_reconstruction"
    assert len(batch["ids"]) == len(batch["lengths"])
    assert batch["features"].shape == (int(batch["lengths"].sum()), 3072)


def refused(config: Callable[[], RunConfig]) -> str:
    with pytest.raises(InputError) as error:
        train(config(), CPU)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.usefixtures("here")
def test_bad_input_is_one_line_before_the_first_step(tmp_path: Path) -> None:
    out = f"out={tmp_path}/run"
    assert "did you mean 'optimizer.warmup'" in refused(lambda: smoke(1, out, "optimizer.warmpu=3"))
    assert "unknown model 'so4000m'" in refused(lambda: smoke(1, out, "model=so4000m"))
    assert "codebooks of 6 channels need 48 latent channels" in refused(
        lambda: smoke(1, out, "quantizer={codebook_size: 4096, codebooks: 8}")
    )
    assert "needs a text tower" in refused(lambda: smoke(1, out, "text={tower: none}"))
    assert "no folder holds its weights" in refused(lambda: smoke(1, out, "text={tower: siglip2}"))
    assert "no loader is called 'tapes'" in refused(lambda: smoke(1, out, "loader=tapes"))
    assert "unknown key 'rations'" in refused(lambda: smoke(1, out, "data.rations=1"))
    assert "nowhere" in refused(lambda: smoke(2, out, "start={kind: model, source: nowhere}"))
    assert "start.source belongs" in refused(lambda: smoke(1, out, "start={kind: siglip2}"))
    assert "engine is single" not in refused(lambda: smoke(1, out, "steps=0"))
    empty = [{"name": "none", "task": "image_reconstruction", "shards": str(tmp_path / "empty")}]
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(lambda: pictures_alone(out, f"data.sources={json.dumps(empty)}"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.usefixtures("here")
def test_voxels_are_packed_as_the_model_will_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ("start={kind: scratch}", f"out={tmp_path}/run", "log.pictures_every=100")
    released = "gaussians.packing=released"
    said = "packed by the rule 'surface' on a grid of 64, but gaussians has packing '{}' and resolution {}"
    assert said.format("released", 64) in refused(lambda: smoke(3, *run, released))
    assert said.format("surface", 32) in refused(lambda: smoke(3, *run, "gaussians.resolution=32"))
    # What is trained on is looked at too, when it comes.
    ratios = "data.ratios={asset_reconstruction: 1, asset_understanding: 1}"
    sources = [source for source in smoke(3).data["sources"] if source["task"].startswith(("asset", "image_u"))]
    apart = (*run, "validation.sources=[]", ratios, f"data.sources={json.dumps(sources)}", "steps=2")
    assert said.format("released", 64) in refused(lambda: smoke(3, *apart, released))
    # A run from before anybody looked is told what its voxels are, and goes on.
    with monkeypatch.context() as before:
        before.setattr(loop, "check_voxels", lambda *_: None)
        assert train(smoke(3, *apart, released, "steps=1"), CPU) == 0
    assert train(smoke(3, *apart), CPU) == 0
    found = AToken.from_pretrained(tmp_path / "run" / "model").gaussian_decoder
    assert found is not None
    assert found.config.packing == "surface"
    # So does the next stage, with its weights.
    config = smoke(4, f"start={{kind: model, source: {tmp_path}/run}}", "gaussians.packing=average")
    decoder = starting_model(config, StubTower(), lambda: []).gaussians
    assert decoder is not None
    assert torch.equal(decoder.embed.weight, found.embed.weight.float())


def test_the_command_says_what_is_wrong_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "tokenizer" / "stages" / "smoke-stage1.yaml")
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", config, "stepps=4"])
    assert end.value.code == 1
    assert capsys.readouterr().err == f"error: {config}: unknown key 'stepps'; did you mean 'steps'?\n"
