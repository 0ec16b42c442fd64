"""Intervals that hold what they promise, and records that count each sample once however a run was cut up."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tokenizer.errors import InputError
from tokenizer.evaluation.accumulate import Records, gather_records, gather_statistics, shard
from tokenizer.evaluation.bootstrap import bootstrap_mean, bootstrap_ratio
from tokenizer.evaluation.frechet import FeatureStatistics

ROOT = Path(__file__).parents[2]


def test_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(30, 4, 2000)
    found = bootstrap_mean(values, seed=1, resamples=4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.n == 2000
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap_mean(values, seed=1, resamples=4000) == found
    assert bootstrap_mean(values, seed=2, resamples=4000) != found


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    hits = []
    for seed in range(300):
        found = bootstrap_mean(rng.random(120) < 0.7, seed, level=0.9, resamples=300)
        assert found.low is not None
        assert found.high is not None
        hits.append(found.low <= 0.7 <= found.high)
    # 270 of 300 with a standard deviation of 5; percentile intervals of 120 samples are a little narrow.
    assert 0.83 < np.mean(hits) < 0.96


def test_ratio_is_that_of_sums_and_draws_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.array([100.0, 400.0, 50.0, 1000.0])
    # The ratio is the same in all samples, so it has no spread, although both sums have.
    constant = bootstrap_ratio(0.25 * pixels, pixels)
    assert (constant.value, constant.low, constant.high) == pytest.approx((0.25, 0.25, 0.25))
    bits = np.array([10.0, 200.0, 5.0, 100.0])
    found = bootstrap_ratio(bits, pixels, seed=4)
    assert found.value == pytest.approx(315 / 1550)
    assert found.low is not None
    assert found.high is not None
    assert 0.1 <= found.low < found.value < found.high <= 0.5
    # Drawn in many small pieces the interval is the same: the generator goes on where it was.
    monkeypatch.setattr("tokenizer.evaluation.bootstrap._CHUNK", 40)
    assert bootstrap_ratio(bits, pixels, seed=4) == found


def test_intervals_refuse_what_they_cannot_use() -> None:
    single = bootstrap_mean([3.0])
    assert (single.value, single.low, single.high, single.n) == (3.0, None, None, 1)
    with pytest.raises(InputError, match="one number for each sample"):
        bootstrap_mean([])
    with pytest.raises(InputError, match="finite numbers"):
        bootstrap_mean([1.0, float("nan")])
    with pytest.raises(InputError, match="positive denominators"):
        bootstrap_ratio([1.0, 1.0], [1.0, 0.0])


def test_records_count_each_sample_once() -> None:
    records = Records()
    assert records.add("b.png", {"psnr": 20.0, "ssim": 0.5})
    assert not records.add("b.png", {"psnr": 99.0})
    assert records.add("a.png", {"psnr": 30.0})
    records.leave_out("c.png", "not a picture")
    with pytest.raises(InputError, match=r"d\.png: psnr is inf"):
        records.add("d.png", {"psnr": float("inf")})
    assert "c.png" in records
    assert "d.png" not in records
    other = Records()
    other.add("c.png", {"psnr": 40.0})
    other.leave_out("a.png", "no memory")
    other.leave_out("e.png", "no memory")
    records.merge(other)
    summary = records.summary()
    assert summary.samples == 3
    assert summary.left_out == {"e.png": "no memory"}
    assert (summary.figures["psnr"].value, summary.figures["psnr"].n) == (30.0, 3)
    assert (summary.figures["ssim"].value, summary.figures["ssim"].n) == (0.5, 1)
    assert list(records.values("psnr")) == ["a.png", "b.png", "c.png"]


def test_records_come_back_from_json_to_the_last_bit() -> None:
    records = Records()
    for number, value in enumerate(np.random.default_rng(0).normal(size=50)):
        records.add(f"{number}", {"psnr": float(value)})
    records.leave_out("x", "broken")
    again = Records.from_state(json.loads(json.dumps(records.state())))
    assert again.summary(3) == records.summary(3)
    assert again.samples() == records.samples()
    for broken in ({}, {"figures": {"a": 3}, "left_out": {}}, {"figures": {"a": {"psnr": "x"}}, "left_out": {}}):
        with pytest.raises(InputError, match="delete it and start anew"):
            Records.from_state(broken)


SAMPLES = 41


def evaluate(rank: int, processes: int) -> tuple[Records, FeatureStatistics]:
    """Records and statistics of made-up samples. Records are given a sampler's padding: some samples come twice."""
    records, statistics = Records(), FeatureStatistics(6)
    rows = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for sample in shard(range(SAMPLES), rank, processes):
        statistics.update(rows[sample, None])
    padded = [*range(SAMPLES), *range(-SAMPLES % processes + processes)]
    for sample in padded[rank::processes]:
        if sample == 7:
            records.leave_out("7", "broken")
        else:
            records.add(f"{sample}", {"psnr": float(rows[sample, 0])})
    return gather_records(records), gather_statistics(statistics)


_OTHER = """
import sys
import torch.distributed as dist
from tests.tokenizer.test_bootstrap import evaluate

dist.init_process_group("gloo", init_method=sys.argv[1], rank=1, world_size=2)
evaluate(1, 2)
dist.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    records, statistics = evaluate(0, 1)
    assert len(records) == SAMPLES - 1
    meeting = f"file://{tmp_path}/rendezvous"
    other = subprocess.Popen([sys.executable, "-c", _OTHER, meeting], cwd=ROOT, stderr=subprocess.PIPE)
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=2, timeout=timedelta(seconds=120))
    try:
        together, sums = evaluate(0, 2)
    finally:
        dist.destroy_process_group()
    _, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors.decode()
    assert together.summary() == records.summary()
    assert sums.count == SAMPLES
    np.testing.assert_allclose(sums.mean, statistics.mean, rtol=1e-12)
    np.testing.assert_allclose(sums.covariance, statistics.covariance, rtol=1e-12)
