"""What small models are trained with: codes linked with the transformers, codes that grow, Muon, the plateau, PSNR."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.tokenizer.networks import small_config, visuals
from tokenizer.errors import InputError
from tokenizer.losses.psnr import psnr
from tokenizer.model import piecewise
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import FSQConfig, SkipConfig
from tokenizer.training.curriculum.config import OptimizerSettings
from tokenizer.training.curriculum.optimization import make_optimizers, rate_at
from tokenizer.training.curriculum.stages import grown, quantised, refit_codes
from tokenizer.training.initialise import link_codes, start_from_linear_codes
from tokenizer.training.muon import Muon, orthogonalised

FRAME, PATCH = 48, 192
SKIP = SkipConfig(still_codes=3, clip_codes=2, linked=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_patches(places: int, features: int, seed: int) -> Tensor:
    """[places, 4, features] of low rank and a little noise, so that codes have something to find."""
    basis = torch.randn(20, features, generator=generator(9)) * 0.8 ** torch.arange(20)[:, None]
    mixed = torch.randn(places, 4, 20, generator=generator(seed)) @ basis
    return 0.2 * mixed + 0.01 * torch.randn(mixed.shape, generator=generator(seed + 1))


def started(channels: int = 12) -> ATokenNetwork:
    network = ATokenNetwork(replace(small_config(), latent_channels=channels, skip=SKIP))
    network.reset_parameters(generator())
    stills, clips = smooth_patches(80, FRAME, 1), smooth_patches(80, PATCH, 3)
    start_from_linear_codes(network, stills, clips, 4, generator(2))
    network.double().eval().requires_grad_(False)
    link_codes(network)  # once more, in double precision
    return network


def latents_of(network: ATokenNetwork, seed: int = 4) -> Tensor:
    """Latents [20, C] that name codes of both sorts, with digits that FSQ would give to a discrete network."""
    skip = network.skip
    assert skip is not None
    latents = torch.randn(20, network.config.latent_channels, generator=generator(seed), dtype=torch.float64)
    if skip.in_digits:
        latents = torch.randint(-2, 2, latents.shape, generator=generator(seed)).double() / 2
    number = torch.arange(20) % skip.total
    for place in range(skip.digits):
        latents[:, place] = skip.read_levels.double()[number // piecewise.BASE**place % piecewise.BASE]
    return latents


@pytest.mark.parametrize("discrete", [False, True])
def test_a_linked_decoder_reads_reconstructions_and_not_coefficients(discrete: bool) -> None:
    """Whatever code a token has, and whether coefficients are numbers or digits, the same patch reads the same."""
    network = started()
    components = network.decoder.to_patches.weight  # type: ignore[union-attr]
    if discrete:
        network = quantised(network, FSQConfig(codebook_size=4096, codebooks=2))
    skip = network.skip
    assert skip is not None
    latents = latents_of(network)
    read, decoded = skip.read(latents), skip.decode(latents)
    assert read is not None
    whitened = components / components.square().sum(dim=0)
    still = torch.arange(20) % skip.total < len(skip.stills.mean)
    for rows in (still, ~still):
        difference = read[rows] - decoded[rows] @ whitened  # the mean of all codes of a sort is left out
        torch.testing.assert_close(difference, difference[:1].expand_as(difference), rtol=0, atol=1e-9)


def test_what_the_encoder_writes_changes_the_patch_before_it_is_coded() -> None:
    network = started()
    skip = network.skip
    assert skip is not None
    assert skip.links is not None
    patches = torch.cat(
        [smooth_patches(10, PATCH, 6).flatten(0, 1), smooth_patches(10, PATCH, 7).flatten(0, 1)]
    ).double()
    patches[:40, FRAME:] = 0
    with torch.no_grad():
        skip.links.correct.weight.copy_(torch.eye(32, dtype=torch.float64))
    features = 0.1 * torch.randn(80, 32, generator=generator(8), dtype=torch.float64)
    silent = patches.new_zeros(80, 24)
    before = skip.add_to_parameters(silent, patches)[:, :12]
    after = skip.add_to_parameters(silent, patches, features)[:, :12]
    assert torch.equal(after[:, : skip.digits], before[:, : skip.digits])
    assert network.decoder is not None
    changed = patches + features @ network.decoder.to_patches.weight.T
    for row in range(80):
        codes = skip.stills if row < 40 else skip.clips
        number = int(codes(patches[row : row + 1, : codes.mean.shape[1]])[1])
        wanted = codes.encoder[number] @ (changed[row, : codes.mean.shape[1]] - codes.mean[number])
        torch.testing.assert_close(after[row, skip.digits :], wanted, rtol=0, atol=1e-9)


def test_stills_and_clips_apart_are_what_they_are_together(monkeypatch: pytest.MonkeyPatch) -> None:
    network = started()
    tokens = visuals((8, 12), (8, 4, 8), (4, 4))
    apart = network.encode(tokens)
    decoded = network.decode(apart.latents).features
    monkeypatch.setattr(piecewise, "_apart", lambda _: None)  # as on a device
    together = network.encode(tokens)
    torch.testing.assert_close(together.posterior.parameters.features, apart.posterior.parameters.features)
    torch.testing.assert_close(network.decode(apart.latents).features, decoded)


def test_codes_fitted_anew_use_all_channels_and_leave_the_transformers_what_they_were() -> None:
    network = started(8)
    stills, clips = smooth_patches(120, FRAME, 1), smooth_patches(120, PATCH, 3)
    wider = grown(network.float(), 12, generator())
    refit_codes(wider, stills, clips, 4, generator(5))
    wider.double().requires_grad_(False)
    for old, new in zip(network.double().transformers(), wider.transformers(), strict=True):
        for name, parameter in old.blocks.named_parameters():
            assert torch.equal(parameter, new.blocks.get_parameter(name))
    old_skip, skip = network.skip, wider.skip
    assert old_skip is not None
    assert skip is not None
    whole = torch.nn.functional.pad(stills.flatten(0, 1).double(), (0, PATCH - FRAME))
    before = old_skip.add_to_parameters(whole.new_zeros(len(whole), 16), whole)[:, :8]
    after = skip.add_to_parameters(whole.new_zeros(len(whole), 24), whole)[:, :12]
    errors = [(codes.decode(z) - whole).square().mean() for codes, z in ((old_skip, before), (skip, after))]
    assert float(errors[1]) < 0.5 * float(errors[0])
    # A patch reads as it did, as far as its old reconstruction went.
    read, old_read = skip.read(after), old_skip.read(before)
    assert read is not None
    assert old_read is not None
    likeness = torch.nn.functional.cosine_similarity(read - read.mean(0), old_read - old_read.mean(0))
    assert float(likeness.mean()) > 0.7
    with pytest.raises(InputError, match="no linked codes"):
        refit_codes(ATokenNetwork(small_config()), stills, clips, 4, generator(5))


def test_muon_steps_have_singular_values_of_about_one() -> None:
    for shape in ((3, 24, 40), (2, 40, 24)):
        gradient = torch.randn(shape, generator=generator(1))
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        made = orthogonalised(gradient)
        values = torch.linalg.svdvals(made)
        assert float(values.min()) > 0.5
        assert float(values.max()) < 1.3
        cosine = torch.nn.functional.cosine_similarity(made.flatten(1), (left @ right).flatten(1))
        assert float(cosine.min()) > 0.97


def test_muon_is_its_formula() -> None:
    weight = nn.Parameter(torch.randn(16, 8, generator=generator(2)))
    wanted, momentum = weight.detach().clone(), torch.zeros(16, 8)
    optimizer = Muon([{"params": [weight], "lr": 0.01, "weight_decay": 0.1}], lr=1.0)
    for seed in range(3):
        gradient = torch.randn(16, 8, generator=generator(10 + seed))
        momentum = 0.95 * momentum + 0.05 * gradient
        update = gradient + 0.95 * (momentum - gradient)
        wanted = 0.999 * wanted - 0.01 * 0.2 * 4 * orthogonalised(update[None])[0]
        weight.grad = gradient
        optimizer.step()
    torch.testing.assert_close(weight.detach(), wanted)


def test_muon_takes_the_matrices_of_blocks_and_nothing_else() -> None:
    model = nn.Module()
    model.network = ATokenNetwork(replace(small_config(), skip=SKIP))
    adamw, muon = make_optimizers(model, OptimizerSettings(lr=1e-3, muon_lr=2e-3, plain_lr=5e-3, encoder_lr_factor=0.5))
    names = {parameter: name for name, parameter in model.named_parameters()}
    theirs = {names[p] for group in muon.param_groups for p in group["params"]}
    assert theirs
    assert all(".blocks." in name and name.endswith("weight") for name in theirs)
    factors = {group["name"]: group["factor"] for group in muon.param_groups}
    assert factors == {"encoder matrices": 1.0, "rest matrices": 2.0}
    assert theirs | {names[p] for group in adamw.param_groups for p in group["params"]} == set(names.values())
    plain = {g["name"]: g["factor"] for g in adamw.param_groups if g["weight_decay"] == 0 and g["name"] != "codes"}
    assert plain == {"encoder": 2.5, "rest": 5.0}


def test_a_plateau_falls_at_the_end_alone() -> None:
    settings = OptimizerSettings(lr=1.0, min_lr=0.1, warmup=10, schedule="plateau", decay_fraction=0.25)
    rates = [rate_at(step, 100, settings) for step in range(100)]
    assert rates[4] == 0.5
    assert rates[9:75] == [1.0] * 66
    assert rates[99] == pytest.approx(0.1)
    assert rates[75] == pytest.approx(1 - 0.9 * math.sqrt(1 / 25))
    assert all(a > b for a, b in itertools.pairwise(rates[74:]))


def test_psnr_of_each_item() -> None:
    target = torch.zeros(5, 6)
    decoded = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.0])[:, None].repeat(1, 6)
    decoded[:, 4:] = 9.0  # does not exist
    found = psnr(decoded, target, torch.tensor([2, 2, 1]), existing=4)
    wanted = [10 * math.log10(4 / (error + 4e-6)) for error in (0.05, 0.04, 0.0)]
    torch.testing.assert_close(found, torch.tensor(wanted))
    with pytest.raises(InputError, match=r"\[5, 6\] and \[4, 6\]"):
        psnr(decoded, target[:4], torch.tensor([5]))
