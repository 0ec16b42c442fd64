"""The linear baseline, the codecs, and the script that measures both."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.evaluation import linear_code, nano
from tokenizer.evaluation.codecs import ModelCodec
from tokenizer.evaluation.command.baselines import load_linear
from tokenizer.evaluation.linear_code import IMAGE_PATCH, VIDEO_PATCH, LinearCode, LinearCodes
from tokenizer.evaluation.metrics import psnr
from tokenizer.losses.lpips import LPIPS
from tokenizer.media import VideoWriter
from tokenizer.patches import PatchSize, visuals_to_tokens
from tokenizer.sparse import SparseTokens
from tokenizer.training.curriculum import launch
from tokenizer.training.curriculum.config import RunConfig

RUN = Path(__file__).parents[2] / "configs/tokenizer/stages/smoke-stage2.yaml"
U8 = NDArray[np.uint8]


def _one_line(action: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        action()
    assert "\n" not in str(caught.value)


def _smooth(shape: tuple[int, ...], seed: int) -> U8:
    """Random frames [T, H, W, 3] that neighbouring pixels share most of."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, size=(12, 12, 3), dtype=np.uint8))
    still = np.array(coarse.resize((shape[2], shape[1]), Image.Resampling.BICUBIC))
    frames = np.stack([np.roll(still, step, axis=1) for step in range(shape[0])]).astype(int)
    noisy: U8 = np.clip(frames + rng.integers(-3, 4, size=frames.shape), 0, 255).astype(np.uint8)
    return noisy


def _patches(count: int = 200) -> Tensor:
    """Patches [count, 768] in [-1, 1], float64."""
    pixels = np.concatenate([_smooth((1, 16, 16, 3), number).reshape(1, -1) for number in range(count)])
    return torch.from_numpy(pixels / 127.5 - 1)


def test_fit_equals_singular_values_of_the_same_patches() -> None:
    patches = _patches()
    code = LinearCode.fit(patches.split(30), IMAGE_PATCH, components=10)
    pixels = patches.numpy()
    _, singular, vectors = np.linalg.svd(pixels - pixels.mean(0), full_matrices=False)
    np.testing.assert_allclose(code.mean.numpy(), pixels.mean(0), atol=1e-12)
    np.testing.assert_allclose(code.variance.numpy(), singular[:10] ** 2 / len(pixels), rtol=1e-9)
    projection = (code.basis @ code.basis.T).numpy()
    np.testing.assert_allclose(projection, vectors[:10].T @ vectors[:10], atol=1e-8)
    torch.testing.assert_close(code.basis.T @ code.basis, torch.eye(10, dtype=torch.float64))


