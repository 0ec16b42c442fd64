"""What text vectors can do without training: classify by class names, and retrieve in both directions (PAPER 6).

Images, videos and assets are all vectors here, and so are texts, whichever tower they come from. Scores are cosines and
are made a chunk at a time, so memory does not grow with the product of the two sets. A score that equals the right one
counts against it: a model that says the same of everything is right about nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.errors import InputError
from tokenizer.text.protocol import TextTower, check_texts

IMAGE_PROMPTS = ("{}", "a photo of a {}", "a picture of a {}", "a photo of the {}", "an image of one {}")
VIDEO_PROMPTS = ("{}", "a video of {}", "a video of a person doing {}", "a clip that shows {}")
ASSET_PROMPTS = ("{}", "a 3d model of a {}", "a rendering of a {}", "a {} on a plain background")
CHUNK = 1024
"""Rows of scores at a time."""

ROUNDING = 1e-6
"""Cosines no further apart are equal: those of equal vectors differ by their columns' place in the product."""


@dataclass(frozen=True, slots=True)
class Classification:
    """How well items were told apart by class names.

    top: share of items whose class is among the k best, for each k.
    majority: share of the most frequent class: what always naming it would reach.
    confusion: [K, K] int64, rows the true class, columns the best one (the first of several equal ones).
    """

    top: dict[int, float]
    majority: float
    confusion: Tensor

    @property
    def recall(self) -> Tensor:
        """Share of each class's items that were given it, [K] float64; NaN for classes without items."""
        return self.confusion.diagonal().double() / self.confusion.sum(dim=1)


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Recall at k in both directions: share of queries with a right answer among the k best.

    text_hits: for each k, which texts have their image among the k best: bool [M] on the CPU, for intervals. Texts of
    one image are no independent draws.
    """

    text_to_image: dict[int, float]
    image_to_text: dict[int, float]
    text_hits: dict[int, Tensor]


def class_vectors(tower: TextTower, names: Sequence[str], prompts: Sequence[str] = IMAGE_PROMPTS) -> Tensor:
    """One unit vector for each class: the direction of the mean of its prompts' vectors.

    Args:
        names: K class names, as they stand in a sentence.
        prompts: sentences with "{}" where the name goes.

    Returns:
        float32 [K, D] on the tower's device.

    Raises:
        InputError: no name, no prompt, or a prompt without "{}".
    """
    names, prompts = check_texts(names), check_prompts(prompts)
    # `replace`, not `format`: a name or prompt may hold other braces.
    texts = [prompt.replace("{}", name) for name in names for prompt in prompts]
    vectors = tower.encode(texts).unflatten(0, (len(names), len(prompts)))
    return F.normalize(vectors.mean(dim=1), dim=1)


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """`prompts` as they are.

    Raises:
        InputError: none, or one without "{}".
    """
    prompts = check_texts(prompts)
    for prompt in prompts:
        if "{}" not in prompt:
            raise InputError(f"the prompt '{prompt}' has no place for the name; write {{}} where it goes")
    return prompts


def classify(
    items: Tensor, classes: Tensor, labels: Tensor, top: Sequence[int] = (1, 5), chunk: int = CHUNK
) -> Classification:
    """Give each item the class whose vector is nearest, and compare with the truth.

    Args:
        items: floating [N, D], of any length; they are normalised here.
        classes: floating [K, D], for example `class_vectors`.
        labels: integer [N], the true class of each item.
        top: the k of the top-k accuracies; those above K are left out.
        chunk: items at a time.

    Raises:
        InputError: nothing to classify, shapes that do not fit, labels out of range, or values that are not finite.
    """
    items, classes = _unit_rows(items, "items"), _unit_rows(classes, "classes")
    _check_widths(items, classes)
    labels = _indices(labels, "labels", len(items), len(classes)).to(items.device)
    ranks, best = [], []
    for start, scores in _scores(items, classes, chunk):
        own = labels[start : start + chunk, None]
        ranks.append((scores >= scores.gather(1, own) - ROUNDING).sum(dim=1) - 1)
        best.append(scores.argmax(dim=1))
    rank, predicted = torch.cat(ranks), torch.cat(best)
    cells = torch.bincount(labels * len(classes) + predicted, minlength=len(classes) ** 2)
    confusion = cells.view(len(classes), len(classes)).cpu()
    return Classification(
        top={k: _share(rank < k) for k in top if k <= len(classes)},
        majority=float(confusion.sum(dim=1).max()) / len(items),
        confusion=confusion,
    )


def retrieve(
    images: Tensor, texts: Tensor, owners: Tensor, at: Sequence[int] = (1, 5, 10), chunk: int = CHUNK
) -> Retrieval:
    """Find the image of each text, and a text of each image.

    Args:
        images: floating [N, D], of any length; videos and assets as well.
        texts: floating [M, D].
        owners: integer [M], the image that each text describes; every image needs one text at least.
        at: the k of the recalls.
        chunk: queries at a time.

    Raises:
        InputError: shapes that do not fit, an image without a text, or values that are not finite.
    """
    images, texts = _unit_rows(images, "images"), _unit_rows(texts, "texts")
    _check_widths(images, texts)
    owners = _indices(owners, "owners", len(texts), len(images)).to(images.device)
    described = torch.bincount(owners, minlength=len(images))
    if bool((described == 0).any()):
        raise InputError(f"image {int((described == 0).int().argmax())} has no text; leave it out")
    to_image, to_text = [], []
    for start, scores in _scores(texts, images, chunk):
        own = scores.gather(1, owners[start : start + chunk, None])
        to_image.append((scores >= own - ROUNDING).sum(dim=1) - 1)
    for start, scores in _scores(images, texts, chunk):
        mine = owners[None] == torch.arange(start, start + len(scores), device=images.device)[:, None]
        own = scores.masked_fill(~mine, -torch.inf).amax(dim=1, keepdim=True)
        # Any of an image's own texts is right, so only other images' texts can stand before the best of them.
        to_text.append(((scores >= own - ROUNDING) & ~mine).sum(dim=1))
    of_texts, of_images = torch.cat(to_image), torch.cat(to_text)
    return Retrieval(
        text_to_image={k: _share(of_texts < k) for k in at},
        image_to_text={k: _share(of_images < k) for k in at},
        text_hits={k: (of_texts < k).cpu() for k in at},
    )


def _scores(queries: Tensor, keys: Tensor, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """First row and cosines [chunk, keys] of each chunk of queries."""
    for start in range(0, len(queries), chunk):
        yield start, queries[start : start + chunk] @ keys.T


def _unit_rows(vectors: Tensor, what: str) -> Tensor:
    if vectors.ndim != 2 or not vectors.is_floating_point() or not len(vectors):
        raise InputError(f"{what} must be floating [count, width], got {vectors.dtype} {list(vectors.shape)}")
    vectors = vectors.detach().to(torch.float64 if vectors.dtype == torch.float64 else torch.float32)
    if not bool(torch.isfinite(vectors).all()):
        row = int((~torch.isfinite(vectors)).any(dim=1).int().argmax())
        raise InputError(f"row {row} of {what} is not finite; look at what made it")
    return F.normalize(vectors, dim=1)


def _check_widths(first: Tensor, second: Tensor) -> None:
    if first.shape[1] != second.shape[1]:
        raise InputError(f"vectors of {first.shape[1]} and {second.shape[1]} numbers cannot be compared; use one tower")


def _indices(values: Tensor, what: str, count: int, limit: int) -> Tensor:
    if values.shape != (count,) or values.is_floating_point() or values.dtype == torch.bool:
        raise InputError(f"{what} must be {count} integers, got {values.dtype} {list(values.shape)}")
    values = values.long()
    if int(values.min()) < 0 or int(values.max()) >= limit:
        raise InputError(f"{what} must lie in 0..{limit - 1}, got {int(values.min())} to {int(values.max())}")
    return values


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
