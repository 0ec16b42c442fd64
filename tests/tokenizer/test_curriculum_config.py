"""The configurations of the stages: the paper's numbers, one run's model where the next one starts, data that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.config import DataConfig, SourceConfig
from data.decode.temporal import reconstruction_frames, understanding_frames
from data.mixture import ASSET_STAGE, EVERY_STEP, IMAGE_STAGE, VIDEO_STAGE, Task
from data.portions import share
from data.resolution import ResolutionSampler, token_count
from tests.tokenizer.curriculum_data import CONFIGS
from tokenizer.config import load_config, parse_config
from tokenizer.errors import InputError
from tokenizer.patches import PatchSize, visuals_to_tokens
from tokenizer.sparse import SparseTokens
from tokenizer.training.curriculum.codes import sample_patches
from tokenizer.training.curriculum.config import RunConfig, network_config

PAPER = ("stage1-image", "stage2-video", "stage3-3d", "stage4-discrete")
RATIOS = (IMAGE_STAGE, VIDEO_STAGE, ASSET_STAGE, ASSET_STAGE)
CHAINS = (PAPER, *(tuple(f"{size}-stage{number}" for number in (1, 2, 3, 4)) for size in ("nano", "smoke")))


def read(name: str) -> RunConfig:
    return load_config(RunConfig, CONFIGS / f"{name}.yaml")


def test_every_file_belongs_to_a_chain() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {name for chain in CHAINS for name in chain}


@pytest.mark.parametrize("chain", CHAINS)
def test_stages_follow_each_other_in_the_ratios_of_the_paper(chain: tuple[str, ...]) -> None:
    runs = [read(name) for name in chain]
    for number, (run, ratios) in enumerate(zip(runs, RATIOS, strict=True), start=1):
        data = parse_config(DataConfig, run.data, run.name)
        assert run.stage.number == number
        # Nano has a CPU and no pretrained encoder: it learns to understand 3D in more of its steps.
        assert set(data.ratios) == set(ratios) if "nano" in chain[0] else data.ratios == dict(ratios)
        assert data.every_step == EVERY_STEP
        assert set(data.budgets) == {*ratios, *EVERY_STEP} == {source.task for source in data.sources}
        assert all(parse_config(SourceConfig, source, run.name) for source in run.validation.sources)
        sizes = network_config(run)
        assert (sizes.quantizer is not None) == (number == 4)
        assert (run.gaussians is not None) == (number > 2)
        if number > 1:
            before = network_config(runs[number - 2])
            assert run.start.source == runs[number - 2].out
            grown = sizes.latent_channels > before.latent_channels
            assert grown if number == 2 else sizes.latent_channels == before.latent_channels
            assert (sizes.encoder, sizes.decoder) == (before.encoder, before.decoder)


def test_the_paper_s_numbers() -> None:
    runs = [read(name) for name in PAPER]
    assert [run.steps for run in runs] == [200_000, 200_000, 50_000, 100_000]
    assert [network_config(run).latent_channels for run in runs] == [32, 48, 48, 48]
    assert runs[0].start.kind == "siglip2"
    for run in runs:
        assert (run.optimizer.lr, run.optimizer.min_lr, run.optimizer.warmup) == (3e-4, 3e-5, 2000)
        assert (run.optimizer.betas, run.optimizer.weight_decay, run.optimizer.ema) == ((0.9, 0.95), 0.1, 0.9999)
        assert (run.loss.reconstruction, run.loss.semantic, run.loss.kl) == (0.2, 1.0, 1e-8)
        assert (run.loss.l1, run.loss.lpips, run.loss.gram, run.loss.clip) == (1.0, 10.0, 1e3, 1.0)
        assert run.optimizer.encoder_lr_factor == 0.1
    data = [parse_config(DataConfig, run.data, run.name) for run in runs]
    sides = [{source.task: source.decode.max_side for source in one.sources} for one in data]
    assert [side["image_reconstruction"] for side in sides] == [512, 1024, 2048, 2048]  # type: ignore[index]
    assert [side["video_reconstruction"] for side in sides[1:]] == [512, 1024, 1024]  # type: ignore[index]


def test_batch_sizes_lie_in_the_paper_s_ranges_and_belong_to_all_processes() -> None:
    ranges = {
        Task.IMAGE_UNDERSTANDING: (8192, 8192),
        Task.IMAGE_RECONSTRUCTION: (1024, 4096),
        Task.VIDEO_RECONSTRUCTION: (512, 1024),
        Task.ASSET_RECONSTRUCTION: (256, 512),
        # Not in the paper; see `tokenizer.losses.weights`.
        Task.VIDEO_UNDERSTANDING: (1024, 1024),
        Task.ASSET_UNDERSTANDING: (512, 512),
    }
    for name in PAPER:
        run = read(name)
        data = parse_config(DataConfig, run.data, name)
        assert data.batches.keys() == data.budgets.keys()
        assert all(ranges[task][0] <= count <= ranges[task][1] for task, count in data.batches.items())
        # Every one of 256 processes gets as many, and 24, which divide none of them, get some.
        assert {share(count, 255, 256) * 256 - count for count in data.batches.values()} == {0}
        assert all(share(count, 0, 24) for count in data.batches.values())
        assert run.accumulation == 1


@pytest.mark.parametrize("name", PAPER)
def test_the_largest_sample_of_every_source_fits_its_budget(name: str) -> None:
    run = read(name)
    data = parse_config(DataConfig, run.data, name)
    held_out = [parse_config(SourceConfig, source, name) for source in run.validation.sources]
    budgets = [*(data.budgets[source.task] for source in data.sources), *[run.validation.budget] * len(held_out)]
    for source, budget in zip([*data.sources, *held_out], budgets, strict=True):
        assert largest(source, run) <= budget, f"{name}: {source.name}"


def largest(source: SourceConfig, run: RunConfig) -> int:
    """Tokens of the largest sample that a source can give; of assets, which have no bound, a cube's whole surface."""
    decode = source.decode
    if source.task.startswith("asset"):
        assert run.gaussians is not None
        side = run.gaussians.resolution
        return decode.max_voxels or side**3 - (side - 2) ** 3
    if source.task.startswith("image"):
        frames = 1
    elif source.task == Task.VIDEO_RECONSTRUCTION:
        frames = max(len(reconstruction_frames(9999, (0.9, 0.5, u, 0.5), frames=decode.frames)) for u in (0.0, 0.999))
    else:
        moments = np.arange(0, 9999, 0.04)
        frames = len(understanding_frames(moments, fps=decode.fps, max_frames=decode.max_frames))
    views = []
    for rule in ("whole", "released"):
        sampler = ResolutionSampler(min_side=decode.min_side, max_side=decode.max_side, rule=rule)
        views += [sampler.draw((9999, 9999), seed=0, epoch=0, sample=str(number)).size for number in range(500)]
    tokens = max(token_count(size, frames) for size in views)
    # Draws come near the bound, which is a square of the largest side.
    bound = token_count((decode.max_side, decode.max_side), frames)
    assert 0.9 * bound < tokens <= bound
    return bound


