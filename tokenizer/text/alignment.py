"""What compares a model's pooled vectors with texts: a projection, a scale, and the name of the text tower.

A model's folder keeps it as `text_alignment/`, `config.json` + `model.safetensors`; zero-shot classification and
retrieval need nothing else:

    alignment = load_text_alignment("runs/stage3/model")
    images = alignment.encode_pooled(model.encode(tokens).pooled)          # [B, D] unit vectors
    classes = class_vectors(alignment.tower(), names)                      # tokenizer.text.zero_shot
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.atomic import atomic_path
from tokenizer.config import config_to_dict, parse_config, read_mapping
from tokenizer.errors import InputError
from tokenizer.losses.similarity import RELEASED_BIAS, RELEASED_SCALE, SimilarityScale
from tokenizer.model.atoken import draw_linear
from tokenizer.tensorio import write_safetensors
from tokenizer.text.protocol import TextTower

SUBFOLDER = "text_alignment"
"""Where a model's folder keeps its alignment."""

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

Tower = Literal["siglip2", "minilm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentConfig:
    """Sizes of an alignment and the tower that it belongs to.

    width / text_width: of pooled vectors, of text vectors.
    tower: which sort; tower_name: as `TextTower.name`, so that no other is taken for it.
    folder: where the tower's weights were; None for the installed package's.
    projection: whether a linear layer lies between; without one the widths must agree.
    scale_trained: whether scale and bias of the scores are parameters.
    """

    width: int
    text_width: int
    tower: Tower
    tower_name: str
    folder: str | None = None
    projection: bool = True
    scale_trained: bool = False

    def __post_init__(self) -> None:
        if not self.projection and self.width != self.text_width:
            raise InputError(
                f"pooled vectors of {self.width} numbers and texts of {self.text_width} need a projection between them"
            )


class TextAlignment(nn.Module):
    """Pooled vectors to where texts are.

    Args:
        config: sizes and tower.
        scale, bias: what the scale of the scores starts from.
    """

    def __init__(self, config: AlignmentConfig, scale: float = RELEASED_SCALE, bias: float = RELEASED_BIAS) -> None:
        super().__init__()
        self.config = config
        self.projection = nn.Linear(config.width, config.text_width) if config.projection else None
        self.scale = SimilarityScale(scale, bias, config.scale_trained)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the projection as the network's layers are drawn."""
        if self.projection is not None:
            draw_linear(self.projection, generator)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, width] -> [B, text_width], of any length."""
        return pooled if self.projection is None else self.projection(pooled)

    def encode_pooled(self, pooled: Tensor) -> Tensor:
        """[B, width] of `Encoding.pooled`, in any dtype -> float32 unit vectors [B, text_width], as of text towers."""
        return F.normalize(self(pooled.to(self.scale.scale.dtype)).float(), dim=1)

    def tower(self, folder: str | PathLike[str] | None = None, device: torch.device | str = "cpu") -> TextTower:
        """The text tower that this was trained with.

        Args:
            folder: where its weights are now, if not where they were in training.

        Raises:
            InputError: the weights are not there, or are of another tower.
        """
        where = str(folder) if folder is not None else self.config.folder
        tower = open_tower(self.config.tower, where, device)
        if tower.name != self.config.tower_name:
            raise InputError(
                f"{where}: holds the text tower {tower.name}; this model was aligned with {self.config.tower_name}"
            )
        return tower


def open_tower(kind: Tower, folder: str | None, device: torch.device | str = "cpu") -> TextTower:
    """A text tower by its sort.

    Raises:
        InputError: a missing package or file.
    """
    if kind == "minilm":
        from tokenizer.text.minilm import MiniLMText

        return MiniLMText(folder, device)
    if folder is None:
        raise InputError("the text tower of SigLIP 2 needs the folder with its weights")
    from tokenizer.text.siglip import SiglipText

    return SiglipText(folder, device)


def save_text_alignment(alignment: TextAlignment, model_folder: str | PathLike[str]) -> None:
    """Write `text_alignment/` into a model's folder, whole or not at all."""
    with atomic_path(Path(model_folder) / SUBFOLDER) as new:
        new.mkdir()
        state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in alignment.state_dict().items()}
        write_safetensors(state, new / _WEIGHTS, {"format": "pt"})
        (new / _CONFIG).write_text(json.dumps(config_to_dict(alignment.config), indent=2) + "\n", encoding="utf-8")


def load_text_alignment(model_folder: str | PathLike[str], device: torch.device | str = "cpu") -> TextAlignment:
    """Read `text_alignment/` of a model's folder.

    Raises:
        InputError: it is not there, unreadable, or does not fit its configuration.
    """
    from tokenizer.checkpoints import FileTensors

    folder = Path(model_folder) / SUBFOLDER
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{model_folder}: was not aligned with texts, {folder / name} is missing")
    config = parse_config(AlignmentConfig, read_mapping(folder / _CONFIG), str(folder / _CONFIG))
    alignment = TextAlignment(config)
    state = {name: tensor.clone() for name, tensor in FileTensors(folder / _WEIGHTS).items()}
    own = alignment.state_dict()
    odd = sorted(own.keys() ^ state.keys()) or sorted(name for name in own if own[name].shape != state[name].shape)
    if odd:
        raise InputError(f"{folder / _WEIGHTS}: does not fit its configuration: {', '.join(odd)}")
    alignment.load_state_dict(state)
    return alignment.to(device).eval().requires_grad_(False)
