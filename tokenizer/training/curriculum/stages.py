"""What changes between two stages: latents grow from 32 to 48 channels, and become discrete (PAPER 3).

A third change is of small models alone: decoding keeps what linear codes say. All are functions of a network: a new one
comes out, and the old one stays as it is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import ATokenConfig, FSQConfig
from tokenizer.model.piecewise import PiecewiseLinearCode
from tokenizer.training.initialise import fit_skip, link_codes, write_in_digits


@torch.no_grad()
def grown(network: ATokenNetwork, channels: int, generator: torch.Generator) -> ATokenNetwork:
    """A network with more latent channels, in which the old ones mean and decode to exactly what they did.

    The decoder's columns of the new channels are zero: it does not read them yet. What the encoder says in them is
    drawn at random, so that the decoder has something to learn to read from the first step on; were it zero too, only
    noise would move either. Their log-variance starts at zero: the posterior is as wide as the prior.

    Args:
        network: continuous; channels are added before latents become discrete.
        channels: at least as many as there are.
        generator: draws the encoder's new rows.

    Raises:
        InputError: fewer channels, or a discrete network.
    """
    old = network.config.latent_channels
    if channels < old:
        raise InputError(f"latents of {old} channels cannot become {channels}: channels are added, never taken away")
    if network.quantizer is not None:
        raise InputError("latents grow before they become discrete; start from the continuous model")
    result = _like(network, replace(network.config, latent_channels=channels))
    state, new = network.state_dict(), channels - old
    mean, logvar = state["encoder.to_posterior.weight"].chunk(2)
    drawn = nn.init.trunc_normal_(torch.empty(new, mean.shape[1]), std=mean.shape[1] ** -0.5, generator=generator)
    state["encoder.to_posterior.weight"] = torch.cat(
        [mean, drawn.to(mean), logvar, logvar.new_zeros(new, len(mean[0]))]
    )
    state["decoder.transformer.embed.weight"] = _more(state["decoder.transformer.embed.weight"], new, dim=1)
    if network.skip is not None:
        _grow_codes(state, network.skip, new)
    result.load_state_dict(state)
    return result


def _grow_codes(state: dict[str, Tensor], skip: PiecewiseLinearCode, new: int) -> None:
    """Linear codes say nothing in the new channels; the noise there is as loud as in the others."""
    if skip.links is not None:
        for leaf in ("reads", "writes"):
            state[f"skip.links.{leaf}"] = _more(state[f"skip.links.{leaf}"], new, dim=1)
    for name in ("stills", "clips"):
        for leaf in ("encoder", "decoder"):
            state[f"skip.{name}.{leaf}"] = _more(state[f"skip.{name}.{leaf}"], new, dim=1)
    logvar = state["skip.logvar"]
    state["skip.logvar"] = torch.cat([logvar, logvar.mean().expand(new)])


@torch.no_grad()
def refit_codes(
    network: ATokenNetwork, stills: Tensor, clips: Tensor, iterations: int, generator: torch.Generator
) -> None:
    """Fit the linear codes of a network anew, with all channels that it has now.

    Codes of 48 channels fit better than codes of 32 with 16 more behind, and the stage before has seen no clips. The
    transformers can go on: linked with codes, they read and write patches, whatever the codes are. But they learned to
    add what the old codes left out, part of which the new ones code: at first they add too much. What the encoder said
    in coefficients means nothing any more and starts again from zero.

    Args:
        network: changed in place; continuous, with codes that are linked.
        stills: [places, n, P / Pt] first frames, clips: [places, n, P] patches, values in [-1, 1].
        iterations: of fitting, see `tokenizer.training.linear_codes.fit_codes`.

    Raises:
        InputError: codes that are not linked, or none.
    """
    skip = network.skip
    if skip is None or skip.links is None:
        raise InputError(f"{network.config.name} has no linked codes to fit anew; leave start.refit out")
    fit_skip(skip, stills, clips, iterations, generator)
    network.encoder.to_posterior.weight[: network.config.latent_channels] = 0
    link_codes(network)


@torch.no_grad()
def kept_consistent(network: ATokenNetwork) -> ATokenNetwork:
    """The same weights, decoding to patches with the coefficients of their latents (`SkipConfig.consistent`).

    What the encoder learned to change in coefficients is forgotten: part of it made up for what the decoder disturbed,
    and decoding now takes every coefficient at its word. It can learn anew what is worth saying there.

    Raises:
        InputError: no linear codes, or a discrete network, whose digits are too coarse for it.
    """
    skip = network.config.skip
    if skip is None or network.quantizer is not None:
        raise InputError(f"{network.config.name} has no linear codes with real coefficients to be consistent with")
    result = _like(network, replace(network.config, skip=replace(skip, consistent=True)))
    result.load_state_dict(network.state_dict())
    if skip.consistent:
        return result
    result.encoder.to_posterior.weight[: network.config.latent_channels] = 0
    assert result.skip is not None
    if result.skip.links is not None:
        result.skip.links.correct.weight.zero_()
    return result


def _more(tensor: Tensor, count: int, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = count
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


@torch.no_grad()
def quantised(network: ATokenNetwork, quantizer: FSQConfig) -> ATokenNetwork:
    """The same weights with latents rounded to FSQ's levels; linear codes write their coefficients as digits.

    Raises:
        InputError: a network that is discrete in another way, or channels that the quantiser does not fit.
    """
    if network.config.quantizer == quantizer:
        return network
    if network.quantizer is not None:
        raise InputError(f"the network is discrete already ({network.config.quantizer}), not as {quantizer} says")
    result = _like(network, replace(network.config, quantizer=quantizer))
    result.load_state_dict(network.state_dict())
    if result.skip is not None:
        write_in_digits(result)
    return result


def _like(network: ATokenNetwork, config: ATokenConfig) -> ATokenNetwork:
    return ATokenNetwork(config).to(network.device, network.dtype)