@dataclass(frozen=True)
class Shown:
    """A batch of pixels, as far as fitting codes looks at one."""

    task: str
    pixels: list[Tensor]

    def tokens(self, *_: object, patch_size: PatchSize = (4, 16, 16)) -> SparseTokens:
        return visuals_to_tokens(self.pixels, patch_size)[0]


def test_codes_are_fitted_to_stills_and_to_clips_or_moving_pictures() -> None:
    patch = (4, 4, 4)
    column, row = np.meshgrid(np.arange(32), np.arange(32))
    picture = torch.from_numpy(np.stack([column, row, 0 * row], axis=-1) / 32).float()
    clip = picture.expand(8, -1, -1, -1) * 0.5
    stills, moved = sample_patches([Shown("image_reconstruction", [picture])] * 9, 64, patch, seed=0)  # type: ignore[list-item]
    assert stills.shape == (4, 16, 48)
    assert moved.shape == (4, 16, 192)
    # A picture that moves at a constant speed: its ramp changes by the same from each frame to the next.
    frames = moved.unflatten(2, (4, 16, 3))
    steps = (frames[:, :, 1:] - frames[:, :, :-1]) * 32
    torch.testing.assert_close(steps, steps[:, :1, :1, :1].expand_as(steps), rtol=0, atol=1e-4)
    assert float(steps.abs().max()) <= 2.0001
    both = [Shown("video_reconstruction", [clip]), Shown("image_reconstruction", [picture])] * 9
    _, clips = sample_patches(both, 64, patch, seed=0)  # type: ignore[arg-type]
    assert float(clips.max()) <= 0.5
    with pytest.raises(InputError, match="linear codes need 4 places"):
        sample_patches([Shown("image_reconstruction", [picture[:8, :8]])], 64, patch, seed=0)  # type: ignore[list-item]


@pytest.mark.parametrize("side", [8, 16])  # no place at all, and none for a camera to move over
def test_pictures_too_small_for_codes_are_not_looked_at_for_ever(side: int) -> None:
    def batches() -> Iterator[Shown]:
        for _ in range(200):
            yield Shown("image_reconstruction", [torch.zeros(side, side, 3)])
        pytest.fail("looks at more and more of them")

    with pytest.raises(InputError, match=r"linear codes need 3000 places .* allow larger crops"):
        sample_patches(batches(), 48_000, (4, 4, 4), seed=0)  # type: ignore[arg-type]


def test_a_run_reads_its_folder_relative_to_where_it_starts(tmp_path: Path) -> None:
    assert not Path(read("smoke-stage1").out).is_absolute()
    with pytest.raises(InputError, match="cannot be read"):
        load_config(RunConfig, tmp_path / "nothing.yaml")
