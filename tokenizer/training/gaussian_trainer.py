"""Training a Gaussian decoder on rendered views: one process, exact on resume.

    python -m tokenizer.training.gaussian_trainer --config configs/tokenizer/nano-gaussians.yaml key=value ...

The autoencoder stays as it is, so pictures and videos stay as good as they were. A step takes one asset, decodes its
Gaussians and compares their picture with what the asset looks like from a few of its views. Optimiser, schedule,
average and logs are those of the curriculum, whose third stage starts from the decoder that comes out;
`python -m tokenizer.training.curriculum.curves RUN --out curves.png` draws what was measured.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenizer.api import AToken
from tokenizer.assets.packing import octants
from tokenizer.atomic import atomic_path, remove_leftovers
from tokenizer.cameras import Cameras
from tokenizer.checkpoints import find_model
from tokenizer.cli.outcome import run
from tokenizer.config import config_to_dict, load_config
from tokenizer.errors import InputError
from tokenizer.gaussians import GaussianDecoder, GaussianDecoderConfig
from tokenizer.gaussians.checkpoints import SUBFOLDER, load_gaussian_decoder, save_gaussian_decoder
from tokenizer.gaussians.rasterize import rasterize
from tokenizer.lock import LOCK, only_run
from tokenizer.losses.gaussians import rendering_terms
from tokenizer.sparse import SparseTokens
from tokenizer.tensorio import write_pt
from tokenizer.training.asset_store import StoredAsset, decode_all, decoded_voxels, random_views, read_store
from tokenizer.training.curriculum.config import OptimizerSettings, not_finite
from tokenizer.training.curriculum.interruption import Interruption, exit_status
from tokenizer.training.curriculum.launch import choose_device
from tokenizer.training.curriculum.optimization import Average, make_optimizers, rate_at, set_rates
from tokenizer.training.curriculum.records import Records
from tokenizer.training.gaussian_start import start_from_octants
from tokenizer.training.progress import BAD_STEPS, Progress
from tokenizer.training.state import load_state, save_state

_PSNR = "validation/assets/psnr"

_LOG_EVERY = 10

MAX_BAD_STEPS = 20
"""Steps in a row with a loss or gradient that is not finite, after which a run stops."""

VALIDATION_SHARE = 40
"""One training asset in this many is kept for validation."""

_VALIDATION_STREAM = 2**32


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianLossConfig:
    """Weights: l1 and l2 of colours on a black ground, alpha: L1 of the coverage."""

    l1: float = 1.0
    l2: float = 1.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if min(self.l1, self.l2, self.alpha) < 0:
            raise InputError(f"weights of the loss must not be negative, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianTrainConfig:
    """A whole run.

    model: the frozen autoencoder, by name or folder. data: store of rendered assets.
    decoder: sizes, and how views become voxels.
    views: compared with in one step. start_assets: how many assets the start is fitted to.
    start_from: a decoder of the same sizes to go on from instead: its folder, or a model that has one.
    optimizer: its `plain_lr` is also the rate of the skip, which starts at a fit; nothing here has the other groups.
    """

    name: str
    steps: int
    decoder: GaussianDecoderConfig
    model: str = "atoken-nano"
    data: str = "datasets/furniture"
    out: str = "runs/nano-gaussians"
    seed: int = 0
    views: int = 2
    start_assets: int = 48
    start_from: str | None = None
    precision: str = "bf16"
    loss: GaussianLossConfig = field(default_factory=GaussianLossConfig)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    validate_every: int = 250
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "views", "start_assets", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.out.strip():
            raise InputError("out is empty; name the folder of the run, for example out=runs/first")
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"precision must be fp32 or bf16, got '{self.precision}'")
        if odd := next(not_finite(asdict(self), ""), None):
            raise InputError(f"{odd[0]} must be a finite number, got {odd[1]}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must lie in 0..2^63 - 1, got {self.seed}")


class GaussianTrainer:
    """Trains a decoder as `config` says; `run` goes on where an earlier run in the same folder stopped."""

    def __init__(self, config: GaussianTrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.folder = Path(config.out)
        self.settings = config_to_dict(config)
        # Read at once: decoding the assets takes minutes.
        self._earlier = _earlier_decoder(config)
        self.model = AToken.from_pretrained(config.model, dtype=torch.float32, device=device)
        self.cache = Path(config.data) / "decoded"
        assets, skipped = decode_all(
            self.model, read_store(config.data, "train"), config.decoder.packing, config.decoder.resolution, self.cache
        )
        for name, reason in skipped.items():
            print(f"left out {name}: {reason}", file=sys.stderr)
        if len(assets) < 2:
            raise InputError(f"{config.data}: fewer than two assets of the training split can be used")
        self.training = [asset for n, asset in enumerate(assets) if n % VALIDATION_SHARE]
        self.validation = [asset for n, asset in enumerate(assets) if not n % VALIDATION_SHARE]
        self.decoder = GaussianDecoder(config.decoder)
        self.decoder.reset_parameters(torch.Generator().manual_seed(config.seed))
        self.decoder.to(device)
        # Under the name that it has in the curriculum, whose rules for rates and decay go by names.
        self.optimizers = make_optimizers(nn.ModuleDict({"gaussians": self.decoder}), config.optimizer)
        self.average = self._averaged()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.records = Records(self.folder, config.name, config.steps, active=True)
        self.progress = Progress()
        self._saved = -1

    def run(self) -> int:
        """Train `decoder` to the end, when it has the averaged weights, or until a signal asks to stop.

        Returns:
            0, or the exit status of `tokenizer.training.curriculum.interruption`.

        Raises:
            InputError: a state of other settings, or too many steps in a row, or most of all, with a loss or gradient
                that is not finite; what was done is on disk.
        """
        with Interruption() as interruption, self.records as records:
            progress = self.progress = load_state(self.folder, *self._parts())
            self._saved = progress.step
            records.start(progress.step)
            if progress.step == 0:
                self._start()
                records.metrics(0, {_PSNR: self._validate()})
            while progress.step < self.config.steps and not interruption.signal:
                self._log(*self._step(progress.step))
                if progress.step % self.config.save_every == 0 or progress.step == self.config.steps:
                    self._save()
            if progress.step < self.config.steps:
                self._save()
                records.say(f"stopped after step {progress.step}; start again to go on")
                return exit_status(interruption.signal)
            progress.judge(self.folder, records.say)
        self.average.swap()
        return 0

    def _parts(
        self,
    ) -> tuple[nn.Module, Average, list[torch.optim.Optimizer], torch.Generator, dict[str, Any]]:
        """What a state is of, in its order."""
        return self.decoder, self.average, self.optimizers, self.generator, self.settings

    def _save(self) -> None:
        if self._saved == self.progress.step:
            return
        self.records.flush()
        save_state(self.folder, self.progress, *self._parts())
        self._saved = self.progress.step

    def _log(self, metrics: dict[str, float], speed: dict[str, float]) -> None:
        """Write down a step, and measure where it is time to."""
        step, records = self.progress.step, self.records
        if step % self.config.validate_every == 0 or step == self.config.steps:
            metrics[_PSNR] = self._validate()
            records.say(f"step {step}: loss {metrics['loss']:.4f}  validation PSNR {metrics[_PSNR]:.3f} dB")
        if step % _LOG_EVERY == 0 or _PSNR in metrics:
            records.metrics(step, metrics)
            records.speed(step, speed)
        records.advance(step, f"loss {metrics['loss']:.4f}")

    def _averaged(self) -> Average:
        settings = self.config.optimizer
        return Average(dict(self.decoder.named_parameters()), settings.ema, settings.ema_warmup)

    def _start(self) -> None:
        """The weights to go on from, or else the linear fit, where the decoder has room for it."""
        if self._earlier is not None:
            self.decoder.load_state_dict(self._earlier.state_dict())
            self.average = self._averaged()
            return
        if self.decoder.skip is None:
            return
        rng = np.random.default_rng((self.config.seed, 1))
        chosen = rng.choice(len(self.training), min(self.config.start_assets, len(self.training)), replace=False)
        fit_start(self.decoder, self.model, [self.training[number] for number in chosen.tolist()], self.cache)
        self.average = self._averaged()

    def _step(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """What a step did, and how long it took.

        Raises:
            InputError: it was the last of too many that were not finite.
        """
        started = time.perf_counter()
        rng = np.random.default_rng((self.config.seed, 0, step))
        asset = self.training[int(rng.integers(len(self.training)))]
        voxels = self._voxels(asset)
        pictures, cameras = random_views(rng, asset, self.config.views)
        waited = time.perf_counter() - started
        rate = rate_at(step, self.config.steps, self.config.optimizer)
        set_rates(self.optimizers, rate)
        loss, terms = self._loss(voxels, pictures, cameras)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), self.config.optimizer.max_grad_norm)
        done = math.isfinite(float(loss.detach())) and math.isfinite(float(norm))
        if done:
            for optimizer in self.optimizers:
                optimizer.step()
            self.average.update(step)
        self.decoder.zero_grad(set_to_none=True)
        self.progress.count(done)
        if not done:
            self._bad_step(step, asset, voxels, pictures, cameras)
        metrics = {
            "loss": float(loss.detach()),
            **terms,
            "grad norm": float(norm),
            "rate": rate,
            "voxels": voxels.num_tokens,
            "bad steps": self.progress.bad,
        }
        return metrics, {"seconds": time.perf_counter() - started, "data seconds": waited}

    def _bad_step(
        self, step: int, asset: StoredAsset, voxels: SparseTokens, pictures: Tensor, cameras: Cameras
    ) -> None:
        """Keep what a step that was not finite was made on, and stop after too many in a row."""
        progress = self.progress
        path = self.folder / BAD_STEPS / f"step-{step:06d}.pt"
        kept = {
            "asset": str(asset.file),
            "features": voxels.features.cpu(),
            "positions": voxels.host_positions,
            "pictures": pictures.cpu(),
            "world to camera": cameras.world_to_camera,
            "intrinsics": cameras.intrinsics,
        }
        with atomic_path(path) as temporary:
            write_pt(kept, temporary)
        self.records.say(f"step {step}: loss or gradient is not finite; skipped, what it was made on is in {path}")
        if progress.bad_row >= MAX_BAD_STEPS:
            self._save()
            raise InputError(
                f"{progress.bad_row} steps in a row up to step {step} had a loss or gradient that is not finite; begin "
                f"again with a lower optimizer.lr and another out= folder, or look at what they were made on in "
                f"{path.parent}"
            )

    def _loss(self, voxels: SparseTokens, pictures: Tensor, cameras: Cameras) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            raw = self.decoder(voxels)
        gaussians = self.decoder.interpret(raw)
        rendering = rasterize(gaussians, cameras, pictures.shape[1])
        terms, weights = rendering_terms(rendering, pictures), self.config.loss
        loss = weights.l1 * terms.l1 + weights.l2 * terms.l2 + weights.alpha * terms.coverage
        found = {name: float(getattr(terms, name).detach()) for name in ("l1", "l2", "coverage")}
        psnr = -10 * math.log10(max(found["l2"], 1e-10))
        return loss, {"l1": found["l1"], "train psnr": psnr, "coverage": found["coverage"]}

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean PSNR in dB over two views of each validation asset, with averaged weights."""
        found = []
        self.average.swap()
        for number, asset in enumerate(self.validation):
            rng = np.random.default_rng((self.config.seed, _VALIDATION_STREAM, number))
            pictures, cameras = random_views(rng, asset, 2)
            found.append(self._loss(self._voxels(asset), pictures, cameras)[1]["train psnr"])
        self.average.swap()
        return sum(found) / len(found)

    def _voxels(self, asset: StoredAsset) -> SparseTokens:
        resolution = self.config.decoder.resolution
        return decoded_voxels(self.model, asset, self.config.decoder.packing, resolution, self.cache).to(self.device)


