"""Settings of a training run; a run is a YAML file under `configs/tokenizer/` plus `key=value`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokenizer.errors import InputError
from tokenizer.model.config import FSQConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """What one step sees.

    images / clips: items of each kind.
    image_sides: sides in pixels of the square image crops; one is drawn a step.
    clip_sides: the same for clips of `clip_frames` frames.
    kinds: sampling weight of each kind of array in the store; kinds not named are left out.
    largest_side: leave out pictures whose shorter side is longer than this; large copies of a photograph are smooth.
    """

    images: int = 24
    clips: int = 4
    image_sides: tuple[int, ...] = (96, 128, 160)
    clip_sides: tuple[int, ...] = (64, 96, 128)
    clip_frames: int = 16
    kinds: dict[str, float] = field(default_factory=dict)
    largest_side: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights of the objective; see `tokenizer.training.objective` for each term.

    lpips_images: how many image crops of a step the perceptual loss looks at (it costs more than the model).
    lpips_backbone: "alexnet" or "vgg16".
    lpips_from: first step with the perceptual loss.
    """

    l1: float = 1.0
    l2: float = 0.0
    psnr: float = 0.0
    lpips: float = 0.0
    lpips_backbone: Literal["vgg16", "alexnet"] = "alexnet"
    lpips_images: int = 4
    lpips_from: int = 0
    kl: float = 1e-8


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW, and Muon for the matrices inside blocks if `muon_lr` is set; `plain_lr` is for biases, norms and
    scales (by default `lr`), `skip_lr` for the linear codes (0: fixed).

    The rate rises linearly for `warmup` steps, stays, and falls to zero as 1 - sqrt(progress) over the last
    `decay_fraction` of the run.
    """

    lr: float = 1e-3
    plain_lr: float | None = None
    skip_lr: float = 2e-5
    muon_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warmup: int = 100
    decay_fraction: float = 0.4
    max_grad_norm: float = 1.0
    ema: float = 0.999


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A whole run.

    model: a name from `tokenizer.model.config.CONFIGS`.
    data: folder of the training store (`python -m data.sources.nano`).
    initialise: "codes" fits the linear codes to the store; or a model name or folder to go on from.
    code_patches / code_iterations: how many patches of each sort the codes are fitted to, and for how many rounds.
    quantizer: train the latents through this quantiser.
    precision: "fp32" or "bf16" (autocast; parameters stay float32).
    """

    model: str
    name: str
    steps: int
    data: str = "datasets/nano"
    out: str = "runs/nano"
    seed: int = 0
    initialise: str = "codes"
    code_patches: int = 48_000
    code_iterations: int = 12
    quantizer: FSQConfig | None = None
    precision: Literal["fp32", "bf16"] = "bf16"
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validate_every: int = 250
    save_every: int = 250

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")
        for name in ("code_patches", "code_iterations", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise InputError(f"seed must not be negative, got {self.seed}")
        if self.batch.images < 0 or self.batch.clips < 0 or self.batch.images + self.batch.clips == 0:
            raise InputError("batch.images and batch.clips must not be negative, and not both zero")