def test_error_is_the_variance_left_out_and_no_other_basis_is_better() -> None:
    pixels = _patches()
    code = LinearCode.fit([pixels], IMAGE_PATCH, components=10)
    error = (code.decode(code.encode(pixels)) - pixels).square().sum(1).mean()
    total = (pixels - pixels.mean(0)).square().sum(1).mean()
    torch.testing.assert_close(error, total - code.variance.sum())
    other, _ = torch.linalg.qr(torch.randn(768, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    worse = LinearCode(IMAGE_PATCH, code.mean, other, code.variance)
    assert (worse.decode(worse.encode(pixels)) - pixels).square().sum(1).mean() > error
    assert code.encode(pixels.float()).dtype == torch.float64


def test_batches_do_not_change_the_code() -> None:
    patches = _patches()
    whole = LinearCode.fit([patches], IMAGE_PATCH, components=5)
    parts = LinearCode.fit(patches.split(19), IMAGE_PATCH, components=5)
    torch.testing.assert_close(whole.basis, parts.basis, atol=1e-9, rtol=0)  # signs included


@pytest.mark.parametrize(("patch", "shape"), [(IMAGE_PATCH, (1, 37, 50, 3)), (VIDEO_PATCH, (6, 33, 17, 3))])
def test_a_complete_basis_returns_every_pixel_of_odd_sizes(patch: tuple[int, int, int], shape: tuple[int, ...]) -> None:
    size = patch[0] * 768
    identity = torch.eye(size, dtype=torch.float64)
    code = LinearCode(patch, torch.full((size,), 0.1, dtype=torch.float64), identity, torch.ones(size))
    frames = _smooth(shape, 3)
    assert np.array_equal(code.reconstruct(frames), frames)


def test_reconstruction_pads_with_edges_and_clips() -> None:
    # Only the last column of the patch is coded: of a picture 3 wide it must see column 2, repeated.
    basis = torch.zeros(768, 3, dtype=torch.float64)
    grid = torch.arange(768).reshape(16, 16, 3)
    for channel in range(3):
        basis[grid[:, 15, channel], channel] = 0.25
    code = LinearCode(IMAGE_PATCH, torch.zeros(768, dtype=torch.float64), basis * 4, torch.ones(3))
    seen = code.encode(torch.linspace(-1, 1, 768).expand(1, -1))
    assert torch.allclose(seen, torch.linspace(-1, 1, 768).double()[grid[:, 15]].sum(0)[None])
    picture = np.zeros((1, 16, 3, 3), np.uint8)
    picture[:, :, 2] = 255
    spread = LinearCode(IMAGE_PATCH, torch.full((768,), 1.5, dtype=torch.float64), basis, torch.ones(3))
    assert np.array_equal(spread.reconstruct(picture), np.full_like(picture, 255))


@dataclass(frozen=True)
class _Batch:
    """A batch of pixels [T, H, W, 3] in [-1, 1], as far as sampling patches looks at one."""

    task: str
    frames: Tensor

    def tokens(self, *_: object, patch_size: PatchSize = VIDEO_PATCH) -> SparseTokens:
        frames = self.frames if len(self.frames) > 1 else self.frames[0]
        return visuals_to_tokens([frames], patch_size)[0]


def _training_data(config: RunConfig) -> Iterator[_Batch]:
    """Pictures and clips that look alike nowhere; the seed of a run decides which."""
    for number in itertools.count(100 * config.seed):
        for task, frames in (("image_reconstruction", 1), ("video_reconstruction", 4), ("image_understanding", 1)):
            pixels = torch.from_numpy(_smooth((frames, 80, 96, 3), 2 * number + (frames > 1))).float() / 127.5 - 1
            yield _Batch(task, torch.zeros_like(pixels) if "understanding" in task else pixels)


def test_codes_are_fitted_to_what_a_run_trains_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "training_batches", _training_data)
    monkeypatch.setattr(linear_code, "PATCHES", 640)
    # Small patches: their eigenvectors are found much sooner.
    still, clip_patch = (1, 8, 8), (2, 8, 8)
    monkeypatch.setattr(linear_code, "VIDEO_PATCH", clip_patch)
    monkeypatch.setattr(linear_code, "_NAMES", {"image": still, "video": clip_patch})
    codes = linear_code.fit_to_training_data(RUN)
    assert codes.image.basis.shape == (192, 48)
    assert codes.video.basis.shape == (384, 48)
    clip = _smooth((6, 64, 64, 3), 1)
    assert np.array_equal(codes.reconstruct(clip), codes.video.reconstruct(clip))
    assert np.array_equal(codes.reconstruct(clip[:1]), codes.image.reconstruct(clip[:1]))
    for frames, code in ((clip, codes.video), (clip[:1], codes.image)):
        unfitted = LinearCode(code.patch_size, code.mean, _random_code(code.patch_size).basis, code.variance)
        assert psnr(frames, code.reconstruct(frames)) > psnr(frames, unfitted.reconstruct(frames)) + 3
    again, other = (linear_code.fit_to_training_data(RUN, seed) for seed in (0, 1))
    assert torch.equal(again.video.basis, codes.video.basis)
    assert not torch.equal(other.image.mean, codes.image.mean)


def test_codes_survive_saving(tmp_path: Path) -> None:
    codes = LinearCodes(_random_code(IMAGE_PATCH), _random_code(VIDEO_PATCH))
    codes.save(tmp_path / "linear.npz")
    loaded = LinearCodes.load(tmp_path / "linear.npz")
    for a, b in ((codes.image, loaded.image), (codes.video, loaded.video)):
        assert a.patch_size == b.patch_size
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.basis, b.basis)
        assert torch.equal(a.variance, b.variance)


def test_bad_data_and_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _one_line(lambda: LinearCode.fit([_patches(20)], IMAGE_PATCH), "needs more than 20 patches")
    _one_line(lambda: load_linear(tmp_path / "nowhere.yaml", 0), "nowhere.yaml: cannot be read")
    monkeypatch.chdir(tmp_path)  # where none of the run's sets are
    _one_line(lambda: load_linear(RUN, 0), "datasets/smoke/images")
    damaged = tmp_path / "linear.npz"
    _one_line(lambda: LinearCodes.load(damaged), "not a linear code")
    for content in (b"", b"PK\x03\x04 and then nothing"):
        damaged.write_bytes(content)
        _one_line(lambda: LinearCodes.load(damaged), "not a linear code")
    np.savez(damaged, image_mean=np.zeros(5), image_basis=np.zeros((5, 2)), image_var=np.zeros(2))
    _one_line(lambda: LinearCodes.load(damaged), "image code has basis")


def _random_code(patch_size: tuple[int, int, int]) -> LinearCode:
    size = 3 * math.prod(patch_size)
    generator = torch.Generator().manual_seed(size)
    basis, _ = torch.linalg.qr(torch.randn(size, 48, dtype=torch.float64, generator=generator))
    mean = torch.randn(size, dtype=torch.float64, generator=generator) / 4
    return LinearCode(patch_size, mean, basis, torch.rand(48, dtype=torch.float64, generator=generator))


@dataclass
class _Latents:
    latents: SparseTokens


