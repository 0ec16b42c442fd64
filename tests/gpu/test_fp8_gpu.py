"""FP8 kernels on CUDA against the emulation: a layer at so400m's widths, and steps of a small network."""

from __future__ import annotations

import importlib.util
import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from benchmarks.fp8 import relative_error
from tests.tokenizer.fp8_networks import step, tiny_config, tiny_network
from tests.tokenizer.networks import visuals
from tokenizer.fp8 import FP8Config, convert
from tokenizer.fp8.choose import FIRST_CAPABILITY
from tokenizer.fp8.conversion import swap
from tokenizer.model.atoken import ATokenNetwork

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


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_a_network_trains_on_the_device(
    backend: Literal["torchao", "transformer_engine", "triton"], recipe: Literal["tensorwise", "delayed"]
) -> None:
    if (backend, recipe) == ("torchao", "delayed"):
        pytest.skip("torchao has no delayed scaling")
    network = tiny_network().cuda()
    conversion = convert(network, FP8Config(backend=backend, fp8_recipe=recipe), torch.device("cuda"))
    losses = []
    for _ in range(5):
        losses.append(half_step(network))
        conversion.synchronise()
    assert losses[-1] < losses[0]
    # A run that goes on from a checkpoint scales as this one does.
    again = copy_of(network)
    resumed = convert(again, FP8Config(backend=backend, fp8_recipe=recipe), torch.device("cuda"))
    resumed.load_state_dict(conversion.state_dict())
    assert half_step(again) == half_step(network)


def half_step(network: ATokenNetwork) -> float:
    """A step under an autocast of its own: one that goes on keeps the weights it rounded first."""
    with torch.autocast("cuda", torch.bfloat16):
        return step(network, 0)


def copy_of(network: ATokenNetwork) -> ATokenNetwork:
    copy = tiny_network().cuda()
    copy.load_state_dict(network.state_dict())
    return copy


@pytest.mark.parametrize("shapes", [((128, 96), (64, 72)), ((44, 52),)], ids=["whole", "padded"])
@pytest.mark.parametrize("width", [(1152, 4304, 16), (64, 96, 2)], ids=["so400m", "tiny"])
def test_fused_blocks_are_as_exact_as_the_emulation(
    width: tuple[int, int, int], shapes: tuple[tuple[int, int], ...]
) -> None:
    exact = gradients(None, width, shapes)
    errors = {}
    for kind, config in {
        "emulated": FP8Config(backend="emulated", fp8_recipe="delayed"),
        "triton": FP8Config(backend="triton", fp8_recipe="delayed"),
        "fast": FP8Config(backend="triton", fp8_recipe="delayed", fast_accumulation="all"),
    }.items():
        found = gradients(config, width, shapes)
        assert found.keys() == exact.keys()
        errors[kind] = {name: relative_error(found[name], exact[name].double()) for name in exact}
    means = {kind: sum(found.values()) / len(found) for kind, found in errors.items()}
    for kind in ("triton", "fast"):
        for name, error in errors[kind].items():
            # Which numbers fall between which steps is chance; what one gradient loses by it the next one wins.
            assert error < 2 * errors["emulated"][name] + 0.05, (kind, name)
        assert means[kind] < 1.2 * means["emulated"], kind


def gradients(
    config: FP8Config | None, width: tuple[int, int, int], shapes: tuple[tuple[int, int], ...]
) -> dict[str, Tensor]:
    """Of all parameters, after a step whose scales are remembered: float32 on the CPU, and "output"."""
    network = tiny_network(tiny_config(*width[:2], depth=2, heads=width[2])).cuda()
    conversion = convert(network, config, torch.device("cuda")) if config else None
    tokens = visuals(*shapes, seed=0, dtype=torch.float32).to(network.device)
    for _ in range(2):
        network.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=config is not None):
            output = network.decode(network.encode(tokens).latents).features.float()
        (output * torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output)).sum().backward()
        if conversion is not None:
            conversion.synchronise()
    found = {name: p.grad.float().cpu() for name, p in network.named_parameters() if p.grad is not None}
    return {"output": output.detach().cpu(), **found}


def test_what_is_not_finite_reaches_the_loss() -> None:
    network = tiny_network().cuda()
    conversion = convert(network, FP8Config(backend="triton", fp8_recipe="delayed"), torch.device("cuda"))
    assert math.isfinite(step(network, 0))
    conversion.synchronise()
    before = conversion.state_dict()
    with torch.no_grad():
        network.encoder.transformer.embed.bias[3] = torch.inf
    assert not math.isfinite(step(network, 0))
    conversion.synchronise()
    assert conversion.scales is not None
    assert torch.isfinite(conversion.scales.history).all(), "a broken step is not remembered"
    assert before.keys() == conversion.state_dict().keys()
