"""The state of a run on disk: whole after kill -9 and on a full disk, and of no other run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tokenizer.test_checkpoints import contents, full_disk, refused
from tokenizer.config import load_config
from tokenizer.errors import InputError
from tokenizer.training.curriculum.optimization import Average
from tokenizer.training.curriculum.records import forget_log_after
from tokenizer.training.gaussian_trainer import GaussianTrainConfig
from tokenizer.training.progress import Progress
from tokenizer.training.state import load_state, save_state

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {"seed": 0, "steps": 5, "save_every": 2, "optimizer": {"lr": 1e-3}}


class Run:
    """A layer that is trained; its state is some 9 kB."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.network = torch.nn.Linear(24, 24)
        self.average = Average(dict(self.network.named_parameters()), 0.9, 0)
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(self.network.parameters())]

    def train(self, steps: int) -> None:
        for step in range(steps):
            self.network(torch.randn(2, 24, generator=self.generator)).square().sum().backward()
            self.optimizers[0].step()
            self.network.zero_grad()
            self.average.update(step)

    def save(self, folder: Path, step: int) -> None:
        progress = Progress(step, bad_row=1, bad=2)
        save_state(folder, progress, self.network, self.average, self.optimizers, self.generator, SETTINGS)

    def load(self, folder: Path, **changes: Any) -> Progress:
        settings = {**SETTINGS, **changes}
        return load_state(folder, self.network, self.average, self.optimizers, self.generator, settings)

    def numbers(self) -> list[torch.Tensor]:
        """Everything that decides how the run goes on."""
        moments = [value for state in self.optimizers[0].state.values() for value in state.values()]
        return [*self.network.parameters(), *self.average.values.values(), *moments, self.generator.get_state()]


def test_a_state_gives_back_every_number(tmp_path: Path) -> None:
    run, other = Run(), Run(seed=1)
    assert other.load(tmp_path) == Progress()
    run.train(3)
    run.save(tmp_path, 3)
    assert other.load(tmp_path) == Progress(3, 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(run.numbers(), other.numbers(), strict=True))
    for each in (run, other):
        each.train(2)
    assert all(torch.equal(a, b) for a, b in zip(run.numbers(), other.numbers(), strict=True))
    # Averages are the run's own: those of the file were copied.
    assert other.average.values.keys() == dict(other.network.named_parameters()).keys()


def test_a_state_of_before_has_counted_no_bad_steps(tmp_path: Path) -> None:
    run = Run()
    run.train(1)
    run.save(tmp_path, 1)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["bad"]
    torch.save(state, tmp_path / "state.pt")
    assert run.load(tmp_path) == Progress(1, 0, 0)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.tokenizer.test_training_state import Run
from tokenizer.training import state

run, folder, whole = Run(), Path(sys.argv[1]), state.write_pt
run.train(1)
run.save(folder, 1)

def half(value, path):
    whole(value, path)
    os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)

state.write_pt = half
run.train(1)
run.save(folder, 2)
"""


def test_a_kill_in_the_middle_of_a_state_keeps_the_one_before(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED.format(root=str(ROOT)), str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert Run().load(tmp_path).step == 1


def test_a_full_disk_keeps_the_state_before(tmp_path: Path) -> None:
    run = Run()
    run.train(1)
    run.save(tmp_path, 1)
    before = contents(tmp_path)
    with full_disk(5_000), pytest.raises(OSError, match="File too large"):
        run.save(tmp_path, 2)
    assert contents(tmp_path) == before


def test_other_settings_are_another_run(tmp_path: Path) -> None:
    run = Run()
    run.save(tmp_path, 2)
    for changes, key in (({"seed": 1}, "seed"), ({"optimizer": {"lr": 2e-3}}, "optimizer")):
        text = refused(lambda: run.load(tmp_path, **changes))  # noqa: B023
        assert text.startswith(f"{tmp_path / 'state.pt'} belongs to a run with other settings ({key}); ")
    assert run.load(tmp_path, steps=9, save_every=1).step == 2


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("seed=-1", "seed must lie in"),
        ("loss.l2=-1", "must not be negative"),
        ("loss.alpha=.nan", "loss.alpha must be a finite number, got nan"),
        ("optimizer.weight_decay=.inf", "optimizer.weight_decay must be a finite number, got inf"),
    ],
)
def test_settings_of_gaussians_that_make_no_sense_are_refused_at_once(setting: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_config(GaussianTrainConfig, ROOT / "configs/tokenizer/nano-gaussians.yaml", [setting])


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04"])
def test_a_damaged_state_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    assert "remove it to start anew" in refused(lambda: Run().load(tmp_path))


def test_a_log_forgets_what_comes_again(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    forget_log_after(log, 2)
    assert not log.exists()
    lines = [json.dumps({"step": step}) + "\n" for step in range(4)]
    for step, kept in ((2, 3), (0, 0)):
        log.write_text("".join(lines) + '{"step": 4, "lo')  # as a kill in the middle of a line leaves it
        forget_log_after(log, step)
        assert log.read_text() == "".join(lines[:kept])
