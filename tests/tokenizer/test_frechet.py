"""Fréchet distance against closed forms and scipy, and statistics that do not depend on how samples arrive."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg  # type: ignore[import-untyped]
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.evaluation.frechet import FeatureStatistics, frechet_distance


def statistics(features: Tensor, batch: int = 64) -> FeatureStatistics:
    result = FeatureStatistics(features.shape[1])
    for rows in features.split(batch):
        result.update(rows)
    return result


def gaussian(count: int, width: int, seed: int, rank: int | None = None) -> Tensor:
    """Correlated samples with a mean, all in a space of `rank` dimensions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, rank or width, generator=generator, dtype=torch.float64) @ mixing + seed


def exact_samples(mean: Tensor, root: Tensor, count: int) -> Tensor:
    """Samples whose mean and unbiased covariance are exactly `mean` and root' root, up to rounding."""
    generator = torch.Generator().manual_seed(count)
    white = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    orthogonal, _ = torch.linalg.qr(white - white.mean(dim=0))
    samples: Tensor = orthogonal * math.sqrt(count - 1) @ root + mean
    return samples


def scipy_distance(a: Tensor, b: Tensor) -> float:
    """The textbook formula with a general matrix root."""
    x, y = a.numpy(), b.numpy()
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second)
    means = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(means + np.trace(first) + np.trace(second) - 2 * np.trace(root).real)


def test_distance_of_diagonal_and_rotated_gaussians_is_the_closed_form() -> None:
    width = 6
    one, two = torch.arange(1.0, 7, dtype=torch.float64), torch.tensor([3.0, 1, 4, 1, 5, 9], dtype=torch.float64)
    mean = torch.linspace(-1, 1, width, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(gaussian(width, width, 3))
    # Covariances that commute: the roots subtract. A rotation of both sides changes nothing.
    expected = float(mean.square().sum() + (one - two).square().sum())
    for turn in (torch.eye(width, dtype=torch.float64), rotation):
        a = exact_samples(mean @ turn, torch.diag(one) @ turn, 40)
        b = exact_samples(0 * mean, torch.diag(two) @ turn, 50)
        found = frechet_distance(statistics(a), statistics(b))
        assert found.value == pytest.approx(expected, rel=1e-12)
        assert found.from_means == pytest.approx(float(mean.square().sum()), rel=1e-12)
        assert found.samples == (40, 50)
        assert found.warning is None


def test_distance_of_gaussians_that_do_not_commute_is_the_closed_form() -> None:
    # In two dimensions tr (AB)^(1/2) = (tr AB + 2 (det A det B)^(1/2))^(1/2).
    root_a = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    root_b = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    a, b = root_a.T @ root_a, root_b.T @ root_b
    root_trace = (a @ b).trace() + 2 * (a.det() * b.det()).sqrt()
    expected = float(a.trace() + b.trace() - 2 * root_trace.sqrt())
    zero = torch.zeros(2, dtype=torch.float64)
    found = frechet_distance(statistics(exact_samples(zero, root_a, 30)), statistics(exact_samples(zero, root_b, 31)))
    assert found.value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("samples", "others"), [(200, 150), (200, 30), (33, 200)])
def test_distance_equals_that_of_scipy(samples: int, others: int) -> None:
    a, b = gaussian(samples, 32, 1), gaussian(others, 32, 2)
    found = frechet_distance(statistics(a), statistics(b))
    # scipy's root of a singular product is good to the root of the rounding error.
    assert found.value == pytest.approx(scipy_distance(a, b), rel=1e-9 if others > 32 else 1e-6)
    assert (found.warning is not None) == (others < 32)


def test_fewer_samples_than_features_are_exact_and_warned_about() -> None:
    # Samples in a space of 12 dimensions and again turned into 40: the distance is the same, but singular there.
    a, b = gaussian(20, 12, 1), gaussian(17, 12, 2)
    turn, _ = torch.linalg.qr(gaussian(40, 40, 3))
    plain = frechet_distance(statistics(a), statistics(b))
    turned = frechet_distance(statistics(a @ turn[:12]), statistics(b @ turn[:12]))
    assert plain.warning is None
    assert turned.value == pytest.approx(plain.value, rel=1e-12)
    assert turned.warning is not None
    assert turned.warning.startswith("20 and 17 samples for 40 features: covariances are singular")
    # Many samples, and the space is still singular: the eigenvalues that are zero do no harm.
    many, others = gaussian(90, 12, 1), gaussian(80, 12, 2)
    plain = frechet_distance(statistics(many), statistics(others))
    turned = frechet_distance(statistics(many @ turn[:12]), statistics(others @ turn[:12]))
    assert turned.value == pytest.approx(plain.value, rel=1e-7)
    assert frechet_distance(statistics(a), statistics(a)).value == pytest.approx(0, abs=1e-11)
    assert frechet_distance(statistics(many), statistics(many)).value == pytest.approx(0, abs=1e-10)


@settings(max_examples=20, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 120), min_size=1, max_size=6),
    merged=st.integers(0, 120),
    seed=st.integers(0, 9),
    offset=st.sampled_from((0.0, 1e4)),
)
def test_statistics_do_not_depend_on_batches_order_or_processes(
    cuts: list[int], merged: int, seed: int, offset: float
) -> None:
    features = gaussian(120, 16, seed) + offset
    whole = statistics(features, 120)
    np.testing.assert_allclose(whole.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-9, atol=1e-9)
    batched = FeatureStatistics(16)
    edges = sorted({0, 120, *cuts})
    for start, end in itertools.pairwise(edges):
        batched.update(features[start:end])
    assert torch.equal(batched.covariance, whole.covariance)
    shuffled = features[torch.randperm(120, generator=torch.Generator().manual_seed(seed))]
    parts = statistics(shuffled[:merged], 7), statistics(shuffled[merged:], 50)
    state = parts[1].state()
    parts[0].merge(FeatureStatistics.from_state(state))
    assert parts[0].count == 120
    np.testing.assert_allclose(parts[0].mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(parts[0].covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, parts[1].state()[name]) for name, value in state.items())


def test_resumed_statistics_are_the_same_to_the_last_bit() -> None:
    features = gaussian(100, 16, 5).float()
    through = statistics(features, 9)
    first = FeatureStatistics.from_state(statistics(features[:45], 9).state())
    for rows in features[45:].split(11):
        first.update(rows)
    assert torch.equal(first.covariance, through.covariance)
    assert frechet_distance(first, through).samples == (100, 100)


def test_what_has_no_distance_is_refused() -> None:
    one = statistics(gaussian(1, 4, 0))
    with pytest.raises(InputError, match="at least two samples on either side, not 1 and 5"):
        frechet_distance(one, statistics(gaussian(5, 4, 0)))
    with pytest.raises(InputError, match="features of one network, not 4 and 5"):
        frechet_distance(one, statistics(gaussian(5, 5, 0)))
    with pytest.raises(InputError, match="not finite"):
        one.update(torch.tensor([[0, math.nan, 0, 0]]))
    assert one.count == 1
    with pytest.raises(InputError, match=r"take \[B, 4\], not \[3, 5\]"):
        one.update(torch.zeros(3, 5))
    with pytest.raises(InputError, match="'rows' is missing"):
        FeatureStatistics.from_state({"count": torch.tensor(0), "mean": torch.zeros(4)})
