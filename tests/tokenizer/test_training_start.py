"""Where a small model starts: linear codes that are what they claim, continuous and in digits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tokenizer.networks import small_config
from tests.tokenizer.test_checkpoints import refused
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import ATokenConfig, FSQConfig, SkipConfig
from tokenizer.model.piecewise import LEVELS
from tokenizer.patches import patchify, uint8_to_float, unpatchify, visuals_to_tokens
from tokenizer.sparse import SparseTokens
from tokenizer.training.curriculum.stages import quantised
from tokenizer.training.initialise import start_from_linear_codes
from tokenizer.training.linear_codes import fit_codes, principal_components

PATCH = (4, 4, 4)
TINY = replace(small_config(), skip=SkipConfig(still_codes=3, clip_codes=2))


def network(sizes: ATokenConfig = TINY) -> ATokenNetwork:
    drawn = ATokenNetwork(sizes)
    drawn.reset_parameters(torch.Generator().manual_seed(0))
    return drawn


def smooth_places(count: int, frames: int, seed: int) -> Tensor:
    """[count, 16, F] patches of waves of random colour, phase and direction, with a little noise."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(np.arange(frames), np.arange(16), np.arange(16), indexing="ij")
    places = []
    for _ in range(count):
        phase = sum(rng.uniform(-0.4, 0.4) * axis for axis in axes)
        colours = [120 + 90 * np.sin(phase + rng.uniform(0, 6)) for _ in range(3)]
        pixels = (np.stack(colours, axis=-1) + rng.integers(-8, 9, (frames, 16, 16, 3))).astype(np.uint8)
        places.append(patchify(uint8_to_float(torch.from_numpy(pixels)), (frames, 4, 4)))
    return torch.stack(places)


def clustered(seed: int, places: int = 40) -> Tensor:
    """[places, 16, 24] points near three subspaces of four dimensions; each place belongs to one."""
    generator = torch.Generator().manual_seed(seed)
    bases = torch.randn(3, 4, 24, generator=generator)
    points = torch.randn(places, 16, 4, generator=generator) @ bases[torch.arange(places) % 3]
    return points + 0.1 * torch.randn(places, 16, 24, generator=generator)


@pytest.mark.parametrize("seed", range(4))
def test_subspaces_are_never_worse_than_principal_components(seed: int) -> None:
    patches = clustered(seed)
    flat = patches.flatten(0, 1)
    centred = flat - flat.mean(dim=0)
    basis = principal_components(centred, 4)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), atol=1e-4, rtol=0)
    best = float((centred - centred @ basis @ basis.T).square().mean())

    def error(codes: int, iterations: int) -> float:
        return fit_codes(patches, codes, 4, iterations, torch.Generator().manual_seed(seed)).error

    assert best * 0.9999 <= error(1, 12) <= best * 1.05  # a single code is PCA, but for the weights of places
    falling = [error(4, iterations) for iterations in (1, 3, 6, 12)]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.5 * best


def test_codes_are_what_they_claim() -> None:
    patches = clustered(1)
    fitted = fit_codes(patches, 4, 4, 8, torch.Generator().manual_seed(0))
    flat = patches.flatten(0, 1)
    each = []
    for mean, basis, spread in zip(fitted.means, fitted.bases, fitted.spreads, strict=True):
        torch.testing.assert_close(basis @ basis.T, torch.eye(4), atol=1e-4, rtol=0)
        assert torch.equal(spread, spread.sort(descending=True).values)
        each.append(((flat - mean) - (flat - mean) @ basis.T @ basis).square().mean(dim=1))
    assert float(torch.stack(each).amin(dim=0).mean()) == pytest.approx(fitted.error, rel=1e-4)
    assert torch.equal(fit_codes(patches, 4, 4, 8, torch.Generator().manual_seed(0)).bases, fitted.bases)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_common_code_is_principal_components_of_everything(seed: int) -> None:
    """So no patch is coded worse than by them, however unlike the rest it is."""
    patches = clustered(seed)
    flat = patches.flatten(0, 1)
    centred = flat - flat.mean(dim=0)
    basis = principal_components(centred, 4)
    best = (centred - centred @ basis @ basis.T).square().mean(dim=1)
    fitted = fit_codes(patches, 4, 4, 12, torch.Generator().manual_seed(seed), common=True)
    torch.testing.assert_close(fitted.means[-1], flat.mean(dim=0), atol=1e-5, rtol=0)
    ours = flat - fitted.means[-1]
    ours = (ours - ours @ fitted.bases[-1].T @ fitted.bases[-1]).square().mean(dim=1)
    assert float(ours.mean()) == pytest.approx(float(best.mean()), rel=1e-3)
    assert fitted.error < 0.7 * float(best.mean())  # the other codes share what is common


