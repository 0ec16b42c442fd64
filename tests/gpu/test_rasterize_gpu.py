"""The rasteriser on CUDA: our engine against itself on the CPU, gsplat against ours."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from tests.tokenizer.test_rasterize import cameras_of, draw, gradients, layers, random_scene, tracked
from tokenizer.gaussians.rasterize_gsplat import TOLERANCE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]

needs_gsplat = pytest.mark.skipif(importlib.util.find_spec("gsplat") is None, reason="the package gsplat is missing")


def on_device(scene: list[Tensor]) -> list[Tensor]:
    return tracked([tensor.to("cuda", torch.float32) for tensor in scene])


def test_torch_engine_agrees_with_the_cpu() -> None:
    scene = tracked(random_scene(400, 1))
    there = tracked([tensor.to("cuda") for tensor in scene])
    exact = layers(draw(scene, cameras_of(2), (40, 33)))
    ours = layers(draw(there, cameras_of(2), (40, 33), engine="torch"))
    torch.testing.assert_close(ours.cpu(), exact, rtol=0, atol=1e-10)
    for mine, theirs in zip(gradients(ours.cpu(), there), gradients(exact, scene), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=1e-9 * float(theirs.abs().max()))


@needs_gsplat
@pytest.mark.parametrize("sizes", [(4e-3, 1e-2), (3e-3, 0.1)])
def test_gsplat_agrees_with_the_torch_engine(sizes: tuple[float, float]) -> None:
    """Pictures at every pixel; gradients as a whole, as alphas near the cut fall on either side of it."""
    scene = random_scene(20_000, 2, sizes)
    ours, theirs = on_device(scene), on_device(scene)
    expected = draw(ours, cameras_of(3), (200, 256), background=(0.2, 0.5, 0.8), engine="torch")
    drawn = draw(theirs, cameras_of(3), (200, 256), background=(0.2, 0.5, 0.8), engine="auto")
    covered = expected.alpha > 0.5
    for pair in (
        (drawn.colours, expected.colours),
        (drawn.alpha, expected.alpha),
        (drawn.depth[covered], expected.depth[covered]),
    ):
        difference = (pair[0] - pair[1]).abs()
        assert float((difference > TOLERANCE).double().mean()) < 1e-3
        assert float(difference.max()) < 3 * TOLERANCE
    for mine, other in zip(gradients(expected.colours, ours), gradients(drawn.colours, theirs), strict=True):
        assert float((mine - other).norm() / mine.norm()) < 0.05


@needs_gsplat
def test_gsplat_draws_nothing_where_nothing_is() -> None:
    scene = [tensor[:0] for tensor in on_device(random_scene(1, 0))]
    picture = draw(scene, cameras_of(2), 16, background=(1.0, 0.5, 0.0), engine="gsplat")
    assert torch.equal(picture.colours[1, 3, 3].cpu(), torch.tensor([1.0, 0.5, 0.0]))
    assert not picture.alpha.any()
