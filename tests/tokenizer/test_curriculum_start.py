"""Where stages begin: SigLIP 2 weights, latents that grow or become discrete, an earlier run; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tokenizer.curriculum_data import StubTower, smoke
from tests.tokenizer.networks import random_latents, random_network, small_config, visuals
from tokenizer.api import AToken
from tokenizer.errors import InputError
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import FSQConfig, SkipConfig, TransformerConfig
from tokenizer.patches import image_to_tokens
from tokenizer.text.alignment import AlignmentConfig, TextAlignment, load_text_alignment, save_text_alignment
from tokenizer.training.curriculum.model import TrainedModel, save_trained
from tokenizer.training.curriculum.siglip2 import start_from_siglip2
from tokenizer.training.curriculum.stages import grown, kept_consistent, quantised
from tokenizer.training.curriculum.start import _adapted, starting_model

STACK = TransformerConfig(width=32, depth=2, heads=2, mlp_width=48, norm="layer", bias=True, qk_norm=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def save_vision(folder: Path, positions: int = 256) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)  # transformers draws weights from the global generator alone
    model = transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**sizes, num_patches=positions, patch_size=8)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)


def test_the_encoder_says_of_a_picture_what_siglip2_says(tmp_path: Path) -> None:
    save_vision(tmp_path)
    from tokenizer.losses.networks import SiglipVision

    sizes = replace(small_config(), patch_size=(4, 8, 8), encoder=replace(STACK, rotary=False))
    network = ATokenNetwork(sizes)
    network.reset_parameters(generator())
    before = network.encoder.to_posterior.weight.clone()
    start_from_siglip2(network.encoder, sizes.patch_size, tmp_path)
    picture = torch.rand(40, 56, 3, generator=generator(1)) * 2 - 1
    tokens, _ = image_to_tokens(picture, sizes.patch_size)
    ours = network.encode(tokens).pooled
    theirs = SiglipVision(str(tmp_path))(picture.permute(2, 0, 1)[None])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not bool(network.encoder.transformer.embed.weight[:, 192:].any())  # later frames are not seen yet
    assert torch.equal(network.encoder.to_posterior.weight, before)


def test_other_vision_towers_are_refused(tmp_path: Path) -> None:
    save_vision(tmp_path / "small", positions=16)
    save_vision(tmp_path / "right")
    wide = ATokenNetwork(replace(small_config(), patch_size=(4, 8, 8), encoder=replace(STACK, mlp_width=64)))
    with pytest.raises(InputError, match="no encoder of this model"):
        start_from_siglip2(wide.encoder, (4, 8, 8), tmp_path / "right")
    with pytest.raises(InputError, match="16 positions"):
        start_from_siglip2(wide.encoder, (4, 8, 8), tmp_path / "small")
    large = ATokenNetwork(replace(small_config(), patch_size=(4, 16, 16), encoder=STACK))
    with pytest.raises(InputError, match="patches of 8x8 pixels, this model of 16x16"):
        start_from_siglip2(large.encoder, (4, 16, 16), tmp_path / "right")


@pytest.mark.parametrize(
    "skip",
    [
        None,
        SkipConfig(still_codes=3, clip_codes=2),
        SkipConfig(still_codes=3, clip_codes=2, linked=True, consistent=True),
    ],
)
def test_grown_latents_leave_what_old_channels_decode_to(skip: SkipConfig | None) -> None:
    network = random_network() if skip is None else _with_codes(skip)
    old = network.config.latent_channels
    wider = grown(network, 20, generator())
    tokens = visuals((8, 12), (8, 4, 8))
    latents = random_latents(tokens, old)
    noise = torch.randn(tokens.num_tokens, 20 - old, dtype=latents.dtype, generator=generator(3))
    decoded = network.decode(latents).features
    more = wider.decode(latents.with_features(torch.cat([latents.features, noise], dim=1))).features
    torch.testing.assert_close(more, decoded, rtol=0, atol=1e-12)
    mean, logvar = network.encode(tokens).posterior, wider.encode(tokens).posterior
    torch.testing.assert_close(logvar.mean.features[:, :old], mean.mean.features, rtol=0, atol=1e-12)
    torch.testing.assert_close(logvar.logvar.features[:, :old], mean.logvar.features, rtol=0, atol=1e-12)
    assert bool(wider.encode(tokens).posterior.mean.features[:, old:].any())  # the decoder has something to learn
    with pytest.raises(InputError, match="never taken away"):
        grown(wider, old, generator())
    with pytest.raises(InputError, match="before they become discrete"):
        grown(random_network(discrete=True), 20, generator())


def _with_codes(skip: SkipConfig) -> ATokenNetwork:
    network = ATokenNetwork(replace(small_config(), skip=skip))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3, generator=generator(7))
    return network.double().eval().requires_grad_(False)


@pytest.mark.parametrize("linked", [False, True])
def test_a_network_becomes_consistent_and_codes_patches_as_they_are(linked: bool) -> None:
    network = _with_codes(SkipConfig(still_codes=3, clip_codes=2, linked=linked))
    result, tokens = kept_consistent(network), visuals((8, 12), (8, 4, 8))
    assert result.skip is not None
    assert result.skip.consistent
    mean = result.encode(tokens).posterior.mean.features
    silent = result.skip.add_to_parameters(torch.zeros(tokens.num_tokens, 24, dtype=torch.float64), tokens.features)
    torch.testing.assert_close(mean, silent[:, :12], rtol=0, atol=0)
    assert bool((network.encode(tokens).posterior.mean.features != mean).any())
    assert network.config.skip is not None
    assert not network.config.skip.consistent  # the old one stays as it is
    again = kept_consistent(result)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in result.state_dict().items())
    for other in (random_network(), random_network(discrete=True)):
        with pytest.raises(InputError, match="no linear codes with real coefficients"):
            kept_consistent(other)


def test_a_stage_may_begin_to_be_consistent_and_not_cease() -> None:
    plain, kept = (SkipConfig(still_codes=3, clip_codes=2, consistent=consistent) for consistent in (False, True))
    network = _with_codes(plain).float()
    sizes = replace(network.config, skip=kept)
    begun = _adapted(network, sizes, "before", generator())
    assert begun.config == sizes
    with pytest.raises(InputError, match="sizes are not those of this run"):
        _adapted(begun, network.config, "before", generator())
    # Digits are not consistent, whatever the configuration says.
    discrete = FSQConfig(codebook_size=4096, codebooks=2)
    for start in (network, begun, quantised(network, discrete)):
        adapted = _adapted(start, replace(sizes, quantizer=discrete), "before", generator())
        assert adapted.skip is not None
        assert not adapted.skip.consistent


def test_a_discrete_network_has_the_weights_of_the_continuous_one() -> None:
    network, quantizer = random_network(), FSQConfig(codebook_size=4096, codebooks=2)
    discrete = quantised(network, quantizer)
    assert all(torch.equal(tensor, discrete.state_dict()[name]) for name, tensor in network.state_dict().items())
    encoding = discrete.encode(visuals((8, 8)))
    assert encoding.indices is not None
    assert discrete.quantizer is not None
    mean = network.encode(visuals((8, 8))).posterior.mean.features
    torch.testing.assert_close(encoding.latents.features, discrete.quantizer.quantize(mean).values)
    assert quantised(discrete, quantizer) is discrete
    with pytest.raises(InputError, match="discrete already"):
        quantised(discrete, FSQConfig(codebook_size=64, codebooks=6))


def test_a_stage_goes_on_from_the_model_of_the_one_before(tmp_path: Path) -> None:
    tower = StubTower()
    first = starting_model(smoke(3, "start={kind: scratch}"), tower, lambda: [])
    save_trained(first, tmp_path / "stage3" / "model")
    start = f"start={{kind: model, source: {tmp_path}/stage3}}"
    second = starting_model(smoke(4, start), tower, lambda: [])
    assert second.network.quantizer is not None
    same: dict[str, Tensor] = second.state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.state_dict().items())
    assert AToken.from_pretrained(tmp_path / "stage3" / "model").gaussian_decoder is not None
    with pytest.raises(InputError, match="whose sizes are not those of this run"):
        starting_model(smoke(4, start, "model.encoder.mlp_width=64"), tower, lambda: [])
    with pytest.raises(InputError, match="never taken away"):
        starting_model(smoke(3, start, "latent_channels=8"), tower, lambda: [])


def test_an_alignment_is_kept_with_its_tower(tmp_path: Path) -> None:
    config = AlignmentConfig(width=8, text_width=16, tower="minilm", tower_name="stub")
    alignment = TextAlignment(config, scale=2.0)
    alignment.reset_parameters(generator())
    save_text_alignment(alignment, tmp_path)
    again = load_text_alignment(tmp_path)
    pooled = torch.randn(3, 8, generator=generator())
    assert again.config == config
    assert float(again.scale.scale) == 2.0
    assert torch.equal(again.encode_pooled(pooled), alignment.encode_pooled(pooled))
    torch.testing.assert_close(again.encode_pooled(pooled).norm(dim=1), torch.ones(3))
    half = pooled.bfloat16()  # as models in half precision pool
    assert torch.equal(again.encode_pooled(half), again.encode_pooled(half.float()))
    plain = TextAlignment(replace(config, width=16, projection=False))
    assert plain.projection is None
    with pytest.raises(InputError, match="need a projection"):
        replace(config, projection=False)
    (tmp_path / "text_alignment" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="was not aligned with texts"):
        load_text_alignment(tmp_path)


def test_gradients_reach_every_part() -> None:
    model = starting_model(smoke(3, "start={kind: scratch}"), StubTower(), lambda: [])
    assert isinstance(model, TrainedModel)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"network", "alignment", "gaussians"}
    assert all(parameter.requires_grad for parameter in model.parameters())
