"""bfloat16 training with Megatron where parts stay float32: what the optimizer moves, averages, checkpoints."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tokenizer import megatron_runs
from tests.tokenizer.megatron_bf16_processes import KINDS, LAYOUTS, WORLDS
from tests.tokenizer.megatron_runs import run_worker
from tests.tokenizer.test_megatron_training import difference
from tokenizer.api import AToken

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None and not os.environ.get("CI"), reason="megatron-core is not installed"
)

# bfloat16 has a relative error of 2^-9 = 2e-3 in every product. The plain engine rounds others than Megatron's does
# (float32 parameters, norms and softmax), tensor ranks round their shares before they are summed.
BFLOAT16 = 3e-2
# The same numbers, summed in another order in float32.
FLOAT32 = 1e-6
AFTER = [name for name in LAYOUTS if name != "one"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker(tmp_path_factory.mktemp("megatron_bf16"), "megatron_bf16_processes")


def found(runs: Path, kind: str, name: str, rank: int = 0) -> dict[str, Any]:
    return megatron_runs.found(runs, f"{kind}-{name}", rank)


def kept(runs: Path, kind: str, name: str) -> dict[str, Any]:
    values: dict[str, Any] = torch.load(runs / f"{kind}-{name}.pt", weights_only=True)
    return values


@pytest.mark.parametrize("kind", KINDS)
def test_norms_by_part_are_those_of_the_plain_engine(runs: Path, kind: str) -> None:
    """Steps with and without clips and Gaussians: what is not used has a norm of 0."""
    plain, ours = json.loads((runs / "reference.json").read_text()), found(runs, kind, "one")["steps"]
    for mine, theirs in zip(ours, plain, strict=True):
        assert difference(mine, theirs) < BFLOAT16
    assert [step["norm/gaussians"] > 0 for step in ours] == [False, False, True]
    assert ours == found(runs, "whole", "one")["steps"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_piece_is_its_own_parameters(runs: Path, kind: str) -> None:
    """Before and after steps; at its rate and decay; and where no task has used it, it stays as it was."""
    one = found(runs, kind, "one")
    assert one["misplaced"] == []
    assert one["moved unused"] == []
    assert one["wrong rates"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_start_and_average_are_those_of_float32(runs: Path, kind: str) -> None:
    one, average = found(runs, kind, "one"), kept(runs, kind, "one")["state"]["average"]
    assert one["rounded"] == []
    assert one["average"] == []
    # Scales begin at 1, where bfloat16 has steps of 2^-8.
    scale = average["network.decoder.transformer.norm.weight"]
    assert not torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_saved_models_are_the_average(runs: Path, kind: str, name: str) -> None:
    average, model = kept(runs, kind, "one")["state"]["average"], AToken.from_pretrained(runs / f"{kind}-{name}-model")
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, average[f"network.{key}"]), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", AFTER)
def test_a_checkpoint_goes_around_all_layouts_unchanged(runs: Path, kind: str, name: str) -> None:
    """Averages, what the optimizer moves, and moments: each layout reads what the one before has written."""
    first, now = kept(runs, kind, "one"), kept(runs, kind, name)
    first["average"], now["average"] = first.pop("state")["average"], now.pop("state")["average"]
    for part, tensors in first.items():
        assert now[part].keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(now[part][key], tensor), (part, key)
    assert float(first["exp_avg"]["gaussians.to_gaussians.weight"].abs().max()) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "rank"), [(name, rank) for name in AFTER for rank in range(WORLDS[name])])
def test_the_next_step_is_the_same_at_every_layout(runs: Path, kind: str, name: str, rank: int) -> None:
    first, now = found(runs, kind, "one"), found(runs, kind, name, rank)
    close = BFLOAT16 if name == "tp" else FLOAT32
    assert now["misplaced"] == []
    assert difference(now["next"], first["next"]) < close
    assert difference(now["seen"], first["seen"]) < close
    if name == "back":
        assert now["next"] == first["next"]


def test_no_process_failed(runs: Path) -> None:
    statuses = json.loads((runs / "statuses.json").read_text())
    assert set(map(tuple, statuses.values())) == {(0,), (0, 0)}
