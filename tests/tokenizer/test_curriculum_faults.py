"""Runs that something goes wrong with: what was done is kept, what is wrong is said, and nothing is mistaken."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tokenizer.curriculum_data import StubTower, lines, make_sets, pictures_alone, smoke
from tests.tokenizer.curriculum_worker import fork, status_of
from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError
from tokenizer.lock import only_run
from tokenizer.training.curriculum import checkpoint, launch, records
from tokenizer.training.curriculum.checkpoint import Checkpoints, newest_good
from tokenizer.training.curriculum.launch import choose_device, train
from tokenizer.training.curriculum.loop import Loop
from tokenizer.training.curriculum.start import load_previous, starting_model
from tokenizer.training.curriculum.torch_engine import TorchEngine
from tokenizer.training.feeding import find_opener

CPU = torch.device("cpu")
QUIET = ("validation.every=100", "log.pictures_every=100", "validation.sources=[]")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke")
    make_sets(folder, videos=False)
    return folder


@pytest.fixture(autouse=True)
def here(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sets)
    monkeypatch.setattr(records, "has_tensorboard", lambda: False)


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        work()
    assert "\n" not in str(error.value)
    return str(error.value)


def run(out: Path, *overrides: str) -> int:
    return train(pictures_alone(*QUIET, f"out={out}", *overrides), CPU)


def steps_of(out: Path) -> list[int]:
    return [line["step"] for line in lines(out / "metrics.jsonl") if "loss" in line]


def test_sets_that_nobody_made_are_told_with_what_makes_them(tmp_path: Path) -> None:
    source = "[{name: emoji, task: image_reconstruction, shards: datasets/sets/emoji/train}]"
    told = refused(lambda: run(tmp_path / "run", f"data.sources={source}"))
    assert "source 'emoji': datasets/sets/emoji/train: no shards here" in told
    assert "scripts/build_nano_data.sh" in told


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_what_cannot_be_read_now_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, "steps=2", "checkpoint.every=1") == 0
    before = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    log = (tmp_path / "metrics.jsonl").read_bytes()

    def unreachable(path: Path) -> dict[str, int]:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_measure", unreachable)
        said = refused(lambda: run(tmp_path, "steps=4"))
    assert "weights.pt: cannot be read: Stale file handle" in said
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == before
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_a_folder_of_checkpoints_that_cannot_be_listed_is_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path, "steps=2", "checkpoint.every=1") == 0
    log, folder = (tmp_path / "metrics.jsonl").read_bytes(), str(tmp_path / "checkpoints")

    def denied(right: Callable[..., Any]) -> Callable[..., Any]:
        def listed(path: Any = ".") -> Any:
            if os.fspath(path) == folder:
                raise PermissionError(errno.EACCES, "Permission denied", folder)
            return right(path)

        return listed

    with monkeypatch.context() as patch:
        for name in ("listdir", "scandir"):
            patch.setattr(os, name, denied(getattr(os, name)))
        said = refused(lambda: run(tmp_path, "steps=4"))
    assert said == f"{folder}: cannot be read: Permission denied; mend that and start again"
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_nobody_is_told_to_remove_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, "steps=2") == 0

    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", no_memory)
        said = refused(lambda: run(tmp_path, "steps=4"))
    assert "cannot be read here (MemoryError); see that there is memory" in said
    assert "remove" not in said.replace(str(tmp_path), "")


def test_frozen_networks_may_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "open_tower", lambda *_: StubTower())

    def aligned(*overrides: str) -> int:
        return train(smoke(1, *QUIET, f"out={tmp_path}", *overrides), CPU)

    here, there = ([f"text.folder={name}", f"choices.siglip2={name}"] for name in ("here", "there"))
    assert aligned("steps=1", *here) == 0
    assert aligned("steps=2", *there) == 0
    # Without its folder the objective is another.
    assert "other settings (choices.siglip2)" in refused(lambda: aligned("steps=3", there[0]))
    monkeypatch.setattr(StubTower, "name", "another")
    said = refused(lambda: aligned("steps=3", *there))
    assert said.endswith("was trained with the text tower stub, but text.folder holds another")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path) -> None:
    assert run(tmp_path, "steps=2", "checkpoint.every=1") == 0
    for path in (tmp_path / "checkpoints").glob("*/weights.pt"):
        os.truncate(path, 100)
    log = (tmp_path / "metrics.jsonl").read_bytes()
    said = refused(lambda: run(tmp_path, "steps=4"))
    assert f"no whole checkpoint is left: remove {tmp_path / 'checkpoints'} to start anew" in said
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_damaged_checkpoints_step_aside_and_the_new_ones_stay(tmp_path: Path) -> None:
    few = ("checkpoint.every=2", "checkpoint.keep_last=1")
    assert run(tmp_path, "steps=2", *few) == 0
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-000002", folder / "step-000600")
    os.truncate(folder / "step-000600" / "weights.pt", 100)
    assert run(tmp_path, "steps=4", *few) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["step-000004", "step-000600.damaged"]
    assert newest_good(folder) == folder / "step-000004"


def test_a_checkpoint_that_was_just_written_is_never_removed(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, 1, lambda _: None)
    for step in (9, 5):
        kept.save(step, {}, {}, None)
    assert (tmp_path / "step-000005").is_dir()


def test_a_stage_starts_from_the_newest_weights_of_the_one_before(tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert run(first, "steps=2") == 0
    assert json.loads((first / "model/steps.json").read_text()) == {"steps": 2}
    ended = load_previous(str(first)).network.state_dict()
    # The run goes on, and is killed after a checkpoint.
    (tmp_path / "kept").mkdir()
    shutil.copytree(first / "model", tmp_path / "kept/model")
    assert run(first, "steps=4") == 0
    shutil.rmtree(first / "model")
    shutil.copytree(tmp_path / "kept/model", first / "model")
    newer = load_previous(str(first)).network.state_dict()
    assert not all(torch.equal(tensor, newer[name]) for name, tensor in ended.items())
    shutil.rmtree(first / "model")
    expected = load_previous(str(first)).network.state_dict()
    assert all(torch.equal(tensor, newer[name]) for name, tensor in expected.items())


def test_a_run_goes_on_when_what_it_started_from_is_gone(tmp_path: Path) -> None:
    assert run(tmp_path / "first", "steps=2") == 0
    start = f"start={{kind: model, source: {tmp_path / 'first'}}}"
    assert run(tmp_path / "second", "steps=2", start) == 0
    shutil.rmtree(tmp_path / "first")
    assert run(tmp_path / "second", "steps=4", start) == 0
    assert steps_of(tmp_path / "second") == [1, 2, 3, 4]


def test_what_killed_runs_left_half_written_goes(tmp_path: Path) -> None:
    assert run(tmp_path, "steps=1") == 0
    left = [".model.0123abcd.part", "pictures/.a.0123abcd.part.png", ".metrics.0123abcd.part.jsonl", ".mine.part.png"]
    (tmp_path / "pictures").mkdir()
    (tmp_path / left[0]).mkdir()
    for name in left[1:]:
        (tmp_path / name).write_text("half")
    assert run(tmp_path, "steps=2") == 0
    assert [name for name in left if (tmp_path / name).exists()] == [".mine.part.png"]


def test_what_a_run_in_a_folder_below_is_writing_stays(tmp_path: Path) -> None:
    with only_run(tmp_path / "below"), atomic_path(tmp_path / "below/checkpoints/step-000001") as half:
        half.mkdir()
        assert run(tmp_path, "steps=1") == 0
        assert half.is_dir()


# ------------------------------------------------------------------------------------------------- two runs at a time


def test_a_folder_takes_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second() -> int:
        with suppress(InputError), only_run(tmp_path):
            return 1
        with pytest.raises(
            InputError, match=rf"another run is writing here \(process {os.getppid()} on .*another folder"
        ):
            only_run(tmp_path).__enter__()
        return 0

    right, tried = Loop.run, []

    def watched(self: Loop) -> int:
        tried.append(status_of(fork(second)))
        return right(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "run", watched)
        assert run(tmp_path, "steps=1") == 0
    assert tried == [0]
    with only_run(tmp_path):
        pass


# -------------------------------------------------------------------------------------------------------- bad numbers


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optimizer.max_grad_norm=.inf", r"optimizer\.max_grad_norm must be a finite number, got inf"),
        ("optimizer.weight_decay=.nan", r"optimizer\.weight_decay must be a finite number, got nan"),
        ("choices.sigmoid_scale=.nan", r"choices\.sigmoid_scale must be a finite number"),
        ("data.timeout=.nan", r"data\.timeout must be a finite number"),
        ("optimizer.betas=[0.9, .nan]", "betas must lie in 0..1"),
        ("optimizer.betas=[0.9, 1.5]", "betas must lie in 0..1"),
        ("rendering.l1=-1", "weights of rendering must not be negative"),
        ("peak_tflops=0", "peak_tflops must be above 0"),
        ("latent_channels=0", "latent_channels must be at least 1"),
        ("seed=99999999999999999999999", "seed must lie in 0"),
        ("start.gaussians=runs/other", "start.gaussians names a decoder, but gaussians gives no sizes"),
        ("validation.sources=[{name: a}, {name: a}]", "several are called a"),
        ("validation.sources=[{name: ../../a}]", "'../../a' is no name for files"),
        ("megatron={context_parallel_size: 2}", "megatron: leave out context_parallel_size: no token looks beyond its"),
        (
            "megatron.sequence_paralel=true",
            "megatron: unknown key 'sequence_paralel'; did you mean 'sequence_parallel'",
        ),
        ("start={kind: codes}", "fit linear codes, which this model has none of"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_a_step(tmp_path: Path, setting: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        train(pictures_alone(f"out={tmp_path / 'run'}", "steps=1", setting), CPU)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_devices_that_nothing_runs_on_are_refused() -> None:
    for name in ("mps", "meta", "gpu"):
        assert f"unknown device '{name}'; use cpu or cuda" in refused(lambda: choose_device(name))  # noqa: B023


# --------------------------------------------------------------------------------------------------- steps that fail


def fails(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Losses of some calls are infinite."""
    right, calls = TorchEngine.clip_and_step, iter(range(1000))

    def clip_and_step(self: TorchEngine, step: int, loss: float) -> Any:
        return right(self, step, float("inf") if bad(next(calls)) else loss)

    monkeypatch.setattr(TorchEngine, "clip_and_step", clip_and_step)


