"""The folder of a Gaussian decoder's training: one run at a time, and what a killed one left is removed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from tests.tokenizer.curriculum_worker import fork, status_of
from tests.tokenizer.test_gaussian_training import CONFIG, config, store  # noqa: F401  (a fixture)
from tokenizer.errors import InputError
from tokenizer.lock import only_run
from tokenizer.training import gaussian_trainer
from tokenizer.training.gaussian_trainer import GaussianTrainer


def test_one_run_at_a_time_which_removes_what_a_killed_one_left(
    store: Path,  # noqa: F811
    tiny_models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two would write the same log twice, and each the state of the other."""
    folder = tmp_path / "run"
    folder.mkdir()
    half = folder / ".state.0123abcd.part.pt"
    half.write_text("half a state")
    settings = config(store, folder, tiny_models / "atoken-nano", steps=2)

    def second() -> int:
        with suppress(InputError), only_run(folder):
            return 1
        return 0

    original, tried = GaussianTrainer._step, []

    def watched(self: GaussianTrainer, step: int) -> tuple[dict[str, float], dict[str, float]]:
        tried.append(status_of(fork(second)))
        return original(self, step)

    monkeypatch.setattr(gaussian_trainer, "load_config", lambda *_: settings)
    monkeypatch.setattr(GaussianTrainer, "_step", watched)
    assert gaussian_trainer.main(["--config", str(CONFIG), "--device", "cpu"]) == 0
    assert tried == [0, 0]
    assert not half.exists()
