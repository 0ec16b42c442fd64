"""Training with Megatron: the plain engine's losses at every layout, over a restart at another one, and refusals."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch

from tests.tokenizer.curriculum_data import CONFIGS, lines
from tests.tokenizer.megatron_differences import largest, of_tensors
from tests.tokenizer.megatron_runs import found, run_worker
from tests.tokenizer.megatron_training_processes import LAYOUTS, WORLDS
from tokenizer.api import AToken
from tokenizer.config import config_to_dict
from tokenizer.errors import InputError
from tokenizer.megatron.pretrain import read_settings

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None and not os.environ.get("CI"), reason="megatron-core is not installed"
)

# All is float32. Sums over tensor ranks round otherwise, and Adam divides by the size of what has been rounded.
CLOSE = 1e-4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker(tmp_path_factory.mktemp("megatron"), "megatron_training_processes")


def difference(one: dict[str, float], other: dict[str, float]) -> float:
    """Largest relative difference of any number; infinite for other names."""
    if one.keys() != other.keys():
        return math.inf
    return largest(abs(one[name] - other[name]) / max(abs(other[name]), 1e-6) for name in other)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_different_wherever_it_stands(value: float) -> None:
    fine, wrong = {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": value}
    for one, other in ((fine, wrong), (wrong, fine)):
        assert difference(one, other) == math.inf
        tensors = ({name: torch.tensor([1.0, x]) for name, x in numbers.items()} for numbers in (one, other))
        assert of_tensors(*tensors) == math.inf
    assert largest([0.0, value]) == math.inf


@needs_megatron
@pytest.mark.parametrize(("name", "rank"), [(name, rank) for name in ("tp", "dp", "pp") for rank in (0, 1)])
def test_steps_are_those_of_the_plain_engine(runs: Path, name: str, rank: int) -> None:
    """Losses of six tasks, norms by part, the average: with what some steps do not touch left alone."""
    ours, plain = found(runs, name, rank), found(runs, "plain")
    for mine, theirs in zip(ours["steps"], plain["steps"], strict=True):
        assert difference(mine, theirs) < CLOSE
    assert difference(ours["seen"], plain["seen"]) < CLOSE
    assert difference(ours["next"], plain["next"]) < CLOSE
    assert len({name for step in plain["steps"] for name in step if name.endswith(("/semantic", "/l1"))}) == 6


@needs_megatron
def test_a_checkpoint_of_two_tensor_ranks_goes_on_in_one_process(runs: Path) -> None:
    before, after = found(runs, "tp"), found(runs, "resumed")
    assert difference(after["next"], before["next"]) < CLOSE
    assert difference(after["seen"], before["seen"]) < CLOSE
    assert after["refused"].endswith("set megatron.use_distributed_optimizer=true")


@needs_megatron
def test_a_step_that_is_not_finite_changes_nothing_anywhere(runs: Path) -> None:
    """In data parallel the NaN is in one of two copies."""
    assert all(found(runs, name, rank)["skipped"] for name, world in WORLDS.items() for rank in range(world))


@needs_megatron
def test_processes_of_one_copy_have_the_same_samples_or_stop(runs: Path) -> None:
    """They read for themselves, and one of them may have found a shard out of reach."""
    said = {name: {found(runs, name, rank)["odd samples"] for rank in range(world)} for name, world in WORLDS.items()}
    assert [name for name, lines in said.items() if lines != {""}] == ["tp", "pp"]
    assert said["tp"] == said["pp"]
    assert "a copy of the model together were given different samples" in said["tp"].pop()


@needs_megatron
def test_the_launcher_stops_when_told_and_goes_on_at_another_layout(runs: Path) -> None:
    statuses = json.loads((runs / "statuses.json").read_text())
    assert statuses == {
        **{name: [0] * WORLDS[name] for name in LAYOUTS},
        "plain run": [0],
        "stopped": [143, 143],
        "gone on": [0],
        "other engine": [1],  # one line
    }
    ours, plain = lines(runs / "stopped/metrics.jsonl"), lines(runs / "plain/metrics.jsonl")
    for mine, theirs in zip(ours, plain, strict=True):
        assert difference(mine, theirs) < CLOSE
    folders = sorted(path.name for path in (runs / "stopped/checkpoints").iterdir())
    assert folders == ["step-000003", "step-000004"]  # the last two, and nothing half written
    trained, reference = (AToken.from_pretrained(runs / name / "model").state_dict() for name in ("stopped", "plain"))
    for name, tensor in reference.items():
        assert float((trained[name] - tensor).abs().max()) < CLOSE


@pytest.mark.parametrize(
    ("overrides", "world", "said"),
    [
        (["megatron.tensor_model_parallel_size=4"], 4, "heads 2 of the encoder is not divisible"),
        (["megatron.tensor_model_parallel_size=2"], 1, "1 processes cannot hold whole copies of a model over 2"),
        (["model=nano", "megatron.pipeline_model_parallel_size=2"], 2, "linear codes"),
        (["megatron.tensor_model_paralel_size=2"], 2, "did you mean 'tensor_model_parallel_size'"),
        (["precision=bf16", "megatron.bf16=false"], 1, "leave bf16 out"),
        (["megatron.fp8_format=hybrid"], 1, "transformer_engine"),
        (["megatron.overlap_grad_reduce=true"], 1, "every parameter in every step"),
    ],
)
def test_impossible_layouts_are_refused_in_one_line(overrides: list[str], world: int, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        read_settings(CONFIGS / "smoke-stage1.yaml", overrides, world)
    assert "\n" not in str(raised.value)


def test_fp8_refuses_shapes_that_it_cannot_take() -> None:
    fp8 = ["precision=bf16", "megatron={fp8_format: hybrid, transformer_impl: transformer_engine}"]
    with pytest.raises(InputError, match="FP8 needs multiples of 16"):
        read_settings(CONFIGS / "smoke-stage1.yaml", [*fp8, "model.encoder.mlp_width=40"], 1)
    config, parallel = read_settings(CONFIGS / "smoke-stage1.yaml", [*fp8, "model=so400m-c"], 8)
    assert parallel.bf16
    assert config_to_dict(config)["megatron"]["fp8_format"] == "hybrid"