def _earlier_decoder(config: GaussianTrainConfig) -> GaussianDecoder | None:
    """What `start_from` names.

    Raises:
        InputError: no decoder there, or one of other sizes.
    """
    if config.start_from is None:
        return None
    earlier = load_gaussian_decoder(find_model(config.start_from))
    wanted, found = config_to_dict(config.decoder), config_to_dict(earlier.config)
    odd = [f"{key}: {found[key]}" for key, value in wanted.items() if found[key] != value]
    if odd:
        raise InputError(
            f"start_from: the decoder of {config.start_from} has other sizes; set in decoder: {', '.join(odd)}"
        )
    return earlier


def fit_start(decoder: GaussianDecoder, model: AToken, assets: Sequence[StoredAsset], cache: Path) -> None:
    """Fit the decoder's skip to some assets (`tokenizer.training.gaussian_start`)."""
    resolution, rule = decoder.config.resolution, decoder.config.packing
    collected: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for asset in assets:
        voxels, place, colour, count = octants(asset.views("seen"), resolution)
        tokens = decoded_voxels(model, asset, rule, resolution, cache)
        # Other rules may fill other voxels: only common ones are fitted.
        mine, theirs = _common(tokens.positions[:, 1:], voxels.coordinates, resolution)
        collected.append((tokens.features[mine], place[theirs], colour[theirs], count[theirs]))
    start_from_octants(decoder, *zip(*collected, strict=True))


def _common(ours: Tensor, theirs: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Rows of two lists of voxels [N, 3] and [M, 3] that are the same voxels."""
    keys = [(v[:, 0].long() * resolution + v[:, 1]) * resolution + v[:, 2] for v in (ours, theirs)]
    _, mine, other = np.intersect1d(keys[0].numpy(), keys[1].numpy(), assume_unique=True, return_indices=True)
    return torch.from_numpy(mine), torch.from_numpy(other)


def main(arguments: list[str]) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tokenizer.training.gaussian_trainer", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, see configs/tokenizer/")
    parser.add_argument("--device", default="auto", help="cpu or cuda; auto takes CUDA where there is one")
    parser.add_argument("overrides", nargs="*", help="settings to change, as key=value")
    options = parser.parse_args(arguments)

    def command() -> int:
        config = load_config(GaussianTrainConfig, options.config, options.overrides)
        trainer = GaussianTrainer(config, choose_device(options.device))
        with only_run(trainer.folder):
            remove_leftovers(trainer.folder, LOCK)
            if status := trainer.run():
                return status
            save_gaussian_decoder(trainer.decoder, trainer.folder / SUBFOLDER, torch.bfloat16)
        return 0

    return run(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
