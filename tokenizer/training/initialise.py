"""Starting points of a small model: linear codes fitted to the data, and the same codes written in digits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.digits import LEVEL_VALUES, MIDDLE
from tokenizer.model.piecewise import BASE, LinearCodes, PiecewiseLinearCode
from tokenizer.training.linear_codes import FittedCodes, fit_codes, principal_components

INITIAL_LOGVAR = -8.0
"""Noise 35 dB below unit-variance latents: enough to train through, too little to see."""

_ERROR = (1.0, 0.1188, 0.01154, 0.00104, 0.0000919)
"""Squared error of the best uniform quantiser of a unit Gaussian with 1, 4, 16, 64 and 256 levels (Max 1960)."""

_REACH = (0.0, 1.991, 2.681, 3.331, 3.935)
"""Half the width of that quantiser's range: levels times half its step."""


@torch.no_grad()
def start_from_linear_codes(
    network: ATokenNetwork, stills: Tensor, clips: Tensor, iterations: int, generator: torch.Generator
) -> dict[str, float]:
    """Fit the network's piecewise linear code to patches and silence the transformers.

    Latents are whitened. The transformers start by reading and writing whitened principal components: the encoder's
    residual stream has channels of equal variance, in which what a linear code drops is as loud as what it keeps, and a
    channel of the decoder's last layer is as strong as the component it stands for.

    Args:
        network: with a skip, and parameters already drawn.
        stills: [places, n, P / Pt] first frames, clips: [places, n, P] patches, values in [-1, 1].
        iterations: see `fit_codes`.

    Returns:
        PSNR in dB of the starting point on these patches, before any quantisation.
    """
    skip, decoder = network.skip, network.decoder
    if skip is None or decoder is None:
        raise InputError(f"{network.config.name} has no linear codes to start from; set skip in its configuration")
    figures = fit_skip(skip, stills, clips, iterations, generator)
    skip.logvar.fill_(INITIAL_LOGVAR)

    # A still is a clip whose later frames are zero: components of both, for tokens of both.
    stills = stills.flatten(0, 1)
    clips = torch.cat([clips.flatten(0, 1), torch.nn.functional.pad(stills, (0, clips.shape[-1] - stills.shape[-1]))])
    centred = clips - clips.mean(dim=0)
    components = principal_components(centred, max(network.config.encoder.width, decoder.transformer.config.width))
    spread = (centred @ components).square().mean(dim=0).sqrt().clamp_min(1e-4)
    network.encoder.transformer.embed.weight.copy_((components / spread).T[: network.config.encoder.width])
    decoder.to_patches.weight.copy_((components * spread)[:, : decoder.transformer.config.width])
    # Nothing is said until the norm in front of the last layer opens, channel by channel.
    torch.nn.init.zeros_(decoder.transformer.norm.get_parameter("weight"))
    torch.nn.init.zeros_(network.encoder.to_posterior.weight)
    if skip.links is not None:
        torch.nn.init.zeros_(decoder.transformer.embed.weight)  # coefficients of different codes have nothing in common
        torch.nn.init.zeros_(skip.links.correct.weight)
        link_codes(network)
    if network.quantizer is not None:
        write_in_digits(network)
    return figures


@torch.no_grad()
def fit_skip(
    skip: PiecewiseLinearCode, stills: Tensor, clips: Tensor, iterations: int, generator: torch.Generator
) -> dict[str, float]:
    """Fit the codes of stills and those of clips, one of which is common to all clips, and set them.

    Returns:
        PSNR in dB of each sort on these patches.
    """
    figures = {}
    for name, codes, patches in (("stills", skip.stills, stills), ("clips", skip.clips, clips)):
        count, channels = codes.encoder.shape[:2]
        common = name == "clips" and count > 1
        fitted = fit_codes(patches, count, channels, iterations, generator, common=common)
        set_codes(codes, fitted)
        figures[name] = 10 * math.log10(4 / fitted.error)
    return figures


