"""Where a run starts: linear codes that are what they claim, earlier models, and a store that keeps its validation
pictures to itself.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.sources.store import StoreWriter
from tests.tokenizer.networks import small_config
from tests.tokenizer.test_checkpoints import refused
from tests.tokenizer.test_training import BATCH, PATCH, TINY, file_name, network, write_store
from tokenizer.checkpoints import save_network
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import FSQConfig, SkipConfig
from tokenizer.model.piecewise import LEVELS
from tokenizer.patches import float_to_uint8, unpatchify, visuals_to_tokens
from tokenizer.sparse import SparseTokens
from tokenizer.training.initialise import start_from_linear_codes, start_from_model
from tokenizer.training.linear_codes import fit_codes, principal_components
from tokenizer.training.store import VALIDATION_SHARE, CropBatch, TrainingStore

DISCRETE = replace(TINY, name="tiny-d", quantizer=FSQConfig(codebooks=2))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"))


# ---------------------------------------------------------------------- codes


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


def started(store: Path) -> tuple[ATokenNetwork, dict[str, float], dict[str, Tensor]]:
    net = network(TINY)
    stills, clips = TrainingStore(store, BATCH).sample_patches(1600, PATCH, (0, 1, 0))
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


def test_a_network_starts_as_its_linear_codes(store: Path) -> None:
    net, figures, patches = started(store)
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


def test_a_discrete_model_reads_the_digits_of_a_continuous_one(store: Path, tmp_path: Path) -> None:
    net, figures, patches = started(store)
    save_network(net, tmp_path / "model")
    discrete = network(DISCRETE)
    start_from_model(discrete, str(tmp_path / "model"))
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
    again = network(DISCRETE)  # a discrete model goes on as it is
    save_network(discrete, tmp_path / "discrete")
    start_from_model(again, str(tmp_path / "discrete"))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in discrete.state_dict().items())


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    return (values[..., None] - levels).abs().argmin(dim=-1)


def test_models_of_other_shapes_are_no_start(tmp_path: Path) -> None:
    save_network(network(TINY), tmp_path)
    for sizes in (replace(TINY, skip=SkipConfig(still_codes=4, clip_codes=2)), replace(TINY, skip=None)):
        text = refused(lambda: start_from_model(network(sizes), str(tmp_path)))  # noqa: B023
        assert text.startswith(f"{tmp_path}: does not have the shapes of this run's model (")
    assert "no model 'nowhere'" in refused(lambda: start_from_model(network(TINY), "nowhere"))


# ---------------------------------------------------------------------- the store


def test_a_batch_is_a_function_of_seed_and_step(store: Path) -> None:
    def batch(*seed: int) -> CropBatch:
        return TrainingStore(store, BATCH).batch(BATCH, PATCH, seed)

    one, again = batch(3, 7), batch(3, 7)
    assert torch.equal(one.patches.features, again.patches.features)
    assert torch.equal(one.patches.positions, again.patches.positions)
    for other in (batch(3, 8), batch(4, 7), batch(3, 2**32, 0)):
        shared = min(other.patches.num_tokens, one.patches.num_tokens)
        assert not torch.equal(other.patches.features[:shared], one.patches.features[:shared])
    assert (one.images, one.clips, one.patches.batch_size) == (3, 2, 5)
    assert one.image_tokens == int(one.patches.lengths[:3].sum()) == 3 * (one.image_side // 4) ** 2
    assert one.patches.lengths[3:].tolist() == [8, 8]
    assert bool((one.patches.features[: one.image_tokens, 48:] == 0).all())
    assert {batch(0, step).image_side for step in range(20)} == {8, 12}
    one.patches.validate()


def test_validation_sources_are_never_trained_on(tmp_path: Path) -> None:
    """Every array has a grey of its own, so a crop says where it is from. One is made of two files."""
    writer, held_out = StoreWriter(tmp_path), set()
    for grey in range(1, 101):
        names = [f"file{grey}.png", f"other{grey}.png"] if grey % 2 else f"file{grey}.png"
        shape = (16, 16, 3) if grey <= 50 else (8, 16, 16, 3)
        writer.add(np.full(shape, grey, np.uint8), "photograph", "tests", names, "CC0-1.0")
        if any(zlib.crc32(n.encode()) % VALIDATION_SHARE == 0 for n in ([names] if isinstance(names, str) else names)):
            held_out.add(grey)
    writer.finish()

    def seen(*, validation: bool) -> set[int]:
        part = TrainingStore(tmp_path, BATCH, validation=validation)
        greys = set()
        for step in range(250):
            greys |= set(float_to_uint8(part.batch(BATCH, PATCH, (0, step)).patches.features[:, 0]).tolist())
        return greys

    assert 5 < len(held_out) < 30
    assert seen(validation=True) == held_out
    assert seen(validation=False) == set(range(1, 101)) - held_out


def test_kinds_weigh_and_large_pictures_can_be_left_out(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path)
    for grey, (kind, side) in enumerate([("photograph", 16), ("stamp", 16), ("photograph", 40), ("other", 16)], 1):
        for number in range(3):
            name = file_name(f"{kind}{number}", validation=False)
            writer.add(np.full((side, side + 4, 3), grey, np.uint8), kind, "tests", name, "CC0-1.0")
    writer.finish()

    def counts(**changes: Any) -> np.ndarray[Any, Any]:
        config = replace(BATCH, clips=0, images=400, kinds={"photograph": 3.0, "stamp": 1.0, "other": 0.0}, **changes)
        features = TrainingStore(tmp_path, config).batch(config, PATCH, (0, 0)).patches
        return np.bincount(float_to_uint8(features.features[features.offsets[:-1], 0]).numpy(), minlength=5)

    everything = counts()
    assert everything[[0, 4]].tolist() == [0, 0]
    assert 60 < everything[2] < 140
    assert 60 < everything[1] - everything[3] + 100 < 140
    assert counts(largest_side=16)[3] == 0


def test_a_store_that_does_not_fit(store: Path, tmp_path: Path) -> None:
    whole = TrainingStore(store, BATCH)

    def batch(**changes: Any) -> str:
        config = replace(BATCH, **changes)
        return refused(lambda: TrainingStore(store, config).batch(config, PATCH, (0, 0)))

    assert "no training store here; make one with" in refused(lambda: TrainingStore(tmp_path / "x", BATCH))
    assert "no images of the kinds in batch.kinds" in batch(kinds={"stamps": 1.0})
    assert "no clips of the kinds in batch.kinds" in batch(kinds={"photograph": 1.0})
    assert "must be multiples of (4, 4)" in batch(image_sides=(10,))
    assert "must be multiples of (4, 4)" in batch(clip_sides=())
    assert "batch.clip_frames must be a multiple of 4, got 6" in batch(clip_frames=6)
    assert "hardly any array of 1 frames and 64 pixels; choose smaller crops" in batch(image_sides=(64,))
    assert "hardly any array of 16 frames and 8 pixels" in batch(clip_frames=16)
    assert whole.batch(BATCH, PATCH, (0, 0)).images == 3


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "not valid"),
        ("{}", "damaged (KeyError: 'arrays')"),
        ('{"arrays": [3]}', "damaged (TypeError"),
        ('{"arrays": [{"path": "images/0000.npy"}]}', "damaged (KeyError: 'kind')"),
        ('{"arrays": [{"path": "images/0000.npy", "kind": "film", "file": "f0"}]}', "damaged (ValueError"),
    ],
)
def test_a_damaged_store(tmp_path: Path, manifest: str, message: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0000.npy").write_bytes(b"no array")
    (tmp_path / "manifest.json").write_text(manifest)
    assert message in refused(lambda: TrainingStore(tmp_path, BATCH))
    (tmp_path / "manifest.json").write_text(json.dumps({"arrays": []}))
    assert "no images" in refused(lambda: TrainingStore(tmp_path, BATCH).batch(BATCH, PATCH, (0, 0)))
