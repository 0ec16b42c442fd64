"""FSQ: exact inverse, the straight-through gradient, every table of levels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from tests.tokenizer.networks import random_network, visuals
from tokenizer.errors import InputError
from tokenizer.model.config import FSQConfig
from tokenizer.quantizers import FSQ, Quantizer, make_quantizer
from tokenizer.quantizers.fsq import LEVELS, levels_of

SIZES = [*LEVELS, -2, -16, -1024]


def fsq(size: int = 4096, codebooks: int = 8) -> FSQ:
    return FSQ(FSQConfig(codebook_size=size, codebooks=codebooks), codebooks * len(levels_of(size)))


def latents_of(quantizer: FSQ, values: torch.Tensor) -> torch.Tensor:
    """Latents [N, C] in the middle of the interval that is rounded to each of the values [N, C]."""
    levels = torch.tensor(quantizer.levels, dtype=torch.float64).repeat(quantizer.codebooks)
    half = (levels - 1) * 1.001 / 2
    offset = torch.where(levels % 2 == 0, 0.5, 0.0).double()
    codes = values.double() * (levels // 2)
    return torch.atanh((codes + offset) / half) - torch.atanh(offset / half)


@pytest.mark.parametrize("size", SIZES)
def test_every_index_comes_back(size: int) -> None:
    quantizer = fsq(size, codebooks=2)
    count = quantizer.codebook_size
    assert count == math.prod(quantizer.levels)
    indices = torch.stack([torch.arange(count), torch.arange(count).flip(0)], dim=1).int()
    values = quantizer.decode(indices)
    quantized = quantizer.quantize(latents_of(quantizer, values))
    assert torch.equal(quantized.indices, indices)
    assert quantized.indices.dtype == torch.int32
    torch.testing.assert_close(quantized.values.float(), values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_codes_are_distinct_and_evenly_spaced(size: int) -> None:
    quantizer = fsq(size, codebooks=1)
    codes = quantizer.all_codes()
    for channel, level in enumerate(quantizer.levels):
        values = codes[:, channel].unique()
        expected = (torch.arange(level) - level // 2) / (level // 2)
        torch.testing.assert_close(values, expected.float())
    stride = torch.tensor([math.prod(quantizer.levels[:i]) for i in range(len(quantizer.levels))])
    digits = torch.round(codes * (torch.tensor(quantizer.levels) // 2) + torch.tensor(quantizer.levels) // 2)
    assert torch.equal((digits * stride).sum(dim=1).long(), torch.arange(quantizer.codebook_size))


@pytest.mark.parametrize("size", SIZES)
def test_latents_of_any_size_stay_in_the_codebook(size: int) -> None:
    quantizer = fsq(size, codebooks=1)
    latents = torch.linspace(-50, 50, 4001, dtype=torch.float64)[:, None].expand(-1, quantizer.channels)
    quantized = quantizer.quantize(latents)
    assert quantized.indices.min() >= 0
    assert quantized.indices.max() < quantizer.codebook_size
    torch.testing.assert_close(quantizer.decode(quantized.indices).double(), quantized.values, rtol=0, atol=1e-6)
    assert all(
        len(channel.unique()) == level for channel, level in zip(quantized.values.T, quantizer.levels, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_nan_has_no_index(dtype: torch.dtype) -> None:
    """As an integer it would be some number or other, on some devices a legal one."""
    latents = torch.zeros(3, 48, dtype=dtype)
    latents[1, 7], latents[2, 0] = float("nan"), float("inf")
    quantized = fsq().quantize(latents)
    assert (quantized.indices < 0).nonzero().tolist() == [[1, 1]]
    assert quantized.values.isnan().nonzero().tolist() == [[1, 7]]


@pytest.mark.parametrize("size", [4096, 1024, 2**18 - 1])
def test_gradient_goes_straight_through_the_rounding(size: int) -> None:
    """d value / d latent = half (1 - tanh^2(z + shift)) / (L // 2), checked against the formula and by differences."""
    quantizer = fsq(size, codebooks=2)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(30, quantizer.channels, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(30, quantizer.channels, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((quantizer.quantize(latents).values * weights).sum(), latents)

    levels = torch.tensor(quantizer.levels, dtype=torch.float64).repeat(2)
    half = (levels - 1) * 1.001 / 2
    shift = torch.atanh(torch.where(levels % 2 == 0, 0.5, 0.0).double() / half)
    slope = half * (1 - torch.tanh(latents.detach() + shift) ** 2) / (levels // 2)
    torch.testing.assert_close(gradient, weights * slope)
    assert torch.autograd.gradcheck(quantizer.bound, latents[:3].detach().requires_grad_(True))


def test_released_numbers() -> None:
    """FORMAT 8: four levels at -1, -0.5, 0 and 0.5; zero maps to zero."""
    quantizer = fsq()
    assert quantizer.levels == (4,) * 6
    assert (quantizer.codebook_size, quantizer.codebooks, quantizer.channels) == (4096, 8, 48)
    assert quantizer.bits_per_token == 96
    zero = quantizer.quantize(torch.zeros(1, 48))
    assert not zero.values.any()
    assert zero.indices.tolist() == [[sum(2 * 4**j for j in range(6))] * 8]
    extremes = quantizer.quantize(torch.tensor([[-100.0] * 48, [100.0] * 48]))
    assert extremes.indices.tolist() == [[0] * 8, [4095] * 8]
    assert extremes.values[:, 0].tolist() == [-1.0, 0.5]
    assert float(extremes.loss) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_keep_the_type_of_the_latents(dtype: torch.dtype) -> None:
    latents = torch.randn(9, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    quantized = fsq().quantize(latents)
    assert quantized.values.dtype == dtype
    # The four values are exact in any type, and half-precision latents are rounded in float32.
    assert torch.equal(quantized.indices, fsq().quantize(latents.double()).indices)
    assert torch.equal(fsq().decode(quantized.indices).to(dtype), quantized.values)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_indices_of_any_integer_type(dtype: torch.dtype) -> None:
    indices = torch.arange(128).reshape(16, 8)
    assert torch.equal(fsq().decode(indices.to(dtype)), fsq().decode(indices.int()))


def test_it_is_a_quantizer() -> None:
    assert isinstance(make_quantizer(FSQConfig(), 48), Quantizer)


def test_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="no FSQ levels for codebook size 4097; known sizes: 16, 64"):
        levels_of(4097)
    with pytest.raises(InputError, match="no FSQ levels for codebook size -3"):
        levels_of(-3)
    with pytest.raises(InputError, match="8 codebooks of 6 channels need 48 latent channels, the model has 32"):
        FSQ(FSQConfig(), 32)
    with pytest.raises(InputError, match=r"latents \[N, 48\], got \(2, 47\)"):
        fsq().quantize(torch.zeros(2, 47))
    with pytest.raises(InputError, match=r"indices must be \[N, 8\], got \(2, 7\)"):
        fsq().decode(torch.zeros(2, 7, dtype=torch.int32))
    with pytest.raises(InputError, match="indices must be integers, got float32"):
        fsq().decode(torch.zeros(2, 8))


@pytest.mark.parametrize("index", [-1, 4096])
def test_an_index_outside_the_codebook_is_named(index: int) -> None:
    indices = torch.zeros(3, 8, dtype=torch.int32)
    indices[1, 4] = index
    with pytest.raises(InputError, match=r"row 1 has indices .* outside 0\.\.4095"):
        fsq().decode(indices)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_indices_seen_without_gradients_take_none_from_the_latents(
    mode: Callable[[], AbstractContextManager[None]],
) -> None:
    """A step that logs codebook use before its loss trains the encoder all the same."""
    network = copy.deepcopy(random_network(discrete=True)).requires_grad_(True)
    tokens, gradients = visuals((8, 12), (5, 8, 8)), []
    for logged in (False, True):
        encoding = network.encode(tokens)
        if logged:
            with mode():
                assert encoding.indices is not None
                assert encoding.quantized is not None
                assert not encoding.latents.features.requires_grad  # nor do pictures made here keep a graph
        network.zero_grad()
        network.decode(encoding.latents).features.square().sum().backward()
        gradients.append(network.encoder.to_posterior.weight.grad)
    assert gradients[0] is not None
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0])
