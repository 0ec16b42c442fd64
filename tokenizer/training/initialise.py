"""Starting points of a run: linear codes fitted to the data, or an earlier model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.piecewise import LinearCodes
from tokenizer.training.linear_codes import FittedCodes, fit_codes, principal_components

INITIAL_LOGVAR = -8.0
"""Noise 35 dB below unit-variance latents: enough to train through, too little to see."""

FSQ_VALUES = (-1.0, -0.5, 0.0, 0.5)
"""What FSQ with 4 levels makes of the digits 0..3 (FORMAT 8)."""


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
        PSNR in dB of the starting point on these patches.
    """
    skip, decoder = network.skip, network.decoder
    if skip is None or decoder is None:
        raise InputError(f"{network.config.name} has no linear codes to start from; set skip in its configuration")
    figures = {}
    for name, codes, patches in (("stills", skip.stills, stills), ("clips", skip.clips, clips)):
        fitted = fit_codes(patches, len(codes.mean), codes.encoder.shape[1], iterations, generator)
        _set_codes(codes, fitted)
        figures[name] = 10 * math.log10(4 / fitted.error)
    skip.logvar.fill_(INITIAL_LOGVAR)

    clips = clips.flatten(0, 1)
    centred = clips - clips.mean(dim=0)
    components = principal_components(centred, max(network.config.encoder.width, decoder.transformer.config.width))
    spread = (centred @ components).square().mean(dim=0).sqrt()
    network.encoder.transformer.embed.weight.copy_((components / spread).T[: network.config.encoder.width])
    decoder.to_patches.weight.copy_((components * spread)[:, : decoder.transformer.config.width])
    # Nothing is said until the norm in front of the last layer opens, channel by channel.
    torch.nn.init.zeros_(decoder.transformer.norm.get_parameter("weight"))
    torch.nn.init.zeros_(network.encoder.to_posterior.weight)
    return figures


def _set_codes(codes: LinearCodes, fitted: FittedCodes) -> None:
    codes.mean.copy_(fitted.means)
    codes.encoder.copy_(fitted.bases / fitted.spreads[..., None])
    codes.decoder.copy_(fitted.bases * fitted.spreads[..., None])


@torch.no_grad()
def start_from_model(network: ATokenNetwork, source: str) -> None:
    """Copy the parameters of an earlier model of the same shapes.

    If `network` quantises and the earlier model did not, its linear code learns to read digits as FSQ writes them.

    Raises:
        InputError: the model cannot be read or has other shapes.
    """
    from tokenizer.api import AToken

    earlier = AToken.from_pretrained(source, dtype=torch.float32)
    found, wanted = earlier.state_dict(), network.state_dict()
    unfit = [name for name in wanted if name not in found or found[name].shape != wanted[name].shape]
    if unfit or len(found) != len(wanted):
        keys = ", ".join(unfit[:3]) or "extra keys"
        raise InputError(f"{source}: does not have the shapes of this run's model ({keys})")
    network.load_state_dict(found)
    if network.skip is not None and network.quantizer is not None and earlier.quantizer is None:
        network.skip.read_levels.copy_(torch.tensor(FSQ_VALUES))
