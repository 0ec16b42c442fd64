"""Settings from YAML, JSON and key=value: exact round trips, and one line for everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenizer.checkpoints import bundled_models
from tokenizer.config import changed_settings, config_to_dict, load_config, parse_config, read_mapping
from tokenizer.errors import InputError
from tokenizer.model.config import CONFIGS, NANO, ATokenConfig, FSQConfig
from tokenizer.training.curriculum.config import RunConfig
from tokenizer.training.gaussian_trainer import GaussianTrainConfig

ROOT = Path(__file__).parents[2]
RUN = """model: nano
name: x
stage: {number: 1, name: first}
steps: 5
out: runs/x
data: {sources: []}
optimizer: {lr: 1.0e-3}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


@pytest.mark.parametrize("ending", ["json", "yaml"])
@pytest.mark.parametrize("name", CONFIGS)
def test_named_configurations_survive_a_file(tmp_path: Path, name: str, ending: str) -> None:
    path = tmp_path / f"config.{ending}"
    plain = config_to_dict(CONFIGS[name])
    path.write_text(json.dumps(plain) if ending == "json" else yaml.safe_dump(plain))
    assert load_config(ATokenConfig, path) == CONFIGS[name]


# What an ablation compares is no run: tests/tokenizer/test_ablations.py reads it.
RUNS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.stem != "ablations")


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_runs_in_the_repository_can_be_read(path: Path) -> None:
    if "gaussians" in path.stem:
        decoder = load_config(GaussianTrainConfig, path)
        assert decoder.model in bundled_models()
        assert parse_config(GaussianTrainConfig, config_to_dict(decoder), "again") == decoder
        return
    config = load_config(RunConfig, path)
    assert parse_config(RunConfig, config_to_dict(config), "again") == config


def test_overrides_reach_every_depth(run_file: Path) -> None:
    overrides = ["steps=7", "optimizer.muon_lr=2e-3", "optimizer.betas=[0.8, 0.9]", "quantizer.codebooks=4"]
    config = load_config(RunConfig, run_file, [*overrides, "data.budgets.video=32", "name=a=b"])
    assert (config.steps, config.optimizer.lr, config.optimizer.muon_lr) == (7, 1e-3, 2e-3)
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.data == {"sources": [], "budgets": {"video": 32}}
    assert config.quantizer == FSQConfig(codebooks=4)
    assert config.name == "a=b"
    assert load_config(RunConfig, run_file, ["quantizer.codebooks=4", "quantizer=null"]).quantizer is None


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=1", "unknown key 'stepz'; did you mean 'steps'?"),
        ("optimizer.warmpu=1", "unknown key 'optimizer.warmpu'; did you mean 'optimizer.warmup'?"),
        ("quantizer.codebook=1", "unknown key 'quantizer.codebook'; did you mean 'quantizer.codebooks'?"),
        ("loss.zzzzzz=1", "unknown key 'loss.zzzzzz'; known keys: "),
        ("steps", "'steps' is not an override; write key=value"),
        ("=3", "'=3' is not an override; write key=value"),
        ("steps.more=3", "steps.more=3: 'steps' is a value, not a group of settings"),
        ("steps=[1", "'steps=[1' is not an override"),
        ("steps=many", "steps: Input should be a valid integer"),
        ("steps=", "steps: Input should be a valid integer"),
        ("steps=0", "steps must be at least 1, got 0"),
        ("start={kind: codes, iterations: 0}", "start.iterations at least 1"),
        ("checkpoint.every=0", "checkpoint.every must be at least 1, got 0"),
        ("seed=-1", "seed must not be negative, got -1"),
        ("precision=fp8", "precision: Input should be 'fp32' or 'bf16'"),
        ("optimizer=fast", "optimizer: Input should be a dictionary"),
        ("optimizer.lr=high", "optimizer.lr: Input should be a valid number"),
        ("optimizer.weight_decay=-1", "must not be negative"),
    ],
)
def test_bad_overrides(run_file: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(RunConfig, run_file, [override])
    assert message in one_line(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": {**config_to_dict(NANO)["encoder"], "widht": 3}}, "unknown key 'encoder.widht'; did you mean"),
        ({"encoder": {**config_to_dict(NANO)["encoder"], "width": 0}}, "encoder: width must be at least 1, got 0"),
        ({"patch_size": [4, 16]}, "patch_size"),
        ({"tile_frames": 6}, "tile_frames must be a positive multiple of the 4 frames"),
        ({"skip": {"still_codes": 0, "clip_codes": 1}}, "at least one code of each sort"),
        ({"encoder": {"width": 8}}, "encoder.depth: Field required"),
    ],
)
def test_bad_sizes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_config(ATokenConfig, {**config_to_dict(NANO), **change}, "here.json")
    assert message in one_line(error)
    assert str(error.value).startswith("here.json: ")


def test_changed_settings_have_names_and_new_ones_were_what_they_are_by_default() -> None:
    then = config_to_dict(NANO)
    assert changed_settings(NANO, then) == []
    del then["tile_frames"], then["encoder"]["rotary"]
    assert changed_settings(NANO, then) == []
    then["encoder"]["depth"] += 1
    then["skip"] = None
    assert changed_settings(NANO, then) == ["encoder.depth", "skip"]
    # Settings that are no more are named, and so are those that came since: it cannot be known what they were.
    assert changed_settings(NANO, {**config_to_dict(NANO), "stride": 2}) == ["stride"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", b"a: [1", "not valid"),
        ("a.yaml", b"- 1\n- 2\n", "must hold key: value pairs at the top level"),
        ("a.yaml", b"", "must hold key: value pairs at the top level"),
        ("a.yaml", b"day: 2024-13-45", "not valid"),
        ("a.yaml", b"a: !!python/object/apply:os.getcwd []", "not valid"),
        ("a.yaml", b"\xff\xfe\x00", "cannot be read: not a text file"),
        ("a.json", b"{'a': 1}", "not valid"),
        ("a.json", b"[" * 100_000, "not valid"),
        ("a.json", None, "cannot be read: No such file or directory"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_mapping(tmp_path / name)
    assert message in one_line(error)
    assert str(tmp_path / name) in str(error.value)
