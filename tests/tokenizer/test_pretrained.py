"""The models that come along keep what their card says, on pictures they have never seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tokenizer import AToken
from tokenizer.assets.load import load_mesh
from tokenizer.assets.pipeline import asset_views
from tokenizer.assets.raycast import render_views
from tokenizer.cameras import sphere_cameras
from tokenizer.checkpoints import bundled_models
from tokenizer.cli import main
from tokenizer.demo import ASSET, make
from tokenizer.evaluation import assets, nano
from tokenizer.evaluation.codecs import ModelCodec
from tokenizer.evaluation.linear_code import LinearCodes

NAMES = ("atoken-nano", "atoken-nano-d")


@pytest.mark.parametrize("name", NAMES)
def test_is_small_and_complete(name: str) -> None:
    folder = bundled_models()[name]
    assert (folder / "model.safetensors").stat().st_size <= 16_000_000
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        assert sum(file.get_tensor(key).numel() for key in file.keys()) <= 8_000_000  # noqa: SIM118
    assert "licence" in (folder / "README.md").read_text(encoding="utf-8").lower()


def test_beats_the_best_linear_code_of_its_size() -> None:
    """By 1 dB and in LPIPS, on the six photographs and the film that no training has seen."""
    linear = LinearCodes.load(Path(__file__).parent.parent / "linear_code.npz")
    model = AToken.from_pretrained("atoken-nano", dtype=torch.float32)
    visuals, meter = [*nano.photographs(), nano.video()], nano.Meter("cpu")
    ours = nano.evaluate(ModelCodec(model), visuals, meter)
    theirs = nano.evaluate(linear, visuals, meter)
    for name in (nano.MEAN, "bikes"):
        assert ours[name]["psnr"] >= theirs[name]["psnr"] + 1.0, name
        for distance in ("lpips_vgg16", "lpips_alexnet"):
            assert ours[name][distance] < theirs[name][distance], (name, distance)


def test_half_precision_and_indices_alone_are_enough() -> None:
    """bfloat16 costs next to nothing, and the discrete model decodes from 96 bits a token."""
    [photograph] = [visual for visual in nano.photographs() if visual.name == "coffee"]

    def psnr(name: str, dtype: torch.dtype) -> float:
        model = AToken.from_pretrained(name, dtype=dtype)
        copy = ModelCodec(model).reconstruct(photograph.frames)
        return float(10 * np.log10(255**2 / np.square(copy.astype(float) - photograph.frames).mean()))

    assert psnr("atoken-nano", torch.bfloat16) >= psnr("atoken-nano", torch.float32) - 0.1
    discrete = AToken.from_pretrained("atoken-nano-d", dtype=torch.float32)
    encoding = discrete.encode_image(photograph.frames[0])
    assert encoding.indices is not None
    assert discrete.quantizer is not None
    assert discrete.quantizer.bits_per_token == 96
    assert encoding.indices.features.dtype == torch.int32
    values = discrete.quantizer.decode(encoding.indices.features)
    assert torch.equal(values, encoding.latents.features)
    assert psnr("atoken-nano-d", torch.float32) >= 24


def test_gaussians_beat_flat_voxels() -> None:
    """By 3 dB, on views of a model of the evaluation split that neither has seen."""
    mesh = load_mesh(ASSET).normalised()
    seen, _ = asset_views(mesh)
    unseen = render_views(mesh, sphere_cameras(8, mesh.radius, phase=1.0), 256)
    wanted = unseen.composited()
    for name, margin in (("atoken-nano", 3.0), ("atoken-nano-d", 3.0)):
        model = AToken.from_pretrained(name, dtype=torch.float32)
        decoder = model.gaussian_decoder
        assert decoder is not None
        assert sum(parameter.numel() for parameter in decoder.parameters()) <= 4_000_000
        flat = assets.flat_psnr(seen, unseen.cameras, wanted, decoder.config.resolution)
        ours = assets.mean_psnr(assets.draw(model.reconstruct_asset(seen), unseen.cameras, 256), wanted)
        assert ours >= max(flat.values()) + margin, (name, ours, flat)


def test_asking_how_the_demo_is_made_makes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files are the package's own, and another FFmpeg writes other bytes."""
    monkeypatch.setattr("sys.argv", ["make.py", "--help"])
    for writer in ("save_image", "VideoWriter", "_make_asset"):
        monkeypatch.setattr(make, writer, lambda *_, **__: pytest.fail("it wrote"))
    with pytest.raises(SystemExit) as end:
        make.main()
    assert end.value.code == 0
    assert "usage: python -m tokenizer.demo.make" in capsys.readouterr().out


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--out", str(tmp_path / "demo")])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    written = [path for path in (tmp_path / "demo").rglob("*") if path.is_file()]
    assert len(written) == 8
    assert all(path.name in printed for path in written)
