"""What a model's vectors know of words: zero-shot classification and retrieval (PAPER 6).

A model understands if its pooled vectors lie in the space of a text tower. Released weights share that of SigLIP 2,
whose text tower is given as a folder; other models bring what they were trained with (`AToken.text_alignment`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.api import AToken
from tokenizer.errors import InputError
from tokenizer.evaluation.bootstrap import bootstrap_mean, bootstrap_ratio
from tokenizer.evaluation.command.presets import Kind
from tokenizer.evaluation.command.samples import Sample
from tokenizer.evaluation.command.systems import ATokenSystem
from tokenizer.text.alignment import TextAlignment as TrainedAlignment
from tokenizer.text.protocol import TextTower
from tokenizer.text.zero_shot import ASSET_PROMPTS, IMAGE_PROMPTS, VIDEO_PROMPTS, class_vectors, classify, retrieve

PROMPTS: Final[Mapping[Kind, Sequence[str]]] = {
    "image": IMAGE_PROMPTS,
    "video": VIDEO_PROMPTS,
    "asset": ASSET_PROMPTS,
}
TOP: Final = (1, 5)
RECALLS: Final = (1, 5, 10)


class TextAlignment(Protocol):
    """What makes the vectors of a model and of a text tower comparable."""

    @property
    def tower(self) -> TextTower: ...

    def encode_pooled(self, pooled: Tensor, /) -> Tensor:
        """Pooled vectors [B, D] of a model -> unit vectors [B, W], W the width of the tower."""
        ...


class SharedSpace:
    """The alignment of a model whose pooled vectors are in the space of the tower, as those of released weights are."""

    def __init__(self, tower: TextTower) -> None:
        self.tower = tower

    def encode_pooled(self, pooled: Tensor) -> Tensor:
        """See `TextAlignment`."""
        return F.normalize(pooled.float(), dim=1)


class OwnSpace:
    """The alignment that a model was trained with, and its text tower.

    Args:
        text: folder of the tower's weights, if they are not where they were in training.

    Raises:
        InputError: the tower is not there, or another.
    """

    def __init__(self, alignment: TrainedAlignment, text: Path | None) -> None:
        self.tower = alignment.tower(text)
        self.encode_pooled = alignment.encode_pooled


def find_alignment(model: AToken, name: str, text: Path | None) -> tuple[TextAlignment | None, str | None]:
    """The alignment of a model, or why it has none, in one line.

    Args:
        text: folder of SigLIP 2's text tower, for models that share its space.

    Raises:
        InputError: `text` cannot be read.
    """
    if model.text_alignment is not None:
        try:
            return OwnSpace(model.text_alignment, text), None
        except InputError as error:
            if text is not None:
                raise
            # Bundled models have one, and all else can be measured without its tower.
            return None, f"{name}: no zero-shot accuracy and no retrieval: {error}"
    width = model.config.encoder.width
    if text is None:
        return None, f"{name} has no text alignment: no zero-shot accuracy and no retrieval (--text names a text tower)"
    from tokenizer.text.siglip import SiglipText

    tower = SiglipText(text, model.device)
    if tower.width != width:
        return None, f"{name} has vectors of {width} numbers, the text tower {tower.width}: they cannot be compared"
    return SharedSpace(tower), None


def sample_vector(system: ATokenSystem, alignment: TextAlignment, sample: Sample) -> Tensor:
    """float32 [W] on the CPU: the mean of the vectors of what is understood."""
    with torch.no_grad():
        vectors = alignment.encode_pooled(system.pooled(sample))
    return vectors.float().mean(dim=0).cpu()


def zero_shot(
    vectors: Mapping[str, Tensor],
    labels: Mapping[str, str | None],
    names: Mapping[str, str] | None,
    tower: TextTower,
    prompts: Sequence[str],
    seed: int,
) -> dict[str, Any] | None:
    """Accuracies of naming the class of each sample; None where fewer than two classes are known. Left out are those
    that nobody can miss, such as that of the five nearest of five classes.

    Args:
        vectors: by sample.
        labels: class of each sample; those without one are left out.
        names: class to its name in words; by default the classes that occur, as they are called.
        prompts: sentences around a name, with {} in its place.
        seed: of the bootstrap.
    """
    known = {sample: label for sample, label in labels.items() if label is not None and sample in vectors}
    if names is None:
        names = {label: label.replace("_", " ").replace("-", " ") for label in sorted(set(known.values()))}
    classes = list(names)
    used = [sample for sample, label in known.items() if label in names]
    if len(classes) < 2 or not used:
        return None
    items = torch.stack([vectors[sample] for sample in used])
    truth = torch.tensor([classes.index(known[sample]) for sample in used])
    wanted = class_vectors(tower, list(names.values()), prompts).cpu()
    # Among as many as there are, every class is found.
    found = classify(items, wanted, truth, top=[k for k in TOP if k < len(classes)])
    return {
        "figures": {f"top{k}": _interval(share, len(used), seed) for k, share in found.top.items()},
        "majority": found.majority,
        "classes": len(classes),
        "samples": len(used),
        "prompts": list(prompts),
        "tower": tower.name,
    }


def retrieval(
    vectors: Mapping[str, Tensor], captions: Mapping[str, Sequence[str]], tower: TextTower, seed: int
) -> dict[str, Any] | None:
    """Recall of the sample of each caption, and of a caption of each sample; None with fewer than two samples. Left out
    are those that nobody can miss, such as that of the ten nearest of ten samples.

    Both have intervals over samples: captions of one sample are right and wrong together.
    """
    used = [sample for sample in vectors if captions.get(sample)]
    if len(used) < 2:
        return None
    pairs = [(number, caption) for number, sample in enumerate(used) for caption in captions[sample]]
    texts = tower.encode([caption for _, caption in pairs]).cpu()
    owners = torch.tensor([number for number, _ in pairs])
    found = retrieve(torch.stack([vectors[sample] for sample in used]), texts, owners, at=RECALLS)
    described = torch.bincount(owners)
    # Where no k others are there to stand before the right one, it is always found.
    others_of_text, others_of_sample = len(used) - 1, len(pairs) - int(described.min())
    to_sample = {
        f"t2v_r{k}": asdict(bootstrap_ratio(torch.bincount(owners, weights=hits.double()), described, seed))
        for k, hits in found.text_hits.items()
        if k <= others_of_text
    }
    to_text = {
        f"v2t_r{k}": _interval(share, len(used), seed)
        for k, share in found.image_to_text.items()
        if k <= others_of_sample
    }
    return {"figures": {**to_sample, **to_text}, "samples": len(used), "captions": len(pairs), "tower": tower.name}


def _interval(share: float, count: int, seed: int) -> dict[str, Any]:
    """Of a share of right answers: the bootstrap of ones and zeros depends on nothing but how many there are."""
    right = round(share * count)
    return asdict(bootstrap_mean([1.0] * right + [0.0] * (count - right), seed))
