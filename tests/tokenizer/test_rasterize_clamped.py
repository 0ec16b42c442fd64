"""Gradients of the rasteriser where alphas are clamped: they have none there, and what lies elsewhere keeps its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tokenizer.test_rasterize import Scene, by_brute_force, cameras_of, draw, tracked


def opaque_middle(side: int) -> tuple[Scene, Tensor]:
    """A Gaussian of opacity 1 and standard deviation 3, and what its alphas would be without a clamp."""
    identity = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).double()
    colour = torch.tensor([[0.9, 0.4, 0.1]]).double()
    means, scales = torch.zeros(1, 3).double(), torch.full((1, 3), 3.0).double()
    scene = [means, scales, identity, torch.ones(1, 1).double(), colour]
    fainter = [*scene[:3], scene[3] * 0.9, colour]
    return scene, draw(fainter, cameras_of(1), side).alpha / 0.9


def alpha_sum(opacity: Tensor, scene: Scene, side: int) -> Tensor:
    return draw([*scene[:3], opacity, scene[4]], cameras_of(1), side).alpha.sum()


@pytest.mark.parametrize("side", [5, 32, 33])
def test_an_opacity_of_one_by_differences_and_by_brute_force(side: int) -> None:
    scene, alphas = opaque_middle(side)
    clamped = alphas > 0.999
    assert 0 < int(clamped.sum()) < clamped.numel()
    step = float((alphas - 0.999).abs().min()) / 4  # no pixel starts or ends to be clamped within it
    assert step > 1e-6
    opacity = scene[3].clone().requires_grad_()
    (found,) = torch.autograd.grad(alpha_sum(opacity, scene, side), opacity)
    more, less = (alpha_sum(scene[3] + sign * step, scene, side) for sign in (1, -1))
    assert float(found) == pytest.approx(float(more - less) / (2 * step), rel=1e-7)
    inputs = tracked(scene)
    exact = by_brute_force(inputs, cameras_of(1), (side, side), torch.zeros(3).double())[..., 4].sum()
    (expected,) = torch.autograd.grad(exact, inputs[3])
    assert float(found) == pytest.approx(float(expected), rel=1e-9)
    assert float(found) == pytest.approx(float(alphas[~clamped].sum()), rel=1e-9)


def test_gradcheck_with_a_clamped_pixel() -> None:
    """Two Gaussians, of which the nearer is opaque in the middle of the picture."""
    scene, _ = opaque_middle(5)
    behind = [scene[0] - 0.2, scene[1] * 0.2, scene[2], scene[3] * 0.5, scene[4].flip(1)]
    both = [torch.cat(pair) for pair in zip(scene, behind, strict=True)]

    def pictures(*inputs: Tensor) -> tuple[Tensor, ...]:
        picture = draw(list(inputs), cameras_of(1), 5)
        return picture.colours, picture.alpha, picture.depth

    assert float(pictures(*both)[1].max()) > 0.999
    assert torch.autograd.gradcheck(pictures, tracked(both), eps=1e-7, atol=1e-5)
