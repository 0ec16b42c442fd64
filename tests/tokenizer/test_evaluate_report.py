"""`atoken evaluate`: its report in a headless Chromium, baselines, autoencoders of diffusers, assets, and the card."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tokenizer.browser import Browser, Page
from tests.tokenizer.evaluation_files import options, picture_folder, scene, write_clip
from tokenizer import AToken, checkpoints
from tokenizer.assets.load import load_mesh
from tokenizer.assets.raycast import render_views
from tokenizer.cameras import sphere_cameras
from tokenizer.demo import ASSET
from tokenizer.errors import InputError
from tokenizer.evaluation.card import END, begin_mark, main, read_card
from tokenizer.evaluation.command.baselines import CODERS, best_within
from tokenizer.evaluation.command.datasets import open_source
from tokenizer.evaluation.command.diffusers_codec import load_diffusers
from tokenizer.evaluation.command.evaluate import evaluate
from tokenizer.evaluation.command.plots import Series, rate_distortion
from tokenizer.evaluation.command.presets import find_preset
from tokenizer.evaluation.command.runner import Runner
from tokenizer.evaluation.command.samples import load_sample
from tokenizer.evaluation.command.systems import ATokenSystem
from tokenizer.evaluation.linear_code import LinearCodes
from tokenizer.evaluation.metrics import PairMetrics

ROOT = Path(__file__).parent.parent
NASTY = "<img src=x onerror=alert(1)>.png"


def load(name: str, device: torch.device) -> AToken:
    return AToken.from_pretrained(name, device=device, dtype=torch.float32)


def test_report_opens_in_a_browser_shows_everything_and_sorts(
    tmp_path: Path, bundled: Path, needs_program: Callable[[str], None]
) -> None:
    needs_program("chromium")
    data, out = picture_folder(tmp_path / "data", 4), tmp_path / "out"
    (data / "blue" / "0.png").rename(data / "blue" / NASTY)
    write_clip(data / "clip.mp4", scene(3, 48, 64, frames=8))
    chosen = {"models": ["atoken-nano", "atoken-nano-d"], "baselines": ["jpeg"]}
    results = evaluate(options(data, out, **chosen), load)
    assert results is not None
    assert bundled.is_dir()
    browser = Browser(tmp_path)
    try:
        page = Page(browser, (1200, 900))
        page.go((out / "report.html").as_uri())
        page.wait("[...document.images].every(image => image.complete)")
        page.wait("[...document.querySelectorAll('video')].every(video => video.readyState >= 2)")
        assert page.complaints() == []
        assert all(url.startswith(("file:", "data:", "about:")) for url in page.requests())
        # Three examples of four systems and the original each; one clip.
        assert page.evaluate("[...document.images].map(image => image.naturalWidth)") == [52] * 15
        assert page.evaluate("document.querySelector('video').videoWidth") == 3 * 64 + 2 * 4
        assert page.evaluate("document.querySelectorAll('svg.plot circle').length") > 8
        assert NASTY in page.evaluate("document.body.textContent")
        systems = "[...document.querySelectorAll('#image tbody tr')].map(row => row.cells[0].textContent)"
        rows = results["kinds"]["image"]
        by_psnr = sorted(rows, key=lambda name: -rows[name]["figures"]["psnr"]["value"])
        assert page.evaluate(systems) == list(rows)
        press = "[...document.querySelectorAll('#image th button')].find(b => b.textContent === '{}').click()"
        page.evaluate(press.format("PSNR dB"))
        assert page.evaluate(systems) == by_psnr
        page.evaluate(press.format("PSNR dB"))
        assert page.evaluate(systems) == by_psnr[::-1]
        page.evaluate(press.format("system"))
        assert page.evaluate(systems) == sorted(rows)
        assert page.complaints() == []
        assert np.ptp(page.screenshot()) > 100
        # All systems are in one clip: it scrolls in a narrow window, where it would shrink to less than its controls.
        page.call("Emulation.setDeviceMetricsOverride", width=160, height=900, deviceScaleFactor=1, mobile=False)
        page.wait("document.querySelector('video').clientWidth === 3 * 64 + 2 * 4")
        assert page.evaluate("document.querySelector('.video figure').clientWidth") <= 160
    finally:
        browser.close()
    text = (out / "results.md").read_text(encoding="utf-8")
    assert f"| atoken-nano | {rows['atoken-nano']['samples']} |" in text
    assert "## Left out" in text


@pytest.mark.parametrize("name", ["jpeg", "webp", "x264"])
def test_codecs_spend_the_bits_they_may_and_no_more(name: str) -> None:
    coder = CODERS[name]
    noise = np.random.default_rng(0).integers(0, 40, (6, 47, 61, 3))
    frames = (scene(1, 47, 61, 6) // 2 + noise).astype(np.uint8)[: 1 if coder.kind == "image" else 6]
    worst, best = (coder.code(frames, quality, coder.settings[0])[0] for quality in coder.qualities)
    budget = 8 * (len(worst) + len(best)) / 2
    data, decode = best_within(coder, frames, budget)
    copy = decode()
    assert copy.shape == frames.shape
    assert copy.dtype == np.uint8
    assert 0.7 * budget < 8 * len(data) <= budget
    _, decode_worst = coder.code(frames, coder.qualities[0], coder.settings[0])
    figures = PairMetrics({}).measure([frames, frames], [copy, decode_worst()])
    assert figures[0]["psnr"] > figures[1]["psnr"] + 2
    smallest, _ = best_within(coder, frames, 8)
    assert len(smallest) <= len(worst)


def test_the_linear_code_counts_as_many_bits_as_the_model(tmp_path: Path, bundled: Path) -> None:
    assert bundled.is_dir()
    data = picture_folder(tmp_path / "data", 2)
    linear = ROOT / "linear_code.npz"
    results = evaluate(options(data, tmp_path / "out", baselines=["linear"], linear=linear), load)
    assert results is not None
    rows = results["kinds"]["image"]
    assert rows["linear"]["figures"]["bits_per_pixel"] == rows["atoken-nano"]["figures"]["bits_per_pixel"]
    assert rows["linear"]["figures"]["psnr"]["value"] > 25
    raw = next(iter(open_source(str(data)).read([0])))
    frames = load_sample(raw, find_preset("native")).frames
    wanted = PairMetrics({}).measure([frames], [LinearCodes.load(linear).reconstruct(frames)])[0]["psnr"]
    first = json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[0])
    assert first["systems"]["linear"]["psnr"] == wanted


def test_an_autoencoder_of_diffusers_is_measured_like_any_other(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)  # diffusers draws weights from the global generator alone
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    model.save_pretrained(tmp_path / "tiny-kl")
    data = picture_folder(tmp_path / "data", 2)
    chosen = {"models": [], "diffusers": [tmp_path / "tiny-kl"], "baselines": ["jpeg"]}
    results = evaluate(options(data, tmp_path / "out", **chosen), load)
    assert results is not None
    rows = results["kinds"]["image"]
    assert set(rows) == {"tiny-kl", "jpeg at the bits of tiny-kl"}
    pixels = (40 + 44) * 52
    assert rows["tiny-kl"]["figures"]["bits_per_pixel"]["value"] == (20 + 22) * 26 * 4 * 32 / pixels
    frames = load_sample(next(iter(open_source(str(data)).read([0]))), find_preset("native")).frames
    with torch.no_grad():
        latents = model.encode(torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
        copy = ((model.decode(latents).sample + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).byte().numpy()
    wanted = PairMetrics({}).measure([frames], [copy])[0]["psnr"]
    first = json.loads((tmp_path / "out" / "samples.jsonl").read_text().splitlines()[0])
    assert first["systems"]["tiny-kl"]["psnr"] == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(InputError, match=r"no config\.json there"):
        evaluate(options(data, tmp_path / "none", diffusers=[data]), load)


def test_a_temporal_decoder_behind_an_encoder_of_pictures_decodes_a_clip_at_once(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)  # diffusers draws weights from the global generator alone
    model = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2
    ).eval()
    model.save_pretrained(tmp_path / "tiny-svd")
    adapter = load_diffusers(tmp_path / "tiny-svd", torch.device("cpu"), torch.float32).adapter
    for frames in (scene(0, 20, 24), scene(1, 20, 24, 5)):
        with torch.inference_mode():
            code, bits = adapter.encode(frames)
            copy = adapter.decode(code)
            latents = model.encode(torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
            wanted = model.decode(latents, num_frames=len(frames)).sample
        assert bits == len(frames) * 10 * 12 * 4 * 32
        pixels = ((wanted + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
        # One grey value: frames are encoded one by one here and together there.
        assert np.abs(copy.astype(int) - pixels.int().numpy()).max() <= 1


def test_assets_are_measured_on_views_beside_flat_voxels(tmp_path: Path, bundled: Path) -> None:
    assert bundled.is_dir()
    mesh = load_mesh(ASSET).normalised()
    render_views(mesh, sphere_cameras(4, mesh.radius), 32).save(tmp_path / "data" / "bread")
    preset = replace(find_preset("toys4k"), views=2)
    results = evaluate(options(tmp_path / "data", tmp_path / "out", preset=preset, baselines=["flat"]), load)
    assert results is not None
    rows = results["kinds"]["asset"]
    assert set(rows) == {"atoken-nano", "flat voxels"}
    flat, ours = (rows[name]["figures"] for name in ("flat voxels", "atoken-nano"))
    assert flat["tokens"]["value"] == ours["tokens"]["value"] > 10
    assert flat["psnr"]["value"] > ours["psnr"]["value"]  # the tiny model's weights are random
    raw = next(iter(open_source(str(tmp_path / "data")).read([0])))
    sample = load_sample(raw, preset)
    assert sample.frames.shape == (2, 32, 32, 3)
    system = ATokenSystem(load("atoken-nano", torch.device("cpu")), "atoken-nano", preset)
    copy = system.reconstruct(sample)
    assert PairMetrics({}).measure([sample.frames], [copy.frames])[0]["psnr"] == pytest.approx(ours["psnr"]["value"])
    assert "image/webp" in (tmp_path / "out" / "report.html").read_text()


def test_plots_hold_every_mark_inside_the_frame() -> None:
    series = [Series("a<b", 0.4, 30.0, 28.0, 32.0, [(0.3, 29.0), (0.5, 41.0)]), Series("c", 6.0, 35.0, None, None, [])]
    plot = rate_distortion(series, "bits", "PSNR")
    assert plot.count("<circle") == 4
    assert "a&lt;b" in plot
    assert "a<b" not in plot
    assert rate_distortion([], "bits", "PSNR") == ""


class TestCard:
    def test_card_of_the_bundled_model_states_the_figures_of_its_weights(self) -> None:
        """PSNR and SSIM of the six photographs; LPIPS of the first."""
        stated, preset = read_card("atoken-nano", "packaged"), find_preset("nano")
        system = ATokenSystem(load("atoken-nano", torch.device("cpu")), "atoken-nano", preset)
        source = open_source("packaged")
        lpips = PairMetrics.from_packages(["alexnet"])
        for number, raw in enumerate(source.read(range(6))):
            sample = load_sample(raw, preset)
            meter = lpips if number == 0 else PairMetrics({})
            [found] = meter.measure([sample.frames], [system.reconstruct(sample).frames])
            wanted = stated[sample.id]["atoken-nano"]
            assert found["psnr"] == pytest.approx(wanted[0], abs=0.011), sample.id
            assert found["ssim"] == pytest.approx(wanted[1], abs=2e-4), sample.id
            if number == 0:
                assert found["lpips_alexnet"] == pytest.approx(wanted[3], abs=3e-4)
        assert len(stated) == len(source) == 7

    def test_figures_are_written_between_their_marks_and_only_for_the_same_weights(
        self, tmp_path: Path, bundled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        models = tmp_path / "models"
        (models / "atoken-nano").mkdir(parents=True)
        for file in (bundled / "atoken-nano").iterdir():
            if file.is_file():
                (models / "atoken-nano" / file.name).write_bytes(file.read_bytes())
        card = models / "atoken-nano" / "README.md"
        card.write_text(f"# before\n{begin_mark('data')}\nold\n{END}\nafter\n")
        monkeypatch.setattr(checkpoints, "PRETRAINED", models)
        data, out = picture_folder(tmp_path / "data", 3), tmp_path / "out"
        evaluate(options(data, out), load)
        assert main([str(out / "results.json")]) == 0
        text = card.read_text()
        assert text.startswith("# before\n")
        assert text.endswith("after\n")
        assert "old" not in text
        line: Any = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
        assert read_card("atoken-nano", "data")[line["id"]]["atoken-nano"][0] == round(
            line["systems"]["atoken-nano"]["psnr"], 2
        )
        weights = models / "atoken-nano" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
        capsys.readouterr()
        assert main([str(out / "results.json")]) == 1
        assert "other weights" in capsys.readouterr().err
        assert card.read_text() == text

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"models": [], "adapters": ["tests.tokenizer.evaluation_files:Coarse"]}, "'coarse' is not a bundled"),
            ({}, "has no lines '<!-- figures on data: written by atoken evaluate --card -->'"),
        ],
    )
    def test_figures_that_no_card_has_a_place_for_are_not_measured(
        self,
        tmp_path: Path,
        bundled: Path,
        monkeypatch: pytest.MonkeyPatch,
        changes: dict[str, Any],
        message: str,
    ) -> None:
        model = tmp_path / "models" / "atoken-nano"
        model.mkdir(parents=True)
        for file in (bundled / "atoken-nano").iterdir():
            (model / file.name).symlink_to(file)
        (model / "README.md").write_text("# a card of other sets\n")
        monkeypatch.setattr(checkpoints, "PRETRAINED", model.parent)
        monkeypatch.setattr(Runner, "run", None)
        with pytest.raises(InputError, match=message):
            evaluate(options(picture_folder(tmp_path / "data", 2), tmp_path / "out", card=True, **changes), load)
        assert not (tmp_path / "out").exists()
