"""The piecewise linear code: the best code by brute force, digits that survive noise and FSQ, who may change what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tokenizer.networks import small_config, visuals
from tokenizer.model import piecewise
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import FSQConfig, RefinerConfig, SkipConfig
from tokenizer.model.digits import LEVEL_VALUES, MIDDLE, code_in_digits
from tokenizer.model.piecewise import LEVELS, LinearCodes, PiecewiseLinearCode
from tokenizer.quantizers import make_quantizer

FRAME, PATCH, CHANNELS, STILLS, CLIPS = 48, 192, 12, 12, 5
DIGITS = 3  # 17 codes in base 4


def random_codes(codes: LinearCodes, generator: torch.Generator, *, linked: bool) -> None:
    """Codes with a spread of strengths; `linked` ones decode as well as linear codes can."""
    count, channels, features = codes.encoder.shape
    spreads = torch.logspace(0.5, -1.5, channels)
    with torch.no_grad():
        for k in range(count):
            basis = torch.linalg.qr(torch.randn(features, channels, generator=generator)).Q.T
            codes.encoder[k] = basis / spreads[:, None]
            codes.decoder[k] = basis * spreads[:, None]
        if not linked:
            codes.decoder.add_(0.05 * torch.randn(codes.decoder.shape, generator=generator))
        codes.mean.copy_(0.2 * torch.randn(codes.mean.shape, generator=generator))


def random_skip(
    *, in_digits: bool = False, linked: bool = True, consistent: bool = False, seed: int = 0
) -> PiecewiseLinearCode:
    skip = PiecewiseLinearCode(FRAME, PATCH, CHANNELS, STILLS, CLIPS, in_digits=in_digits, consistent=consistent)
    generator = torch.Generator().manual_seed(seed)
    for codes in (skip.stills, skip.clips):
        random_codes(codes, generator, linked=linked)
    return skip.double().requires_grad_(False)


def patches(count: int = 300) -> Tensor:
    """Patches [count, P], the first half of them stills, clearly nearer to some codes than to others."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(count, PATCH, generator=generator, dtype=torch.float64) * 0.4
    x[: count // 2, FRAME:] = 0
    return x


def encode(skip: PiecewiseLinearCode, x: Tensor) -> Tensor:
    """Latents [N, C] with nothing from the encoder."""
    return skip.add_to_parameters(x.new_zeros(len(x), 2 * CHANNELS), x).chunk(2, dim=1)[0]


def errors_of_every_code(codes: LinearCodes, x: Tensor) -> Tensor:
    """[N, K] squared errors, each reconstruction built in full."""
    every = []
    for encoder, decoder, mean in zip(codes.encoder, codes.decoder, codes.mean, strict=True):
        every.append(((x - mean) @ encoder.T @ decoder + mean - x).square().sum(dim=1))
    return torch.stack(every, dim=1)


@pytest.mark.parametrize("linked", [True, False])
def test_the_code_with_the_least_error_is_chosen(linked: bool) -> None:
    skip, x = random_skip(linked=linked), patches()
    half = len(x) // 2
    error = (skip.decode(encode(skip, x)) - x).square().sum(dim=1)
    stills = errors_of_every_code(skip.stills, x[:half, :FRAME])
    clips = errors_of_every_code(skip.clips, x[half:])
    assert len(stills.argmin(dim=1).unique()) > 8
    assert len(clips.argmin(dim=1).unique()) == CLIPS
    torch.testing.assert_close(error, torch.cat([stills.amin(dim=1), clips.amin(dim=1)]))


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_half_precision_chooses_the_same_codes(how: str) -> None:
    """Bright patches with little contrast: their squares, as half precision knows them, would hide the errors."""
    skip, x = random_skip().float(), (0.8 + 0.1 * patches()).to(torch.bfloat16).float()
    for codes in (skip.stills, skip.clips):
        codes.mean.copy_(0.8 + 0.02 * codes.mean)
        for parameter in (codes.encoder, codes.decoder, codes.mean):
            parameter.copy_(parameter.to(torch.bfloat16))
    exact = skip.stills(x[:, :FRAME])[1], skip.clips(x)[1]
    assert all(len(numbers.unique()) >= CLIPS for numbers in exact)
    if how == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = skip.stills(x[:, :FRAME])[1], skip.clips(x)[1]
    else:
        half = skip.to(torch.bfloat16)
        found = half.stills(x[:, :FRAME].to(torch.bfloat16))[1], half.clips(x.to(torch.bfloat16))[1]
    assert all(torch.equal(one, other) for one, other in zip(exact, found, strict=True))


def test_a_still_says_nothing_about_later_frames() -> None:
    skip, x = random_skip(), patches()
    decoded = skip.decode(encode(skip, x))
    assert bool((decoded[: len(x) // 2, FRAME:] == 0).all())
    assert bool((decoded[len(x) // 2 :, FRAME:] != 0).any(dim=1).all())


@pytest.mark.parametrize("in_digits", [False, True])
def test_noise_on_the_digits_changes_no_choice(in_digits: bool) -> None:
    skip, x = random_skip(in_digits=in_digits), patches()
    latents = encode(skip, x)
    if in_digits:
        latents = make_quantizer(FSQConfig(codebooks=2), CHANNELS).quantize(latents).values
    noise = torch.zeros_like(latents)
    noise[:, :DIGITS] = 0.05 * torch.randn(len(x), DIGITS, generator=torch.Generator().manual_seed(2)).double()
    assert torch.equal(skip.decode(latents + noise), skip.decode(latents))


def test_every_number_survives_quantisation() -> None:
    """FSQ keeps each digit apart, and the reader finds the number in what it leaves."""
    quantizer = make_quantizer(FSQConfig(codebooks=2), CHANNELS)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    values = quantizer.quantize(levels[:, None].expand(-1, CHANNELS)).values
    assert torch.equal(values, torch.tensor(LEVEL_VALUES, dtype=torch.float64)[:, None].expand(-1, CHANNELS))
    skip = random_skip(in_digits=True)
    numbers = torch.arange(STILLS + CLIPS)
    digits = torch.stack([numbers // 4**i % 4 for i in range(DIGITS)], dim=1)
    latents = torch.zeros(len(numbers), CHANNELS, dtype=torch.float64)
    latents[:, :DIGITS] = levels[digits]
    read = quantizer.decode(quantizer.quantize(latents).indices).double()
    means = torch.cat([torch.nn.functional.pad(skip.stills.mean, (0, PATCH - FRAME)), skip.clips.mean])
    read[:, DIGITS:] = 0
    torch.testing.assert_close(skip.decode(read), means)


def test_coefficients_in_digits_survive_quantisation_and_the_best_code_is_chosen() -> None:
    skip, x = random_skip(in_digits=True), patches()
    latents = encode(skip, x)
    quantized = make_quantizer(FSQConfig(codebooks=2), CHANNELS).quantize(latents)
    values = torch.tensor(LEVEL_VALUES, dtype=torch.float64)
    assert bool(torch.isin(quantized.values, values).all())
    error = (skip.decode(quantized.values) - x).square().sum(dim=1)
    alone = []
    for codes, part in ((skip.stills, x[: len(x) // 2, :FRAME]), (skip.clips, x[len(x) // 2 :])):
        each = []
        for k in range(len(codes.mean)):
            digits, number = code_in_digits(part, codes.decoder[k : k + 1], codes.mean[k : k + 1])
            assert not number.any()
            each.append((values[digits] @ codes.decoder[k] + codes.mean[k] - part).square().sum(dim=1))
        alone.append(torch.stack(each, dim=1).amin(dim=1))
    torch.testing.assert_close(error, torch.cat(alone))


def test_digits_approximate_successively() -> None:
    """One coefficient in four digits is found to within half of its last step; orthogonal ones do not disturb it."""
    steps = torch.tensor([1.0, 0.25, 0.0625, 0.015625], dtype=torch.float64)
    decoder = torch.zeros(1, 6, 3, dtype=torch.float64)
    decoder[0, :4, 0] = steps
    decoder[0, 4:, 1] = steps[:2]
    mean = -MIDDLE * decoder.sum(dim=1)
    wanted = torch.linspace(-0.99, 0.99, 97, dtype=torch.float64) * float(steps.sum()) * 0.75
    x = torch.stack([wanted, 0 * wanted, 0 * wanted], dim=1)
    digits, _ = code_in_digits(x, decoder, mean)
    found = torch.tensor(LEVEL_VALUES, dtype=torch.float64)[digits] @ decoder[0] + mean
    assert float((found - x)[:, 0].abs().max()) <= 0.25 * float(steps[3]) + 1e-12
    assert float((found - x)[:, 1].abs().max()) <= 0.25 * 0.25 + 1e-12


@pytest.mark.parametrize("apart", [True, False])
def test_consistent_patches_have_the_coefficients_of_their_latents(
    apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip, x = random_skip(consistent=True), patches()
    if not apart:  # as on a device, where rows are not counted
        monkeypatch.setattr(piecewise, "_apart", lambda _: None)
    latents = encode(skip, x)  # codes are orthonormal in single precision
    added = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    before = skip.decode(latents) + added
    after = skip.made_consistent(before, latents)
    numbers = skip._numbers(latents)
    for row, number in enumerate(numbers.tolist()):
        codes, k = (skip.stills, number) if number < STILLS else (skip.clips, number - STILLS)
        frame = codes.mean.shape[1]
        found = codes.encoder[k] @ (after[row, :frame] - codes.mean[k])
        torch.testing.assert_close(found, latents[row, DIGITS:], rtol=0, atol=1e-4)
        # What the code says nothing about is as it was added, and so are a still's later frames.
        basis = codes.decoder[k] / codes.decoder[k].norm(dim=1, keepdim=True)
        change = (after - before)[row, :frame]
        torch.testing.assert_close(change, basis.T @ (basis @ change), rtol=0, atol=1e-4)
        assert torch.equal(after[row, frame:], before[row, frame:])
    assert bool(((after - x).square().sum(dim=1) < (before - x).square().sum(dim=1)).all())
    torch.testing.assert_close(skip.made_consistent(after, latents), after, rtol=0, atol=1e-4)


def test_what_is_not_consistent_stays_as_it_is() -> None:
    x = patches(8)
    for skip in (random_skip(), random_skip(in_digits=True, consistent=True)):
        assert skip.made_consistent(x, encode(skip, x)) is x


@pytest.mark.parametrize("in_digits", [False, True])
def test_the_encoder_never_touches_the_digits(in_digits: bool) -> None:
    skip, x = random_skip(in_digits=in_digits), patches()
    parameters = torch.randn(len(x), 2 * CHANNELS, generator=torch.Generator().manual_seed(3)).double()
    mean, logvar = skip.add_to_parameters(parameters, x).chunk(2, dim=1)
    owned = CHANNELS if in_digits else DIGITS
    assert torch.equal(mean[:, :owned], encode(skip, x)[:, :owned])
    assert torch.equal(logvar[:, :DIGITS], skip.logvar[:DIGITS].expand(len(x), -1))
    torch.testing.assert_close(mean[:, owned:], encode(skip, x)[:, owned:] + parameters[:, owned:CHANNELS])


def piecewise_network(**changes: Any) -> ATokenNetwork:
    network = ATokenNetwork(replace(small_config(), **{"skip": SkipConfig(still_codes=12, clip_codes=5), **changes}))
    generator = torch.Generator().manual_seed(6)
    network.reset_parameters(generator)
    assert network.skip is not None
    for codes in (network.skip.stills, network.skip.clips):
        random_codes(codes, generator, linked=True)
    return network.double()


def test_gradients_reach_the_transformers_and_leave_the_digits_alone() -> None:
    network = piecewise_network()
    encoding = network.encode(visuals((8, 12), (9, 8, 8)))
    mean = encoding.posterior.mean.features
    network.decode(encoding.latents).features.square().mean().backward(retain_graph=True)
    for part in network.transformers():
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert bool((parameter.grad != 0).any()), name
    network.zero_grad(set_to_none=True)
    mean[:, :DIGITS].sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in network.parameters())


def test_a_network_adds_its_code_to_what_its_transformers_say() -> None:
    network = piecewise_network()
    tokens = visuals((8, 12), (9, 8, 8))
    assert network.skip is not None
    assert network.decoder is not None
    with torch.no_grad():
        encoding = network.encode(tokens)
        whole = network.decode(encoding.latents).features
        linear = network.skip.decode(encoding.latents.features)
        skip, network.skip = network.skip, None
        alone = network.decode(encoding.latents).features
        plain = network.encode(tokens).posterior.parameters.features
    torch.testing.assert_close(whole, alone + linear)
    torch.testing.assert_close(
        encoding.posterior.parameters.features, skip.add_to_parameters(plain, tokens.features), rtol=0, atol=0
    )


def test_a_consistent_network_says_what_its_latents_say() -> None:
    """Whatever the transformer and the refiner add, coding what was decoded gives the latents again."""
    sizes = SkipConfig(still_codes=12, clip_codes=5, consistent=True)
    network = piecewise_network(skip=sizes, refiner=RefinerConfig(width=6, depth=1))
    assert network.refiner is not None
    torch.nn.init.normal_(network.refiner.write.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    tokens = visuals((8, 12), (9, 8, 8))
    assert network.skip is not None
    latents = network.encode(tokens).latents
    decoded = network.decode(latents).features
    assert float((decoded - network.skip.decode(latents.features)).detach().abs().mean()) > 0.01  # something was added
    numbers = network.skip._numbers(latents.features)
    for row, number in enumerate(numbers.tolist()):
        codes, k = (network.skip.stills, number) if number < 12 else (network.skip.clips, number - 12)
        frame = codes.mean.shape[1]
        found = codes.encoder[k] @ (decoded[row, :frame] - codes.mean[k])
        torch.testing.assert_close(found, latents.features[row, network.skip.digits :], rtol=0, atol=1e-4)
    decoded.square().mean().backward()
    for name, parameter in network.transformers()[1].named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name