POOR = {
    "flat": torch.zeros(8, 16, 24),
    "few": clustered(0, 1),
    "one dimension": clustered(0)[:, :, :1].repeat(1, 1, 24),
}


@pytest.mark.parametrize("patches", POOR.values(), ids=POOR.keys())
def test_codes_of_poor_data_are_finite(patches: Tensor) -> None:
    fitted = fit_codes(patches, 6, 4, 4, torch.Generator().manual_seed(0))
    for tensor in (fitted.means, fitted.bases, fitted.spreads):
        assert bool(torch.isfinite(tensor).all())


def started() -> tuple[ATokenNetwork, dict[str, float], dict[str, Tensor]]:
    net = network()
    stills, clips = smooth_places(100, 1, 0), smooth_places(100, 4, 1)
    figures = start_from_linear_codes(net, stills, clips, 6, torch.Generator().manual_seed(0))
    return net, figures, {"stills": stills, "clips": clips}


def visuals_of(places: Tensor) -> SparseTokens:
    """Tokens of [places, 16, F] patches: pictures of 16 x 16 pixels, or clips of one patch."""
    frames = [unpatchify(place, (1, 4, 4), (places.shape[2] // 48, 4, 4)) for place in places]
    return visuals_to_tokens([visual[0] if len(visual) == 1 else visual for visual in frames], PATCH)[0]


@torch.no_grad()
def psnr(net: ATokenNetwork, places: Tensor) -> float:
    """Of [places, 16, F] patches through the whole network and back."""
    decoded = net.decode(net.encode(visuals_of(places)).latents).features[:, : places.shape[2]]
    return float(10 * torch.log10(4 / (decoded - places.flatten(0, 1)).square().mean()))


def test_a_network_starts_as_its_linear_codes() -> None:
    net, figures, patches = started()
    for name, places in patches.items():
        assert psnr(net, places) == pytest.approx(figures[name], abs=0.05)
        best = principal_components(places.flatten(0, 1) - places.flatten(0, 1).mean(dim=0), 10)
        centred = places.flatten(0, 1) - places.flatten(0, 1).mean(dim=0)
        pca = float(10 * torch.log10(4 / (centred - centred @ best @ best.T).square().mean()))
        assert figures[name] > pca
    assert bool((net.encode(visuals_of(patches["stills"])).posterior.logvar.features == -8).all())
    # The transformers are there to learn: their weights are whitened components, none silent or wild. A still is
    # a clip whose later frames are zero.
    stills, clips = (patches[name].flatten(0, 1) for name in ("stills", "clips"))
    both = torch.cat([clips, torch.nn.functional.pad(stills, (0, clips.shape[1] - stills.shape[1]))])
    embedded = both @ net.encoder.transformer.embed.weight.detach().T
    assert 0.8 < float(embedded.std(dim=0).min()) < float(embedded.std(dim=0).max()) < 1.2


def test_a_network_without_codes_cannot_start_from_them() -> None:
    with_none = network(replace(small_config(), name="plain"))
    patches = torch.zeros(2, 16, 48), torch.zeros(2, 16, 192)
    text = refused(lambda: start_from_linear_codes(with_none, *patches, 2, torch.Generator()))
    assert text == "plain has no linear codes to start from; set skip in its configuration"


def test_a_discrete_model_reads_the_digits_of_a_continuous_one() -> None:
    net, figures, patches = started()
    discrete = quantised(net, FSQConfig(codebooks=2))
    assert discrete.skip is not None
    digits = discrete.skip.digits
    for name, places in patches.items():
        # 24 bits a token keep most of what 10 coefficients say, and far more than one mean of everything.
        flat = float(10 * torch.log10(4 / places.var(dim=(0, 1)).mean()))
        assert flat + 3 < psnr(discrete, places) < figures[name]
        tokens = visuals_of(places)
        with torch.no_grad():
            encoding = discrete.encode(tokens)
            written = nearest(encoding.posterior.mean.features[:, :digits], torch.tensor(LEVELS))
            read = nearest(encoding.latents.features[:, :digits], discrete.skip.read_levels)
            assert encoding.indices is not None
            torch.testing.assert_close(
                discrete.decode(encoding.indices).features, discrete.decode(encoding.latents).features
            )
        assert torch.equal(written, read)
        assert len(read.unique(dim=0)) > 1


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    return (values[..., None] - levels).abs().argmin(dim=-1)
