"""What only a CUDA device can show: no host synchronisation, the fast kernels, compilation, parity there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tokenizer.networks import random_latents, random_network, visuals
from tokenizer.gaussians import GaussianDecoder, GaussianDecoderConfig
from tokenizer.model import attention
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.attention import attention_backend
from tokenizer.model.config import ATokenConfig, FSQConfig, TransformerConfig
from tokenizer.model.context import Tiling
from tokenizer.model.plan import tile_plan
from tokenizer.model.transformer import Attention
from tokenizer.parity.recording import Recording
from tokenizer.parity.runner import check
from tokenizer.patches import visuals_to_tokens
from tokenizer.sparse import SparseTokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]

# Root mean square of the difference to float32 over the standard deviation; FORMAT 14 measured 1% for the reference.
BFLOAT16_TOLERANCE = 3e-2

SHAPES = ((64, 96), (33, 32, 64), (64, 32), (16, 64, 64))


def network_of(discrete: bool = False) -> ATokenNetwork:
    """Released patches and 72-wide heads, but two blocks; random weights."""
    config = ATokenConfig(
        name="gpu-test",
        encoder=TransformerConfig(width=288, depth=2, heads=4, mlp_width=400, norm="layer", bias=True, qk_norm=False),
        decoder=TransformerConfig(width=288, depth=2, heads=4, mlp_width=400, norm="rms", bias=False, qk_norm=True),
        quantizer=FSQConfig() if discrete else None,
    )
    network = ATokenNetwork(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    return network.eval().requires_grad_(False)


def batch(*shapes: tuple[int, ...], seed: int = 0) -> SparseTokens:
    generator = torch.Generator().manual_seed(seed)
    return visuals_to_tokens([torch.rand(*shape, 3, generator=generator) * 2 - 1 for shape in shapes])[0]


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    difference = ours.detach().cpu().double() - exact.double()
    return float(difference.square().mean().sqrt() / exact.double().std())


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Within this fixture any wait of the host for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("discrete", [False, True])
def test_nothing_waits_for_the_device(dtype: torch.dtype, discrete: bool, request: pytest.FixtureRequest) -> None:
    """Tokens that start on the CPU are encoded and decoded without a single synchronisation."""
    network = network_of(discrete).to("cuda", dtype)
    warm_up = batch((32, 32)).to("cuda")
    network.decode(network.encode(warm_up).latents)  # kernels load and allocate on first use
    tokens = batch(*SHAPES)
    request.getfixturevalue("no_synchronisation")
    moved = tokens.to("cuda", dtype)
    encoding = network.encode(moved)
    patches = network.decode(encoding.latents)
    with_context = network.decode(encoding.latents, Tiling(stride=12, context=4))
    if encoding.indices is not None:
        network.decode(encoding.indices)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(patches.features).all()
    assert torch.isfinite(with_context.features).all()


@pytest.mark.parametrize("tiling", [None, Tiling(stride=12, context=4), Tiling(stride=4, context=8)])
def test_float32_agrees_with_the_cpu(tiling: Tiling | None) -> None:
    network, tokens = network_of(), batch(*SHAPES)
    encoding = network.encode(tokens)
    patches = network.decode(encoding.posterior.mean, tiling)
    network.to("cuda")
    there = network.encode(tokens.to("cuda"))
    assert distance(there.features.features, encoding.features.features) < 1e-4
    assert distance(there.pooled, encoding.pooled) < 1e-4
    assert distance(network.decode(there.posterior.mean, tiling).features, patches.features) < 1e-4


@pytest.mark.parametrize("tiling", [None, Tiling(stride=12, context=4)])
def test_the_fast_kernel_agrees_with_float32(tiling: Tiling | None) -> None:
    """flash-attn or torch's varlen kernel, whichever is there, on segments of many lengths."""
    assert attention_backend("cuda", torch.bfloat16) in ("flash-attn", "torch varlen")
    network, tokens = network_of(), batch(*SHAPES)
    encoding = network.encode(tokens)
    patches = network.decode(encoding.posterior.mean, tiling)
    network.to("cuda", torch.bfloat16)
    there = network.encode(tokens.to("cuda"))
    assert there.features.dtype == torch.bfloat16
    assert distance(there.features.features, encoding.features.features) < BFLOAT16_TOLERANCE
    assert distance(there.pooled, encoding.pooled) < BFLOAT16_TOLERANCE
    assert distance(network.decode(there.posterior.mean, tiling).features, patches.features) < BFLOAT16_TOLERANCE