def test_a_run_of_failed_steps_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, lambda call: call > 0)
    said = refused(lambda: run(tmp_path, "steps=4"))
    assert said.startswith("3 of 4 steps had a loss or gradient that is not finite")
    assert not (tmp_path / "model").exists()
    assert newest_good(tmp_path / "checkpoints") is not None


def test_a_few_failed_steps_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(monkeypatch, lambda call: call == 1)
    assert run(tmp_path, "steps=4") == 0
    assert "1 of 4 steps were not finite and were skipped" in capsys.readouterr().err


def test_of_failed_steps_the_last_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, lambda call: call in (0, 2, 4, 6, 8))
    assert run(tmp_path, "steps=10", "max_bad_steps=2") == 0
    kept = sorted(path.name for path in (tmp_path / "bad-steps").iterdir())
    assert kept == [f"step-{step:06d}-process-0.pt" for step in (2, 4, 6, 8)]


def test_after_too_many_failed_steps_the_rate_may_be_lowered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        fails(patch, lambda _: True)
        said = refused(lambda: run(tmp_path, "steps=4", "max_bad_steps=2", "optimizer.lr=1.0e-2"))
    assert "start again with a lower optimizer.lr" in said
    assert run(tmp_path, "steps=9", "max_bad_steps=2", "optimizer.lr=1.0e-3") == 0
    assert "other than before: optimizer.lr" in capsys.readouterr().err
    assert "belongs to a run with other settings (optimizer.encoder_lr_factor)" in refused(
        lambda: run(tmp_path, "steps=9", "max_bad_steps=2", "optimizer.lr=1.0e-3", "optimizer.encoder_lr_factor=0.5")
    )