@torch.no_grad()
def link_codes(network: ATokenNetwork) -> None:
    """Set what the transformers read and write of codes to principal components (see `start_from_linear_codes`).

    The decoder reads a code's reconstruction in whitened components; the encoder's features say in them by how much a
    patch should differ from what it is before it is coded. The components are those that the decoder writes.
    """
    skip, decoder = network.skip, network.decoder
    assert skip is not None
    assert skip.links is not None
    assert decoder is not None
    links, components = skip.links, decoder.to_patches.weight  # [P, D]
    whitened = components / components.square().sum(dim=0).clamp_min(1e-8)
    first = 0
    for codes in (skip.stills, skip.clips):
        rows, features = slice(first, first + len(codes.mean)), codes.mean.shape[1]
        links.reads[rows] = codes.decoder @ whitened[:features]
        links.biases[rows] = (codes.mean - codes.mean.mean(dim=0)) @ whitened[:features]
        width = min(links.writes.shape[2], components.shape[1])
        links.writes[rows, :, :width] = codes.encoder @ components[:features, :width]
        first = rows.stop


def set_codes(codes: LinearCodes, fitted: FittedCodes) -> None:
    """Take codes as fitted; coefficients of unit variance come out."""
    codes.mean.copy_(fitted.means)
    codes.encoder.copy_(fitted.bases / fitted.spreads[..., None])
    codes.decoder.copy_(fitted.bases * fitted.spreads[..., None])


@torch.no_grad()
def write_in_digits(network: ATokenNetwork) -> None:
    """Turn coefficients into digits (`tokenizer.model.digits`): bits go where they lower the error most.

    All codes share one allocation, so a channel means the same in each, and the decoder's transformer goes on reading
    coefficients as sums of their digits. The encoder falls silent: its corrections were of coefficients.
    """
    skip, decoder = network.skip, network.decoder
    assert skip is not None
    assert decoder is not None
    spreads = torch.cat([codes.decoder.norm(dim=-1) for codes in (skip.stills, skip.clips)])
    coefficient, place, reach = _allocate_digits(spreads.log().mean(dim=0).exp())
    weight = reach / BASE**place  # in units of the coefficient's spread
    for codes in (skip.stills, skip.clips):
        vectors = codes.decoder[:, coefficient] * weight[:, None]
        codes.mean.sub_(MIDDLE * vectors.sum(dim=1))  # the middle of every range is where the coefficient is zero
        codes.decoder.copy_(vectors)
        codes.encoder.zero_()  # digits are found with the decoding vectors
    skip.read_levels.copy_(torch.tensor(LEVEL_VALUES))
    embed = decoder.transformer.embed.weight
    embed[:, skip.digits :] = embed[:, skip.digits :][:, coefficient] * weight
    if skip.links is not None:
        reads = skip.links.reads[:, coefficient] * weight[:, None]
        skip.links.biases.sub_(MIDDLE * reads.sum(dim=1))
        skip.links.reads.copy_(reads)
    torch.nn.init.zeros_(network.encoder.to_posterior.weight)


def _allocate_digits(spreads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spend as many base-4 digits as there are coefficients, each where the expected squared error falls most.

    Args:
        spreads: [c] standard deviations of the coefficients.

    Returns:
        For each channel, strongest first: the coefficient it belongs to [c] int64, its place [c] (0 for the first
        digit), and the reach of the coefficient's range in standard deviations [c].
    """
    digits = [0] * len(spreads)
    error = spreads.square().clone()
    for _ in range(len(spreads)):
        best = int(error.argmax())
        digits[best] += 1
        error[best] = spreads[best].square() * _ERROR[min(digits[best], len(_ERROR) - 1)]
    channels = [
        (float(spreads[i]) * _REACH[min(digits[i], len(_REACH) - 1)] / BASE**place, i, place)
        for i in range(len(spreads))
        for place in range(digits[i])
    ]
    channels.sort(reverse=True)
    coefficient = torch.tensor([i for _, i, _ in channels])
    reach = torch.tensor([_REACH[min(digits[i], len(_REACH) - 1)] for _, i, _ in channels])
    return coefficient, torch.tensor([float(place) for _, _, place in channels]), reach
