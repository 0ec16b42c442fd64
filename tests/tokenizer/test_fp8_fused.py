"""Fused FP8 blocks: their kernels in Triton's interpreter, and their scales. On CUDA: tests/gpu."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.fp8_passes import fastest, main
from tests.tokenizer.fp8_networks import tiny_network
from tokenizer.errors import InputError
from tokenizer.fp8 import FP8Config
from tokenizer.fp8.backends import fused_blocks
from tokenizer.fp8.fused.scales import BLOCK_LAYERS, TENSORS, Scales

CPU = torch.device("cpu")
DELAYED = FP8Config(fp8_recipe="delayed", fp8_amax_history_len=3, power_of_two_scales=False)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is missing")


@needs_triton
def test_fused_blocks_compute_what_plain_ones_do() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.tokenizer.fused_worker"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    changed = {f"{recipe}, weights changed" for recipe in ("tensorwise", "delayed")}
    assert not any(found.pop("computed again").values())
    assert found.keys() == {"tensorwise", "delayed", "without gradients", "fsdp2"} | changed
    for case, errors in found.items():
        worst = max(errors, key=errors.__getitem__)
        # bfloat16 rounds to 0.002 of a number, and some twenty roundings follow each other.
        assert errors[worst] < 0.05, (case, worst, errors[worst])
    # Without a history of their own both recipes are the same arithmetic.
    assert found["tensorwise"] == pytest.approx(found["delayed"], rel=0.2, abs=2e-3)


@needs_triton
def test_blocks_are_fused_whole_or_not_at_all() -> None:
    network = tiny_network()
    before = dict(network.named_parameters())
    names = [f"encoder.transformer.blocks.0.{layer}" for layer in BLOCK_LAYERS]
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.down stays bfloat16 .* set fp8\.backend=torchao"):
        fused_blocks(network, names[:-1], DELAYED, CPU)
    scales = fused_blocks(network, names, DELAYED, CPU)
    assert scales.history.shape == (TENSORS, 3)
    after = dict(network.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


class Pass:
    """A pass over a tensor: notes the scales it is called with, and reports a magnitude."""

    def __init__(self, magnitude: float) -> None:
        self.magnitude, self.scales = magnitude, list[float]()

    def __call__(self, scale: Tensor, largest: Tensor) -> None:
        self.scales.append(scale.item())
        torch.maximum(largest, torch.tensor(self.magnitude), out=largest)


def test_scales_follow_the_history() -> None:
    scales = Scales(DELAYED, ["block"], CPU)
    assert scales.names[0] == "block.attention.qkv.input"
    assert scales.names[-1] == "block.mlp.down.gradient"
    first = Pass(4.0)
    assert scales.rounded(0, first, remember=True).item() == pytest.approx(4.0 / 448)
    assert first.scales == [1.0, 112.0], "once for the magnitude, once for the numbers"
    # The second micro-batch of the step shares the first one's scale, and its magnitude counts later.
    second = Pass(7.0)
    assert scales.rounded(0, second, remember=True).item() == pytest.approx(4.0 / 448)
    assert second.scales == [112.0]
    step = scales.step
    scales.move_on()
    assert scales.step > step
    assert scales.history[0].tolist() == [7.0, 0.0, 0.0]
    assert not scales.history[1:].any(), "what no pass saw stays unknown"
    for magnitude in (1.0, 2.0, 3.0):
        later = Pass(magnitude)
        scales.rounded(0, later, remember=True)
        scales.move_on()
    assert later.scales == [64.0], "448 / 7, the largest of three steps"
    assert scales.history[0].tolist() == [3.0, 2.0, 1.0]
    looking = Pass(100.0)
    scales.rounded(0, looking, remember=False)
    scales.move_on()
    assert scales.history[0].tolist() == [3.0, 2.0, 1.0], "calls without gradients are not remembered"


def test_gradients_have_the_range_of_their_type() -> None:
    scales = Scales(replace(DELAYED, fp8_margin=1), ["block"], CPU)
    gradient = TENSORS // 2
    scales.rounded(gradient, Pass(2.0), remember=True)
    scales.move_on()
    later = Pass(2.0)
    scales.rounded(gradient, later, remember=True)
    assert later.scales == [57344 / 2 / 2], "E5M2's largest number, and a factor of two to spare"


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_broken_step_is_forgotten(broken: float) -> None:
    scales = Scales(DELAYED, ["block"], CPU)
    scales.rounded(0, Pass(2.0), remember=True)
    scales.move_on()
    scales.rounded(0, Pass(broken), remember=True)
    scales.move_on()
    assert scales.history[0].tolist() == [2.0, 0.0, 0.0]
    later = Pass(2.0)
    scales.rounded(0, later, remember=True)
    assert later.scales == [224.0]
    # What was broken at first is as unknown as before.
    scales.rounded(1, Pass(broken), remember=True)
    scales.move_on()
    first = Pass(2.0)
    scales.rounded(1, first, remember=True)
    assert first.scales == [1.0, 224.0]


def test_scales_are_powers_of_two_unless_told_otherwise() -> None:
    for recipe, seen in (("delayed", [64.0]), ("tensorwise", [1.0, 32.0])):
        scales = Scales(FP8Config(fp8_recipe=recipe), ["block"], CPU)  # type: ignore[arg-type]
        first, second = Pass(5.0), Pass(9.0)
        assert scales.rounded(0, first, remember=True).item() == 1 / 64, "448 / 5 is 89.6"
        assert first.scales == [1.0, 64.0]
        scales.move_on()
        scales.rounded(0, second, remember=True)
        assert second.scales == seen
        assert scales.scale_for(torch.tensor([3.0, 0.0]), 448.0).tolist() == [128.0, 1.0]


def test_tensorwise_scales_by_the_tensor_alone() -> None:
    scales = Scales(FP8Config(power_of_two_scales=False), ["block"], CPU)
    for magnitude in (2.0, 8.0):
        own = Pass(magnitude)
        assert scales.rounded(0, own, remember=True).item() == pytest.approx(magnitude / 448)
        assert own.scales == [1.0, 448 / magnitude]
        scales.move_on()
    assert not scales.history.any()


def test_histories_go_on_from_a_checkpoint() -> None:
    scales, resumed = (Scales(DELAYED, ["a", "b"], CPU) for _ in range(2))
    for magnitude in (2.0, 5.0):
        scales.rounded(3, Pass(magnitude), remember=True)
        scales.move_on()
    resumed.load_state_dict(scales.state_dict())
    passes = Pass(1.0), Pass(1.0)
    for each, one in zip((scales, resumed), passes, strict=True):
        each.rounded(3, one, remember=True)
    assert passes[0].scales == passes[1].scales == [pytest.approx(448 / 5)]
    with pytest.raises(InputError, match=r"do not fit \(b\.attention\.out\.gradient\)"):
        Scales(DELAYED, ["a"], CPU).load_state_dict(scales.state_dict())
    with pytest.raises(InputError, match="fp8_amax_history_len"):
        Scales(FP8Config(fp8_recipe="delayed"), ["a", "b"], CPU).load_state_dict(scales.state_dict())


def test_tiles_are_ranked_by_all_that_runs_with_them(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = {"tile": "cast", "ROWS": 64}, {"tile": "cast", "ROWS": 128}
    records = [first | {"ms": 2.0}, second | {"ms": 1.0}, first | {"ms": 1.0}, second | {"ms": 1.5}]
    assert fastest(records) == [second | {"ms": 2.5}, first | {"ms": 3.0}]
    assert main(["--device", "cpu"]) == 1
    assert "needs CUDA" in capsys.readouterr().err
