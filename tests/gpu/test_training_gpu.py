"""What only a CUDA device can show of training: the fused optimizer goes on, and blocks are computed again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tokenizer.curriculum_data import lines, make_sets, pictures_alone
from tokenizer.training.curriculum import records
from tokenizer.training.curriculum.launch import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps at a time, and two and two."""
    folder = tmp_path_factory.mktemp("gpu-training")
    make_sets(folder, videos=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(records, "has_tensorboard", lambda: False)
        device = torch.device("cuda")
        # The schedule must not know where a run was cut.
        settings = (
            "optimizer.warmup=0",
            "optimizer.lr=1.0e-3",
            "optimizer.min_lr=1.0e-3",
            "checkpoint.every=2",
            "validation.every=2",
        )
        assert train(pictures_alone("steps=4", *settings, "out=whole"), device) == 0
        assert train(pictures_alone("steps=4", *settings, "out=again", "recompute=true"), device) == 0
        assert train(pictures_alone("steps=2", *settings, "out=cut"), device) == 0
        assert train(pictures_alone("steps=4", *settings, "out=cut"), device) == 0
    return folder


@pytest.mark.parametrize("other", ["cut", "again"])
def test_a_run_that_goes_on_and_one_that_computes_again_are_the_whole_one(runs: Path, other: str) -> None:
    wanted = [line for line in lines(runs / "whole/metrics.jsonl") if "loss" in line]
    found = [line for line in lines(runs / other / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    # Sums on a device come in any order.
    for before, after in zip(wanted, found, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-4)
    assert wanted[-1]["loss"] != pytest.approx(wanted[0]["loss"], rel=1e-3)
