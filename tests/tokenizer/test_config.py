"""Settings from YAML, JSON and key=value: exact round trips, and one line for everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data.config import DataConfig
from tokenizer.checkpoints import bundled_models
from tokenizer.config import changed_settings, config_to_dict, load_config, parse_config, read_mapping
from tokenizer.errors import InputError
from tokenizer.fp8.config import FP8Config
from tokenizer.megatron.config import MOST_MARGIN
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
        ("seed=-1", "seed must "),
        ("precision=fp8", "precision: Input should be 'fp32' or 'bf16'"),
        ("optimizer=fast", "optimizer: Input should be a dictionary"),
        ("optimizer.lr=high", "optimizer.lr: Input should be a valid number"),
        ("optimizer.weight_decay=-1", "must not be negative"),
        ("steps=yes", "steps: must be a number, got true (yes, no, on and off are truth values too)"),
        ("optimizer.lr=off", "optimizer.lr: must be a number, got false"),
        ("optimizer.betas=[0.9, true]", "optimizer.betas.1: must be a number, got true"),
        ("perceptual_images=true", "perceptual_images: must be a number, got true"),
        ("quantizer={codebooks: yes}", "quantizer.codebooks: must be a number, got true"),
        ("optimizer={lr: 1, lr: 2}", "'optimizer={lr: 1, lr: 2}': the key 'lr' stands twice, again in line 1"),
        ("fp8={fp8_recipe: delayed, fp8_margin: -3000}", "fp8: fp8_margin must be from 0 to 14, got -3000"),
        ('out=""', "out is empty; name the folder of the run"),
        ('out=" "', "out is empty; name the folder of the run"),
        ('out="a\\0b"', "out: holds the character NUL"),
        ('data={sources: ["a\\0b"]}', "data.sources.0: holds the character NUL"),
        ("fp8={fp8_margin: 15}", "fp8: fp8_margin must be from 0 to 14, got 15"),
    ],
)
def test_bad_overrides(run_file: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(RunConfig, run_file, [override])
    assert message in one_line(error)


def refusal(values: dict[str, Any], kind: type = RunConfig) -> str:
    with pytest.raises(InputError) as error:
        parse_config(kind, values, "x.yaml")
    return one_line(error)


def test_truth_values_stay_where_they_are_wanted(run_file: Path) -> None:
    config = load_config(
        RunConfig, run_file, ["compile=yes", "data.anything=true", "stage.number=2", "optimizer.lr=1e-4"]
    )
    assert config.compile is True
    assert config.data["anything"] is True
    assert (config.stage.number, config.optimizer.lr) == (2, 1e-4)


def test_of_a_name_or_sizes_the_mistakes_of_what_was_given_are_told() -> None:
    run = yaml.safe_load(RUN)
    assert parse_config(RunConfig, {**run, "model": config_to_dict(NANO)}, "x").model == NANO
    sizes = {**config_to_dict(NANO), "latent_channels": "many"}
    sizes["encoder"]["heads"] = "few"
    told = "Input should be a valid integer, unable to parse string as an integer"
    assert refusal({**run, "model": sizes}) == (f"x.yaml: model.encoder.heads: {told}; model.latent_channels: {told}")
    # A mistake that sizes make only together, and neither a name nor sizes.
    assert refusal({**run, "model": {**config_to_dict(NANO), "tile_frames": 6}}).startswith(
        "x.yaml: model: tile_frames must be a positive multiple"
    )
    assert refusal({**run, "model": 3}) == "x.yaml: model: Input should be a valid string"
    assert refusal({**run, "model": True}) == "x.yaml: model: Input should be a valid string"
    assert "unknown key 'model.encoder.widht'" in refusal({**run, "model": {"encoder": {"widht": 1}}})


def test_a_mistake_of_the_whole_has_no_name() -> None:
    assert refusal({**yaml.safe_load(RUN), "steps": 0}) == "x.yaml: steps must be at least 1, got 0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weigth": 2}, "unknown key 'sources.1.weigth'; did you mean 'sources.1.weight'?"),
        ({"weight": True}, "sources.1.weight: must be a number, got true"),
        ({"weight": [1]}, "sources.1.weight: Input should be a valid integer; sources.1.weight: Input should be a"),
        (
            {"weight": {"a": 1}},
            "sources.1.weight: Input should be a valid integer; sources.1.weight: Input should be a",
        ),
        ({"decode": {"strides": [[1, True]]}}, "sources.1.decode.strides.0.1: must be a number, got true"),
    ],
)
def test_mistakes_in_lists_have_numbers(change: dict[str, Any], message: str) -> None:
    source = {"name": "a", "task": "image_reconstruction", "shards": "here"}
    tasks = {"image_reconstruction": 1}
    settings = {"sources": [source, {**source, **change}], "ratios": tasks, "budgets": tasks}
    assert message in refusal(settings, DataConfig)
    assert "budgets.image_reconstruction: must be a number" in refusal(
        {"sources": [source], "ratios": tasks, "budgets": {"image_reconstruction": True}}, DataConfig
    )


def test_every_margin_that_is_taken_leaves_normal_numbers() -> None:
    assert [FP8Config(fp8_margin=margin).fp8_margin for margin in (0, MOST_MARGIN)] == [0, MOST_MARGIN]
    e4m3 = torch.finfo(torch.float8_e4m3fn)
    assert e4m3.max / 2 ** (MOST_MARGIN + 1) < e4m3.tiny <= e4m3.max / 2**MOST_MARGIN


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
        ("a.yaml", b"steps: 6\nlog: {every: 1}\nsteps: 1\n", ": the key 'steps' stands twice, again in line 3"),
        ("a.yaml", b"log:\n  every: 1\n  'every': 2\n", ": the key 'every' stands twice, again in line 3"),
        ("a.json", b'{"log": {"every": 1, "a": 2, "every": 1}}', ": the key 'every' stands twice"),
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


def test_keys_may_come_again_elsewhere_and_replace_merged_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    # PyYAML puts what is merged beside a mapping's own keys.
    path.write_text("a: &a {x: 1, y: 1}\nb: &b\n  <<: *a\n  x: 2\nc: {<<: *b, x: 3}\nx: {1: 0, '1': 0}\n")
    assert read_mapping(path) == {
        "a": {"x": 1, "y": 1},
        "b": {"x": 2, "y": 1},
        "c": {"x": 3, "y": 1},
        "x": {1: 0, "1": 0},
    }