def test_what_was_done_is_on_disk_when_the_data_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = find_opener("shards")
    peace, cut = tmp_path / "peace", tmp_path / "cut"
    assert run(peace, "steps=4") == 0

    def short(*arguments: Any, **settings: Any) -> Any:
        source = opened(*arguments, **settings)
        right, calls = type(source).__next__, iter(range(1000))

        class Short(type(source)):  # type: ignore[misc]
            def __next__(self) -> Any:
                if next(calls) == 2:
                    right(self)  # what a step had taken when it failed is given again
                    raise InputError("12 of 20 samples are broken")
                return right(self)

        source.__class__ = Short
        return source

    with monkeypatch.context() as patch:
        patch.setattr(launch, "find_opener", lambda _: short)
        assert refused(lambda: run(cut, "steps=4")) == "12 of 20 samples are broken"
    assert steps_of(cut) == [1, 2]
    assert run(cut, "steps=4") == 0
    assert (cut / "metrics.jsonl").read_text() == (peace / "metrics.jsonl").read_text()


# ------------------------------------------------------------------------------------------------------ small things


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_one_process_takes_the_settings_of_many(tmp_path: Path, engine: str) -> None:
    assert run(tmp_path, "steps=1", f"engine={engine}") == 0


def test_without_a_terminal_there_are_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "steps=3", "log.every=1") == 0
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said if line.startswith("step ")] == ["step 1 of 3", "step 3 of 3"]
    assert "tokens/s, 0:00:00 left" in next(line for line in said if line.startswith("step 3 of 3"))
    assert said[-1] == f"wrote {tmp_path / 'model'}"


def test_a_log_with_other_things_in_it_is_no_obstacle(tmp_path: Path) -> None:
    assert run(tmp_path, "steps=1") == 0
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'17\n{"x": 6}\n\xff\xfe\n{"step": 1')
    assert run(tmp_path, "steps=2") == 0
    assert steps_of(tmp_path) == [1, 2]


def test_speed_is_of_the_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Loop._validate

    def slow(self: Loop) -> None:
        time.sleep(0.5)
        right(self)

    monkeypatch.setattr(Loop, "_validate", slow)
    began = time.perf_counter()
    assert train(pictures_alone(*QUIET, "validation.every=1", "log.every=1", "steps=3", f"out={tmp_path}"), CPU) == 0
    seconds = sum(line["seconds"] for line in lines(tmp_path / "speed.jsonl"))
    assert 0 < seconds < time.perf_counter() - began - 3 * 0.5


def test_smoke_settings_still_build_a_model_without_data() -> None:
    assert starting_model(smoke(1, "text={tower: none}"), None, None).network.config.name == "smoke"