def test_items_of_a_batch_do_not_mix_in_the_fast_kernel() -> None:
    network = network_of().to("cuda", torch.bfloat16)
    tokens = batch(*SHAPES).to("cuda")
    changed = tokens.features.clone()
    first, last = int(tokens.offsets[1]), int(tokens.offsets[2])
    changed[first:last] = -changed[first:last]
    before, after = (network.encode(t).features.features for t in (tokens, tokens.with_features(changed)))
    assert torch.equal(before[:first], after[:first])
    assert torch.equal(before[last:], after[last:])
    assert not torch.equal(before[first:last], after[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_graph_breaks(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    network = network_of().to("cuda", dtype)
    assert network.decoder is not None
    encoder = torch.compile(network.encoder, fullgraph=True)
    decoder = torch.compile(network.decoder, fullgraph=True)
    tolerance = 1e-4 if dtype == torch.float32 else BFLOAT16_TOLERANCE
    for shapes in (SHAPES, ((64, 64), (16, 32, 32))):
        tokens = batch(*shapes).to("cuda", dtype)
        plan = tile_plan(tokens, network.config.tile_steps)
        features, parameters = encoder(tokens.features, plan)
        latents = parameters.chunk(2, dim=-1)[0]
        patches = decoder(latents, plan)
        expected = network.encode(batch(*shapes).to("cuda", dtype))
        assert distance(features, expected.features.features.cpu()) < tolerance
        exact = network.decode(tokens.with_features(latents)).features
        assert distance(patches, exact.cpu()) < tolerance


def test_compiled_training_step() -> None:
    torch.compiler.reset()
    network = network_of().to("cuda", torch.bfloat16).requires_grad_(True)
    encoder = torch.compile(network.encoder, fullgraph=True)
    tokens = batch(*SHAPES).to("cuda", torch.bfloat16)
    features, parameters = encoder(tokens.features, tile_plan(tokens, network.config.tile_steps))
    (features.float().square().mean() + parameters.float().square().mean()).backward()
    gradients = [parameter.grad for parameter in network.encoder.transformer.parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("cudnn", [False, True])
def test_gradients_of_the_fast_kernel_agree_with_float32(cudnn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((64, 96),) * 3 if cudnn else SHAPES
    calls = 0

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return batched(*arguments)

    batched = attention._batched_runs

    def gradient(network: ATokenNetwork, tokens: SparseTokens) -> torch.Tensor:
        network.requires_grad_(True)
        encoding = network.encode(tokens)
        network.decode(encoding.posterior.mean).features.float().square().mean().backward()
        weight = network.encoder.transformer.blocks[0].attention.qkv.weight  # type: ignore[union-attr]
        assert isinstance(weight, torch.nn.Parameter)
        assert weight.grad is not None
        return weight.grad.float().cpu()

    exact = gradient(network_of(), batch(*shapes))
    monkeypatch.setattr(attention, "_batched_runs", counted)
    network = network_of().to("cuda", torch.bfloat16)
    layers = [module for module in network.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.cudnn = cudnn
    ours = gradient(network, batch(*shapes).to("cuda"))
    assert distance(ours, exact) < 2 * BFLOAT16_TOLERANCE
    assert calls == (len(layers) if cudnn else 0)


def test_float64_is_exact_on_the_device() -> None:
    network, tokens = random_network(), visuals((8, 12), (33, 8, 4), (16, 8))
    latents = random_latents(tokens)
    expected = network.decode(latents).features
    there = ATokenNetwork(network.config).double()
    there.load_state_dict(network.state_dict())
    torch.testing.assert_close(there.to("cuda").decode(latents.to("cuda")).features.cpu(), expected, rtol=0, atol=1e-10)


def voxels(count: int) -> SparseTokens:
    generator = torch.Generator().manual_seed(1)
    cells = torch.randperm(20**3, generator=generator)[:count]
    positions = torch.stack([torch.ones_like(cells), cells // 400, cells // 20 % 20, cells % 20], dim=1)
    return SparseTokens(torch.randn(count, 768, generator=generator), positions, [count])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, BFLOAT16_TOLERANCE)])
def test_gaussian_decoder_agrees_with_the_cpu_and_does_not_wait(
    dtype: torch.dtype, tolerance: float, request: pytest.FixtureRequest
) -> None:
    decoder = GaussianDecoder(GaussianDecoderConfig(width=128, depth=4, heads=2, mlp_width=256))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    decoder.requires_grad_(False)
    assets = SparseTokens.cat([voxels(700), voxels(90)])
    expected = decoder(assets).features
    decoder.to("cuda", dtype)
    decoder(voxels(50).to("cuda"))
    request.getfixturevalue("no_synchronisation")
    moved = assets.to("cuda")
    raw, gaussians = decoder(moved), decoder.gaussians(moved)
    covariances = gaussians.covariances
    torch.cuda.set_sync_debug_mode("default")
    assert distance(raw.features, expected) < tolerance
    assert torch.isfinite(covariances).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_on_the_device(golden: Path, dtype: torch.dtype) -> None:
    rows = check(Recording(golden), torch.device("cuda"), dtype)
    assert [row for row in rows if not row.passed] == []
    assert sum(row.error is not None for row in rows) == 326
