"""Training in several processes as torchrun starts them: layouts, signals, kills, engines in turn, and one voice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tokenizer.curriculum_data import ROOT, lines, make_sets
from tests.tokenizer.test_megatron_training import CLOSE, difference, needs_megatron
from tests.tokenizer.test_training_records import scalars
from tests.tokenizer.training_processes import BETWEEN, ENDED, LAYOUTS, MEGATRON, write_settings
from tokenizer.api import AToken
from tokenizer.errors import InputError
from tokenizer.training.curriculum import interruption
from tokenizer.training.curriculum.interruption import Interruption, exit_status
from tokenizer.training.curriculum.launch import choose_device

LOST = "error: lost another process of this run, which may have been killed; start the run again"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    make_sets(folder)
    write_settings(folder / "run.yaml")
    return folder


@pytest.fixture(scope="module")
def peace(sets: Path) -> subprocess.CompletedProcess[str]:
    """`atoken train` in two processes, by the real command."""
    return torchrun(sets, "tokenizer.cli", "train", "out=peace")


@pytest.fixture(scope="module")
def tensor(sets: Path) -> subprocess.CompletedProcess[str]:
    """Megatron on two tensor ranks, by the real command."""
    return torchrun(sets, "tokenizer.megatron.pretrain", "out=tensor", "megatron.tensor_model_parallel_size=2")


def torchrun(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module]
    commands = [argument for argument in arguments if "=" not in argument]
    settings = [argument for argument in arguments if "=" in argument]
    command = [*agent, *commands, "--config", "run.yaml", "--device", "cpu", *settings]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def runs(sets: Path, peace: subprocess.CompletedProcess[str], request: pytest.FixtureRequest) -> Path:
    """Everything that `training_processes` launches, in one process with its forks."""
    assert peace.returncode == 0, peace.stderr
    if MEGATRON:
        request.getfixturevalue("tensor")
    worker = [sys.executable, "-m", "tests.tokenizer.training_processes", str(sets)]
    subprocess.run(worker, check=True, cwd=ROOT, env=ENVIRONMENT)
    return sets


@pytest.fixture(scope="module")
def statuses(runs: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads((runs / "statuses.json").read_text())
    return found


def metrics(runs: Path, name: str) -> str:
    return (runs / name / "metrics.jsonl").read_text()


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


# ---------------------------------------------------------------------- the commands themselves


def test_torchrun_trains_with_the_plain_engine(sets: Path, peace: subprocess.CompletedProcess[str]) -> None:
    assert peace.returncode == 0, peace.stderr
    assert [line["step"] for line in lines(sets / "peace/metrics.jsonl") if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert not errors(peace.stderr)
    assert AToken.from_pretrained(sets / "peace" / "model").config.name == "smoke"


@needs_megatron
@pytest.mark.usefixtures("peace")
def test_torchrun_trains_with_megatron(sets: Path, tensor: subprocess.CompletedProcess[str]) -> None:
    """One copy of the model over two processes sees other batches than two copies, from the same beginning."""
    assert tensor.returncode == 0, tensor.stderr
    assert not errors(tensor.stderr)
    ours, plain = lines(sets / "tensor/metrics.jsonl"), lines(sets / "peace/metrics.jsonl")
    assert [line["step"] for line in ours] == [line["step"] for line in plain]
    assert difference(ours[0], plain[0]) < CLOSE
    assert ours[-1]["validation/pictures/psnr"] > ours[0]["validation/pictures/psnr"]


def test_weights_that_are_shared_out_train_as_whole_ones(runs: Path, statuses: dict[str, list[int]]) -> None:
    assert statuses["fsdp2"] == [0, 0]
    for shared, whole in zip(
        lines(runs / "fsdp2/metrics.jsonl")[:2], lines(runs / "peace/metrics.jsonl"), strict=False
    ):
        assert difference(shared, whole) < CLOSE


def without_rates(line: dict[str, float]) -> dict[str, float]:
    """The second step's rates are those of a run that ends there."""
    return {name: value for name, value in line.items() if not name.startswith("rate/")}


# ---------------------------------------------------------------------- faults


def test_a_signal_to_one_process_stops_all_at_one_step(runs: Path, statuses: dict[str, list[int]]) -> None:
    """It comes twice, as when torchrun hands on what its processes were sent too; nothing of the log is lost."""
    told = exit_status(signal.SIGTERM)
    assert statuses["told"] in ([told, told], [ENDED, told], [told, ENDED])  # torchrun may be quicker to end the other
    assert statuses["told, then"] == [0, 0]
    said = (runs / "told.err").read_text()
    assert f"stopped after step {BETWEEN}; start again to go on" in said
    assert f"going on from step {BETWEEN}" in said
    assert not errors(said)
    assert metrics(runs, "told") == metrics(runs, "peace")


