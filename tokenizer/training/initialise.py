"""Starting points: the best shared linear code for the linear skip of a small model."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.model.atoken import ATokenNetwork

INITIAL_LOGVAR = -8.0
"""Noise 35 dB below unit-variance latents: enough to train through, too little to see."""


@torch.no_grad()
def start_from_linear_code(
    network: ATokenNetwork, stills: Tensor, clips: Tensor, iterations: int = 60
) -> dict[str, float]:
    """Set the linear skip to a linear code of stills and clips, and silence the transformers' outputs.

    One decoding matrix D serves both: its first frame's rows decode stills. D minimises the sum of both relative errors
    (each relative to the best code of its own kind), starting from the principal components of clips; both encoding
    matrices are then the least-squares ones. Latents are whitened.

    Args:
        network: with `linear_skip`, and parameters already drawn.
        stills: [n, P / Pt] patches of still images, clips: [m, P], values in [-1, 1].

    Returns:
        PSNR in dB of the starting point and of the two best separate linear codes on these patches.
    """
    skip_in, skip_out = network.encoder.skip, network.decoder.skip if network.decoder else None
    if skip_in is None or skip_out is None:
        raise InputError(
            f"{network.config.name} has no linear skip to initialise; set linear_skip in its configuration"
        )
    clip_mean = clips.mean(dim=0)
    still_mean, frame = stills.mean(dim=0), stills.shape[1]
    decode, still_best, clip_best = _shared_basis(
        stills - still_mean, clips - clip_mean, network.config.latent_channels, iterations
    )

    encode = torch.linalg.pinv(decode)
    whiten = ((clips - clip_mean) @ encode.T).std(dim=0)
    decode, encode = decode * whiten, encode / whiten[:, None]
    # Stills have a mean of their own but share the decoder's bias, so the code carries the difference where it can.
    encode_still = torch.linalg.pinv(decode[:frame])
    _set(skip_out.weight, decode)
    _set(skip_out.bias, clip_mean)
    _set(skip_in.clip.weight, encode)
    _set(skip_in.clip.bias, -encode @ clip_mean)
    _set(skip_in.still.weight, encode_still)
    _set(skip_in.still.bias, -encode_still @ clip_mean[:frame])
    skip_in.logvar.fill_(INITIAL_LOGVAR)
    network.encoder.to_posterior.weight.zero_()
    assert network.decoder is not None
    network.decoder.to_patches.weight.zero_()

    still_error = stills - clip_mean[:frame] - (stills - clip_mean[:frame]) @ encode_still.T @ decode[:frame].T
    clip_error = clips - clip_mean - (clips - clip_mean) @ encode.T @ decode.T
    return {
        "still": _psnr(still_error.square().mean()),
        "clip": _psnr(clip_error.square().mean()),
        "best still": _psnr(still_best),
        "best clip": _psnr(clip_best),
    }


def _shared_basis(stills: Tensor, clips: Tensor, channels: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """D [P, C] with orthogonal columns, and the mean squared errors of the best separate codes."""
    frame = stills.shape[1]
    still_best = _residual(stills, _components(stills, channels))
    clip_start = _components(clips, channels)
    clip_best = _residual(clips, clip_start)
    basis = clip_start.clone(memory_format=torch.contiguous_format)
    with torch.enable_grad():
        basis.requires_grad_()
        optimizer = torch.optim.LBFGS([basis], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = _residual(stills, basis[:frame]) / still_best + _residual(clips, basis) / clip_best
            loss.backward()  # type: ignore[no-untyped-call]
            assert basis.grad is not None
            basis.grad = basis.grad.contiguous()
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    basis = basis.detach()
    # Principal axes of the code inside the span: ordered, uncorrelated channels.
    orthogonal, _ = torch.linalg.qr(basis)
    _, axes = torch.linalg.eigh(torch.cov((clips @ orthogonal).T))
    return orthogonal @ axes.flip(1), still_best, clip_best


def _components(centred: Tensor, channels: int) -> Tensor:
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return vectors[:, -channels:].flip(1)


def _residual(x: Tensor, basis: Tensor) -> Tensor:
    """Mean squared distance of the rows of x from the span of the columns of `basis`."""
    orthogonal, _ = torch.linalg.qr(basis)
    return (x - (x @ orthogonal) @ orthogonal.T).square().mean()


def _psnr(squared_error: Tensor) -> float:
    return float(10 * torch.log10(4.0 / squared_error))


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))
