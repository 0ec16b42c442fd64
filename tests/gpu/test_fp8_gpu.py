"""FP8 kernels on CUDA against the emulation: a layer at so400m's widths, and steps of a small network."""

from __future__ import annotations

import importlib.util
from typing import Literal

import pytest
import torch
from torch import nn

from benchmarks.fp8 import relative_error
from tests.tokenizer.fp8_networks import step, tiny_network
from tokenizer.fp8 import FP8Config, convert
from tokenizer.fp8.choose import FIRST_CAPABILITY
from tokenizer.fp8.conversion import swap

_HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= FIRST_CAPABILITY
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _HAS_FP8, reason="needs a CUDA device with FP8, and this machine has none"),
]

Kernels = Literal["torchao", "transformer_engine"]
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is missing"))
    for name in ("torchao", "transformer_engine")
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [64, 37])
def test_kernels_compute_what_the_emulation_does(backend: Kernels, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(1152, 4304)
    linear.weight = nn.Parameter(torch.randn(4304, 1152, generator=generator) * 1152**-0.5)
    linear = linear.cuda()
    data = torch.randn(rows, 1152, generator=generator).cuda().bfloat16()
    gradient = torch.randn(rows, 4304, generator=generator).cuda().bfloat16()
    results = []
    for name in ("emulated", backend):
        model = nn.Sequential(linear)
        swap(model, ["0"], [model], name, FP8Config())
        linear.zero_grad()
        x = data.clone().requires_grad_(True)
        with torch.autocast("cuda", torch.bfloat16):
            y = model(x)
        y.backward(gradient)
        assert x.grad is not None
        assert linear.weight.grad is not None
        results.append((y.detach(), x.grad, linear.weight.grad.clone()))
    for mine, theirs in zip(*results, strict=True):
        # Outputs are bfloat16, and fast accumulation keeps about 14 bits; FP8's own error would be 0.04 or more.
        assert relative_error(theirs.cpu(), mine.cpu().double()) < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_network_trains_on_the_device(backend: Kernels) -> None:
    network = tiny_network().cuda()
    convert(network, FP8Config(backend=backend), torch.device("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        losses = [step(network, 0) for _ in range(5)]
    assert losses[-1] < losses[0]