def test_a_killed_process_ends_the_run_and_costs_nothing(runs: Path, statuses: dict[str, list[int]]) -> None:
    """With data read by worker processes, which end with theirs, and without; TensorBoard has the curve of the log."""
    assert statuses["killed"] in ([1, ENDED], [ENDED, ENDED])  # torchrun may be quicker to end the other
    assert statuses["killed, then"] == [0, 0]
    said = (runs / "killed.err").read_text()
    assert errors(said) in ([], [LOST])
    assert f"going on from step {BETWEEN - 1}" in said
    assert metrics(runs, "killed") == metrics(runs, "peace")
    assert scalars(runs / "killed") == scalars(runs / "peace")
    assert not processes_in(runs)


def processes_in(folder: Path) -> list[int]:
    """Processes that work in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if entry.readlink() == folder:
                found.append(int(entry.parent.name))
        except OSError:  # of another user, or gone
            continue
    return found


@needs_megatron
def test_a_killed_process_costs_nothing_with_megatron(runs: Path, statuses: dict[str, list[int]]) -> None:
    assert statuses["tensor killed"] in ([1, ENDED], [ENDED, ENDED])
    assert statuses["tensor, then"] == [0, 0]
    assert errors((runs / "tensor-killed.err").read_text()) in ([], [LOST])
    assert metrics(runs, "tensor-killed") == metrics(runs, "tensor")


def test_a_signal_later_than_an_echo_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with Interruption() as interruption_of_run:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption_of_run.signal == signal.SIGINT
        monkeypatch.setattr(interruption, "ECHO", 0.0)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# ---------------------------------------------------------------------- layouts and engines


@needs_megatron
@pytest.mark.parametrize("name", [name for name, (world, _) in LAYOUTS.items() if world > 1])
def test_layouts_of_two_kinds_train_as_one_process(runs: Path, statuses: dict[str, list[int]], name: str) -> None:
    """Four processes over pictures, clips and 3D: losses, norms, and what averaged models make of a batch of each."""
    world = LAYOUTS[name][0]
    assert statuses[name] == [0] * world
    plain: dict[str, Any] = json.loads((runs / "one process-0.json").read_text())
    for rank in range(world):
        ours: dict[str, Any] = json.loads((runs / f"{name}-{rank}.json").read_text())
        for mine, theirs in zip(ours["steps"], plain["steps"], strict=True):
            assert difference(mine, theirs) < CLOSE
        assert difference(ours["seen"], plain["seen"]) < CLOSE


@needs_megatron
@pytest.mark.parametrize(
    ("name", "start"), [("from-plain", "peace"), ("from-tensor", "tensor"), ("from-killed", "tensor-killed")]
)
def test_a_run_begins_where_one_of_another_engine_stood(
    runs: Path, statuses: dict[str, list[int]], name: str, start: str
) -> None:
    """From a finished model, and from the last checkpoint of a run that was killed after the same step."""
    first = lines(runs / name / "metrics.jsonl")[0]
    assert first["step"] == 0
    measured = [line for line in lines(runs / start / "metrics.jsonl") if "validation/pictures/psnr" in line]
    last = {**measured[-1], "step": 0}
    if name == "from-killed":
        assert statuses["from a killed one"] == [0]
        # Its checkpoint was of another step than any validation, so what it learned is bounded by its neighbours.
        values = [line["validation/pictures/psnr"] for line in measured[-2:]]
        assert values[0] < first["validation/pictures/psnr"] < values[1]
    else:
        assert difference(first, last) < CLOSE


# ---------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("typing", "run.yaml: unknown key 'stepps'; did you mean 'steps'?"),
        ("alone", "engine is single, but there are 2 processes; use ddp or fsdp2"),
        (
            "few",
            "2 processes cannot hold whole copies of a model over 4 (tensor 2 x pipeline 2); start a multiple of 4",
        ),
        ("one", "no data on this machine"),
        (
            "other",
            "other/checkpoints/step-000006 belongs to a run with other settings (model.encoder.depth); choose another "
            "out= folder or remove it",
        ),
    ],
)
def test_what_is_wrong_is_said_once(runs: Path, statuses: dict[str, list[int]], name: str, said: str) -> None:
    """In settings, a layout, an engine, a checkpoint, and in one process alone, which ends the other; before a step."""
    assert errors((runs / f"{name}.err").read_text()) == [f"error: {said}"]
    assert 1 in statuses[name]
    # torchrun ends the other by SIGTERM, which is an end with a status of its own while the command is being read.
    assert set(statuses[name]) <= {1, ENDED, exit_status(signal.SIGTERM)}
    assert (metrics(runs, name) == metrics(runs, "peace")) if name == "other" else not (runs / name).exists()


def test_fewer_gpus_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="2 GPUs here for more processes; start one for each"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device here; use --device cpu"):
        choose_device("cuda")
