"""Operations are counted right, and the benchmark of training divides the right numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.training
from benchmarks.training import main
from benchmarks.training_parts.batches import make_step, pictures_within
from benchmarks.training_parts.measure import figures, groups_of, tokens_for
from benchmarks.training_parts.subjects import Setting, Times, make_model
from tests.tokenizer.networks import small_config
from tokenizer.errors import InputError
from tokenizer.model import piecewise
from tokenizer.model.config import CONFIGS, SkipConfig
from tokenizer.model.plan import item_segments
from tokenizer.training.curriculum.flops import Count, Work
from tokenizer.training.curriculum.tasks import TASKS, is_understanding

CPU = torch.device("cpu")


def counted(call: Any) -> int:
    """Operations of matrix products as torch counts them; only its plain attention is counted backwards too."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("task", TASKS)
def test_work_is_what_torch_counts(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Codes that are drawn at random call tokens clips that are none: here all tokens are put through all codes.
    monkeypatch.setattr(piecewise, "_apart", lambda _: None)
    sizes = replace(small_config(), skip=SkipConfig(still_codes=3, clip_codes=2, linked=True, consistent=True))
    model = make_model(Setting(sizes, task, 300, 1, CPU))
    tokens = make_step(task, 300, 1, sizes, CPU, resolution=32)[0].tokens
    encoder, codes = model.network.encoder, model.network.skip
    assert codes is not None

    def step() -> None:
        outputs = model(tokens, task, torch.Generator().manual_seed(0))
        torch.stack([output.sum() for output in outputs.values()]).sum().backward()

    # What reconstructs is pooled as well, whether a loss reads it or not; what is not read has no backward pass.
    # Products of the codes with themselves do not grow with the tokens; they are left out as well.
    left_out = 0
    if not is_understanding(task):
        features = torch.zeros(tokens.num_tokens, sizes.encoder.width)
        left_out = counted(lambda: encoder.pool(features, item_segments(tokens), tokens.batch_size))
        for kind in (codes.stills, codes.clips):
            number, channels, inputs = kind.decoder.shape
            left_out += 2 * number * channels**2 * inputs
    assert counted(step) - left_out == Work(model).of(tokens, task)


def test_a_stack_without_blocks_is_a_closed_form() -> None:
    config = small_config()
    stacks = {"encoder": config.encoder, "decoder": config.decoder}
    plain = {
        name: replace(stack, depth=0, learned_positions=False, rotary=False)
        for name, stack in stacks.items()
        if stack is not None
    }
    sizes = replace(config, **plain)  # type: ignore[arg-type]
    setting = Setting(sizes, "image_reconstruction", 320, 1, CPU)
    tokens = make_step(setting.task, setting.tokens, 1, sizes, CPU)[0].tokens
    patch, width, latent = sizes.patch_features, sizes.encoder.width, sizes.latent_channels
    # Pixels need no gradient, so the first layer has two products where the others have three.
    a_token = 2 * patch * width + 3 * (width * 2 * latent + latent * width + width * patch)
    assert Work(make_model(setting)).count(tokens, setting.task) == Count(2.0 * 320 * a_token, 0.0)


def test_figures_divide_the_right_numbers() -> None:
    # 300 operations with weights and 100 of attention in 2 + 2 seconds, on a machine that does 200 a second.
    found = figures(Times(2.0, 2.0), Count(300.0, 100.0), 10, 200.0)
    assert (found["ratio"], found["ratio without attention"], found["ratio of passes"]) == (0.5, 0.375, 1.0)
    assert (found["tokens/s"], found["seconds"], found["passes seconds"], found["update seconds"]) == (
        2.5,
        4.0,
        2.0,
        2.0,
    )


def test_so_many_tokens_reach_the_goal() -> None:
    times, work, tokens = Times(2.0, 2.0), Count(300.0, 100.0), 10
    needed = tokens_for(0.7, times, work, tokens, 200.0)
    assert needed is not None
    for count, reached in ((needed - 1, False), (needed, True)):
        scale = count / tokens
        assert (scale * work.total / (scale * times.passes + times.update) / 200.0 >= 0.7) == reached
    assert tokens_for(0.7, Times(3.0, 0.1), work, tokens, 200.0) is None


def test_budgets_are_filled_and_groups_hold_what_is_compared() -> None:
    assert sum(rows * columns for rows, columns in pictures_within(2048)) == 2048
    assert pictures_within(15) == []
    (alike,) = make_step("image_reconstruction", 1000, 1, small_config(), CPU, alike=True)
    assert alike.tokens.lengths.tolist() == [256] * 3
    assert groups_of(["native", "megatron"], "bf16", fp8=["native"]) == [
        [("native", "bf16"), ("native", "fp8")],
        [("native", "bf16"), ("megatron", "bf16")],
    ]
    assert groups_of(["native"], "fp32", fp8=[]) == [[("native", "fp32")]]


def test_the_command_measures_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(transformer_engine: bool = False) -> None:
        raise InputError(f"no Megatron here, {transformer_engine}")

    monkeypatch.setitem(CONFIGS, "nano", small_config())
    monkeypatch.setattr(benchmarks.training, "load_megatron", missing)
    out = tmp_path / "training.json"
    arguments = ["--device", "cpu", "--model", "nano", "--tokens", "64", "--steps", "1", "--depth", "1"]
    assert main([*arguments, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "the native engine alone: no Megatron here" in said
    assert "with 1 blocks" in said
    (record,) = json.loads(out.read_text(encoding="utf-8"))["records"]
    work, seconds = record["GFLOP"], record["passes seconds"] + record["update seconds"]
    assert record["seconds"] == pytest.approx(seconds)
    assert record["ratio"] == pytest.approx(work / seconds / record["matrix GFLOP/s"])
    assert record["tokens"] == 64
    assert record["beside the first"] == 1.0

    assert main([*arguments, "--engines", "megatron"]) == 1
    assert main([*arguments, "--fp8"]) == 1
    assert main([*arguments, "--task", "video_understanding"]) == 1
    assert main([*arguments, "--attention", "cudnn"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in errors] == ["error"] * 4
    assert "hold not one visual" in errors[2]
    assert "add --alike" in errors[3]