class _PassingModel:
    """A model whose latents are the patches themselves."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seen: list[SparseTokens] = []

    def encode(self, patches: SparseTokens, /) -> _Latents:
        self.seen.append(patches)
        return _Latents(patches.to(dtype=torch.bfloat16) if len(self.seen) == 3 else patches)

    def decode(self, latents: SparseTokens, /) -> SparseTokens:
        return latents


def test_model_codec_returns_odd_sizes_and_keeps_stills_apart() -> None:
    model = _PassingModel()
    codec = ModelCodec(model)
    still, clip = _smooth((1, 37, 50, 3), 0), _smooth((6, 33, 17, 3), 1)
    assert np.array_equal(codec.reconstruct(still), still)
    assert np.array_equal(codec.reconstruct(clip), clip)
    assert codec.reconstruct(clip).dtype == np.uint8  # from bfloat16 too
    assert (model.seen[0].features[:, 768:] == 0).all()  # a still: three zero frames
    assert model.seen[1].num_tokens == 2 * 3 * 2


class _MeanDistance(nn.Module):
    """Stands in for LPIPS, whose weights may not be installed."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean((1, 2, 3))


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> nano.Meter:
    monkeypatch.setattr(LPIPS, "from_package", lambda _: _MeanDistance())
    return nano.Meter()


class _Darker:
    """A codec that loses a constant."""

    def __init__(self, loss: int) -> None:
        self.loss = loss

    def reconstruct(self, frames: U8) -> U8:
        return frames - np.uint8(self.loss)


def _visuals() -> list[nano.Visual]:
    grey = np.full((1, 20, 24, 3), 100, np.uint8)
    return [
        nano.Visual("a", grey),
        nano.Visual("b", grey + np.uint8(50)),
        nano.Visual("film", np.tile(grey, (19, 1, 1, 1))),
    ]


def test_figures_means_and_differences(meter: nano.Meter, tmp_path: Path) -> None:
    results = nano.run({"linear": _Darker(4), "model": _Darker(2)}, _visuals(), meter, tmp_path)
    assert results["linear"]["a"]["psnr"] == pytest.approx(20 * np.log10(255 / 4))
    assert results["linear"]["film"]["lpips_vgg16"] == pytest.approx(4 / 127.5)
    mean = (results["model"]["a"]["ssim"] + results["model"]["b"]["ssim"]) / 2
    assert results["model"][nano.MEAN]["ssim"] == pytest.approx(mean)  # the film does not count
    assert results["difference"]["film"]["psnr"] == pytest.approx(20 * np.log10(2))
    assert results["difference"][nano.MEAN]["lpips_alexnet"] == pytest.approx(-2 / 127.5)
    assert nano.evaluate(_Darker(2), _visuals(), meter) == results["model"]
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written.pop("sizes") == {"a": [1, 20, 24], "b": [1, 20, 24], "film": [19, 20, 24]}
    assert written == results
    picture = np.asarray(Image.open(tmp_path / "b.png"))
    assert picture.shape == (20, 3 * 24 + 2 * 4, 3)
    assert picture[0, [0, 23, 24, 28, 79], 0].tolist() == [150, 150, 255, 146, 148]


def test_exact_copies_are_valid_json(meter: nano.Meter, tmp_path: Path) -> None:
    nano.run({"linear": _Darker(0)}, _visuals(), meter, tmp_path)
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert json.loads(text)["linear"]["a"]["psnr"] is None
    assert "Infinity" not in text


def test_pictures_of_one_name_are_refused(meter: nano.Meter, tmp_path: Path) -> None:
    visuals = [*_visuals(), nano.Visual("a", _visuals()[0].frames)]
    _one_line(lambda: nano.run({"linear": _Darker(1)}, visuals, meter, tmp_path), "two pictures are called 'a'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("meter")
def test_command_measures_given_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(_smooth((1, 400, 300, 3), 0)[0]).save(tmp_path / "photo.png")
    with VideoWriter(tmp_path / "film.mp4", 8, 96, 128) as writer:
        writer.write(_smooth((40, 96, 128, 3), 5))
    fits: list[Path] = []

    def fit(run: Path, _seed: int) -> LinearCodes:
        fits.append(run)
        return LinearCodes(*(_random_code(patch) for patch in (IMAGE_PATCH, VIDEO_PATCH)))

    monkeypatch.setattr(nano, "fit_to_training_data", fit)
    command = ["--photographs", str(tmp_path / "photo.png"), "--video", str(tmp_path / "film.mp4"), "--json"]
    command += ["--data", "run.yaml", "--linear", str(tmp_path / "linear.npz"), "--out", str(tmp_path / "out")]
    assert nano.main(command) == 0
    first = json.loads(capsys.readouterr().out)
    sizes = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))["sizes"]
    assert sizes == {"photo": [1, 341, 256], "film": [32, 192, 256]}
    assert set(first["linear"]) == {"photo", "film", nano.MEAN}
    assert nano.main(command) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert fits == [Path("run.yaml")]  # the second time it was read from the file


@pytest.mark.usefixtures("meter")
def test_command_without_a_linear_code_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nano.main(["--out", str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
