"""Settings of a run: one stage of the curriculum on any number of processes, in one YAML file plus `key=value`.

The defaults are the paper's (PAPER 4). What it leaves open is decided here or in `tokenizer.losses.weights`:

Each stage warms up and falls along a cosine of its own, over its own steps, and begins from the averaged weights of the
    one before with fresh moments: the paper says that a stage starts from the previous checkpoint, and no more.
Adam's epsilon is 1e-8, torch's own; the paper names none.
Gradients are clipped at a norm of 1: the paper does not say whether it clips; 1 is what is usual for such rates.
The encoder that learns at a tenth of the rate is what a SigLIP 2 checkpoint brings, transformer and pool. The layer
    that writes the posterior is new and learns at the full rate, as the decoder does.
Biases, norms, scales and position tables are not decayed.
The average has a shorter memory while the rate warms up: at 0.9999 alone, four fifths of it would be the weights that
    the run began with when the warm-up ends.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from tokenizer.errors import InputError
from tokenizer.fp8.config import FP8Config
from tokenizer.gaussians.config import GaussianDecoderConfig
from tokenizer.losses.weights import LossChoices, LossWeights
from tokenizer.megatron.config import OTHER_MODELS, ParallelConfig
from tokenizer.model.config import CONFIGS, ATokenConfig, FSQConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """Which part of the curriculum a run is (PAPER 3): for people and model cards."""

    number: int
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StartConfig:
    """Where the weights come from before the first step.

    kind: "scratch" draws them; "siglip2" takes the encoder from a SigLIP 2 vision checkpoint and draws the rest;
        "model" takes an earlier run's averaged weights; "codes" fits the linear codes of a small model to the data.
    source: folder: of the SigLIP 2 checkpoint; of the run, or of a model, or the name of a bundled one.
    gaussians: folder of a run or model whose decoder of 3D Gaussians is taken instead; see
        `tokenizer.training.gaussian_trainer`, which trains one apart from a fit to what is seen.
    refit: fit the linear codes of a "model" anew, because its latents grew or the data are others; its transformers
        stay as they are (`tokenizer.training.curriculum.stages`).
    patches, iterations: of codes that are fitted, how many of each sort, and rounds of fitting.
    """

    kind: Literal["scratch", "siglip2", "model", "codes"] = "scratch"
    source: str | None = None
    gaussians: str | None = None
    refit: bool = False
    patches: int = 48_000
    iterations: int = 12

    def __post_init__(self) -> None:
        if (self.source is not None) != (self.kind in ("siglip2", "model")):
            raise InputError(f"start.source belongs to the kinds siglip2 and model; kind is {self.kind}")
        if self.refit and self.kind != "model":
            raise InputError(f"start.refit belongs to the kind model; kind is {self.kind}")
        if self.patches < 16 or self.iterations < 1:
            raise InputError("start.patches must be at least 16 and start.iterations at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The frozen text tower that visuals are aligned with.

    tower: "siglip2" (from `folder`), "minilm" (from its package, or from `folder`), or "none".
    projection: "auto" puts a linear layer between pooled vectors and texts only where their widths differ.
    """

    tower: Literal["siglip2", "minilm", "none"] = "none"
    folder: str | None = None
    projection: Literal["auto", "linear"] = "auto"

    def __post_init__(self) -> None:
        if self.tower == "siglip2" and self.folder is None:
            raise InputError("text.tower is siglip2, but no folder holds its weights; set text.folder=FOLDER")


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderingWeights:
    """Of 3D reconstruction, before the weight of all reconstruction; see `tokenizer.losses.gaussians`.

    voxels: of the L1 of decoded voxels, which keeps the pixels that Gaussians are made from; in the place of `loss.l1`.
    """

    voxels: float = 1.0
    l1: float = 1.0
    l2: float = 1.0
    coverage: float = 0.5

    def __post_init__(self) -> None:
        if min(self.voxels, self.l1, self.l2, self.coverage) < 0:
            raise InputError(f"weights of rendering must not be negative, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSettings:
    """AdamW with a linear warm-up and a cosine from `lr` to `min_lr` (PAPER 4).

    schedule: "plateau" stays at `lr` and falls in the last part of a run, as 1 - sqrt(progress) does; a run can then
        be made longer without having known it from the start.
    decay_fraction: of a run, how much of it a plateau falls in.
    encoder_lr_factor: of the rate of the encoder's transformer and pool.
    codes_lr_factor: of the rate of the linear codes of small models; 0 keeps them as they are.
    refiner_lr_factor: of the rate of the convolutions behind small models' decoders.
    muon_lr: peak rate of Muon, which then trains the matrices inside the transformers' blocks; by default AdamW trains
        all.
    plain_lr: peak rate of what is not decayed (biases, norms, scales, position tables); by default `lr`.
    max_grad_norm: longer gradients are scaled down to it.
    ema: how much of the averaged weights stays in each step.
    ema_warmup: steps in which less stays, so that the average is not of where the run began.
    """

    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup: int = 2000
    schedule: Literal["cosine", "plateau"] = "cosine"
    decay_fraction: float = 0.5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    encoder_lr_factor: float = 0.1
    codes_lr_factor: float = 0.1
    refiner_lr_factor: float = 1.0
    muon_lr: float | None = None
    plain_lr: float | None = None
    max_grad_norm: float = 1.0
    ema: float = 0.9999
    ema_warmup: int = 2000

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr or not self.lr > 0 or self.warmup < 0:
            raise InputError(f"optimizer needs 0 <= min_lr <= lr, lr above 0 and warmup of at least 0, got {self}")
        if not 0 <= self.ema < 1 or self.ema_warmup < 0 or not self.max_grad_norm > 0:
            raise InputError(
                f"optimizer.ema must lie in 0..1, ema_warmup be at least 0 and max_grad_norm above 0, got {self}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optimizer.betas must lie in 0..1, without 1, got {list(self.betas)}")
        if not 0 < self.decay_fraction <= 1:
            raise InputError(f"optimizer.decay_fraction must lie in 0..1 and above 0, got {self.decay_fraction}")
        if any(rate is not None and not rate > 0 for rate in (self.muon_lr, self.plain_lr)):
            raise InputError(f"optimizer.muon_lr and plain_lr must be above 0, or left out, got {self}")
        if min(self.encoder_lr_factor, self.codes_lr_factor, self.refiner_lr_factor, self.weight_decay) < 0:
            raise InputError(f"the factors and weight_decay of the optimizer must not be negative, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """What a run is measured on.

    sources: held-out sources, as the loader of the run describes one of its own; each has a name of its own, which
        its figures and pictures get.
    every: steps between two measurements.
    limit: items of each source.
    budget: tokens of a batch.
    """

    sources: tuple[dict[str, Any], ...] = ()
    every: int = 1000
    limit: int = 256
    budget: int = 16384

    def __post_init__(self) -> None:
        names = [str(source.get("name", "")) for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"validation.sources: several are called {', '.join(twice)}; give each a name of its own")
        if odd := [name for name in names if not name.strip(". ") or set(name) & set("/\\\0")]:
            raise InputError(f"validation.sources: '{odd[0]}' is no name for files; leave out / and \\")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """Steps between two lines of the logs and between two sheets of pictures, and how many pictures a sheet has."""

    every: int = 10
    pictures_every: int = 1000
    pictures: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Steps between two checkpoints, and how many of the last are kept beside the best."""

    every: int = 1000
    keep_last: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run.

    name: of the model that comes out.
    model: a name from `tokenizer.model.config.CONFIGS`, or sizes.
    latent_channels, quantizer: of this stage, instead of the model's; latents grow and quantise as told.
    gaussians: sizes of the decoder that makes 3D Gaussians; none trains voxels alone.
    start, text, loss, choices, rendering, optimizer, validation, log, checkpoint: see there.
    perceptual_images: pictures of a micro-batch that LPIPS, Gram and CLIP look at, the first ones; all by default.
    steps: optimizer steps. accumulation: times that batches are taken from the loader for each of them; with
        `data.batches`, which are batch sizes by task, there is no need of it.
    precision: "bf16" computes in bfloat16 where it can; parameters stay float32.
    fp8: linear layers of the blocks compute in FP8, in every engine; `{}` takes the defaults of `FP8Config`. The
        utilisation stays a share of what bfloat16 could do.
    compile: the transformers' blocks, by torch's compiler: fewer passes over memory, while the first batches of a kind
        take longer. Made for CUDA; on a CPU, batches with another number of lengths are compiled anew, eight at most.
        Blocks that `fp8.backend=triton` fuses are left as they are, and Megatron's layers.
    recompute: keep of a block what goes in alone, and compute the rest again on the way back: more time, for
        micro-batches that would not fit. Of Megatron it asks full, uniform, 1, unless `megatron` says another.
    attention: "cudnn" runs batches whose images, clips or assets all have one number of tokens by cuDNN's kernel, which
        plans anew for each such number and batch size; for runs at few sizes, on CUDA. Megatron has its own.
    engine: "auto" is "ddp" in several processes (torchrun), else "single"; "fsdp2" shares parameters out too.
    seed: of weights, data and noise.
    out: folder of the run.
    loader, data: name and settings of the training data, see `tokenizer.training.feeding`.
    max_bad_steps: steps in a row with a loss or gradient that is not finite, after which a run stops; the batches
        of the last such steps are kept, twice as many.
    peak_tflops: of one process's device at this precision, for the utilisation; measured by default.
    megatron: layout for `tokenizer.megatron.pretrain`, see `tokenizer.megatron.config`; others check its keys.
    """

    name: str
    stage: StageConfig
    model: str | ATokenConfig
    steps: int
    data: dict[str, Any]
    out: str
    latent_channels: int | None = None
    quantizer: FSQConfig | None = None
    gaussians: GaussianDecoderConfig | None = None
    start: StartConfig = field(default_factory=StartConfig)
    text: TextConfig = field(default_factory=TextConfig)
    loss: LossWeights = field(default_factory=LossWeights)
    choices: LossChoices = field(default_factory=LossChoices)
    rendering: RenderingWeights = field(default_factory=RenderingWeights)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    perceptual_images: int | None = None
    accumulation: int = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    fp8: FP8Config | None = None
    compile: bool = False
    recompute: bool = False
    attention: Literal["varlen", "cudnn"] = "varlen"
    engine: Literal["auto", "single", "ddp", "fsdp2"] = "auto"
    seed: int = 0
    loader: str = "shards"
    max_bad_steps: int = 20
    peak_tflops: float | None = None
    megatron: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = {
            "steps": self.steps,
            "accumulation": self.accumulation,
            "max_bad_steps": self.max_bad_steps,
            "validation.every": self.validation.every,
            "validation.limit": self.validation.limit,
            "log.every": self.log.every,
            "log.pictures_every": self.log.pictures_every,
            "checkpoint.every": self.checkpoint.every,
            "checkpoint.keep_last": self.checkpoint.keep_last,
        }
        for name, count in counts.items():
            if count < 1:
                raise InputError(f"{name} must be at least 1, got {count}")
        if not self.out.strip():
            raise InputError("out is empty; name the folder of the run, for example out=runs/first")
        if odd := next(not_finite(asdict(self), ""), None):
            raise InputError(f"{odd[0]} must be a finite number, got {odd[1]}; checkpoints and logs hold no other")
        known = [option.name for option in fields(ParallelConfig)]
        if unknown := sorted(self.megatron.keys() - set(known)):
            if reason := OTHER_MODELS.get(unknown[0]):
                raise InputError(f"megatron: leave out {unknown[0]}: {reason}")
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"
            raise InputError(f"megatron: unknown key '{unknown[0]}'{hint}")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise InputError(f"peak_tflops must be above 0, got {self.peak_tflops}")
        if self.latent_channels is not None and self.latent_channels < 1:
            raise InputError(f"latent_channels must be at least 1, got {self.latent_channels}")
        if self.start.gaussians is not None and self.gaussians is None:
            raise InputError("start.gaussians names a decoder, but gaussians gives no sizes of one; set gaussians")
        if self.perceptual_images is not None and self.perceptual_images < 1:
            raise InputError(f"perceptual_images must be at least 1, got {self.perceptual_images}; weights of 0 end it")
        if self.fp8 is not None and self.precision == "fp32":
            raise InputError("fp8 stands among bfloat16 layers, but precision is fp32; set precision=bf16 or fp8=null")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must lie in 0..2^63 - 1, got {self.seed}")
        network_config(self)


def not_finite(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Numbers that are infinite or NaN, with their dotted names."""
    if isinstance(value, float) and not math.isfinite(value):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from not_finite(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from not_finite(part, f"{name}[{number}]")


def network_config(config: RunConfig) -> ATokenConfig:
    """Sizes of the network that a run trains.

    Raises:
        InputError: an unknown name, or a model without a decoder.
    """
    if isinstance(config.model, str):
        if config.model not in CONFIGS:
            raise InputError(f"unknown model '{config.model}'; known: {', '.join(CONFIGS)}; or give its sizes")
        sizes = CONFIGS[config.model]
    else:
        sizes = config.model
    if sizes.decoder is None:
        raise InputError(f"{sizes.name} has no decoder to train")
    return replace(
        sizes,
        name=config.name,
        latent_channels=sizes.latent_channels if config.latent_channels is None else config.latent_channels,
        quantizer=config.quantizer or sizes.quantizer,
    )
