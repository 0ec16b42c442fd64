"""Sizes and choices of a network: plain dataclasses, checked when they are made.

Named configurations are at the end. Reading them from JSON or YAML, with messages for unknown keys, is the business of
`tokenizer.config`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tokenizer.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """One stack of pre-norm blocks (FORMAT 5).

    width / depth / heads / mlp_width: channels, blocks, attention heads, hidden channels of the MLP.
    norm: "layer" (affine LayerNorm) or "rms" (RMSNorm), both with eps 1e-6.
    bias: biases in the input, qkv, out and MLP layers.
    qk_norm: L2-normalised queries and keys with a learned scale for each head and channel.
    learned_positions: add the resized 16 x 16 table of learned positions after the input layer.
    rotary: rotate queries and keys by the 4D position.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    norm: Literal["layer", "rms"]
    bias: bool
    qk_norm: bool
    learned_positions: bool = True
    rotary: bool = True

    def __post_init__(self) -> None:
        for name in ("width", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.depth < 0:
            raise InputError(f"depth must not be negative, got {self.depth}")
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.rotary and self.head_width % 8:
            raise InputError(
                f"width / heads is {self.head_width}, but 4D rotary positions need a multiple of 8 (4 axes of pairs)"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True, kw_only=True, slots=True)
class FSQConfig:
    """Finite scalar quantisation: `codebooks` codebooks of `codebook_size` entries (FORMAT 8)."""

    codebook_size: int = 4096
    codebooks: int = 8
    kind: Literal["fsq"] = "fsq"


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipConfig:
    """How many linear codes stand beside the transformers, for single frames and for clips.

    linked: whether the transformers read and write coefficients through vectors of each code's own.
    consistent: whether what is decoded has the coefficients that its latents state, whatever transformer and refiner
        add (`PiecewiseLinearCode.made_consistent`).
    """

    still_codes: int
    clip_codes: int
    linked: bool = False
    consistent: bool = False

    def __post_init__(self) -> None:
        if self.still_codes < 1 or self.clip_codes < 1:
            raise InputError(f"a skip needs at least one code of each sort, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RefinerConfig:
    """Convolutions over decoded pixels (`tokenizer.model.refiner`).

    width: channels of a cell.
    depth: convolutions between the one that reads pixels and the one that writes them.
    fold: a cell is fold x fold pixels.
    """

    width: int
    depth: int
    fold: int = 2

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 0 or self.fold < 1:
            raise InputError(f"a refiner needs a width and fold of at least 1 and no negative depth, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ATokenConfig:
    """A whole AToken network.

    name: what the model calls itself in files and messages.
    patch_size: frames, rows and columns of a token; 3 colours each, so (4, 16, 16) gives 3072 features.
    latent_channels: channels of a latent; the encoder writes twice as many (mean and log-variance).
    tile_frames: frames that attend to each other; longer videos are cut into tiles of this many (FORMAT 10).
    skip: a piecewise linear code beside the transformers (`tokenizer.model.piecewise`); released models have none.
    refiner: convolutions over decoded pixels (`tokenizer.model.refiner`); released models have none.
    """

    name: str
    encoder: TransformerConfig
    decoder: TransformerConfig | None
    patch_size: tuple[int, int, int] = (4, 16, 16)
    latent_channels: int = 48
    quantizer: FSQConfig | None = None
    tile_frames: int = 16
    skip: SkipConfig | None = None
    refiner: RefinerConfig | None = None

    def __post_init__(self) -> None:
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise InputError(
                f"patch_size must be three positive numbers (frames, rows, columns), got {self.patch_size}"
            )
        if self.latent_channels < 1:
            raise InputError(f"latent_channels must be at least 1, got {self.latent_channels}")
        if self.tile_frames < self.patch_size[0] or self.tile_frames % self.patch_size[0]:
            raise InputError(
                f"tile_frames must be a positive multiple of the {self.patch_size[0]} frames of a patch, "
                f"got {self.tile_frames}"
            )
        if self.refiner is not None and any(side % self.refiner.fold for side in self.patch_size[1:]):
            raise InputError(f"patches of {self.patch_size} cannot be cut into cells of {self.refiner.fold} pixels")
        if self.skip is not None and self.quantizer is not None and self.quantizer.codebook_size != 4096:
            raise InputError(
                "linear codes beside a quantiser need FSQ with 4 levels, so codebook_size 4096, "
                f"got {self.quantizer.codebook_size}"
            )

    @property
    def patch_features(self) -> int:
        """Features of one token: frames x rows x columns x 3 colours."""
        frames, rows, columns = self.patch_size
        return frames * rows * columns * 3

    @property
    def tile_steps(self) -> int:
        """Latent time steps of a tile."""
        return self.tile_frames // self.patch_size[0]


def _encoder(width: int, depth: int, heads: int, mlp_width: int) -> TransformerConfig:
    return TransformerConfig(
        width=width, depth=depth, heads=heads, mlp_width=mlp_width, norm="layer", bias=True, qk_norm=False
    )


def _decoder(width: int, depth: int, heads: int, mlp_width: int) -> TransformerConfig:
    return TransformerConfig(
        width=width, depth=depth, heads=heads, mlp_width=mlp_width, norm="rms", bias=False, qk_norm=True
    )


SO400M_C = ATokenConfig(
    name="atoken-so400m-c", encoder=_encoder(1152, 27, 16, 4304), decoder=_decoder(1152, 27, 16, 4304)
)
SO400M_D = replace(SO400M_C, name="atoken-so400m-d", quantizer=FSQConfig())
SO400M_C_STAGE1 = replace(SO400M_C, name="atoken-so400m-c-stage1", latent_channels=32)
BASE = ATokenConfig(name="atoken-base", encoder=_encoder(768, 12, 12, 3072), decoder=_decoder(768, 12, 12, 3072))
NANO = ATokenConfig(
    name="atoken-nano",
    encoder=_encoder(256, 2, 8, 640),
    decoder=_decoder(256, 3, 8, 704),
    skip=SkipConfig(still_codes=12, clip_codes=4, linked=True, consistent=True),
    refiner=RefinerConfig(width=64, depth=3),
)

CONFIGS: dict[str, ATokenConfig] = {
    "so400m-c": SO400M_C,
    "so400m-d": SO400M_D,
    "so400m-c-stage1": SO400M_C_STAGE1,
    "base": BASE,
    "nano": NANO,
}
"""Configurations by short name."""
