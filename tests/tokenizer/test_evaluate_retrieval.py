"""Intervals of retrieval with several captions a picture: over pictures, since captions of one picture are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.evaluation.bootstrap import bootstrap_mean, bootstrap_ratio
from tokenizer.evaluation.command.understanding import retrieval, zero_shot
from tokenizer.text.zero_shot import retrieve

COUNT, WIDTH = 80, 128
VECTORS = F.normalize(torch.randn(COUNT, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)


class Oracle:
    """A tower that knows which picture a caption "NUMBER ..." is of, or takes it for the next one."""

    name, width = "oracle", WIDTH

    def __init__(self, right: Tensor) -> None:
        self._right = right

    def encode(self, texts: Sequence[str]) -> Tensor:
        numbers = [int(text.split()[0]) for text in texts]
        return torch.stack([VECTORS[n if self._right[n] else (n + 1) % COUNT] for n in numbers])


def figures(right: Tensor, captions: Sequence[int]) -> dict[str, Any]:
    """Of pictures that are right with all captions or with none."""
    words = {str(n): [f"{n} words {word}" for word in range(captions[n])] for n in range(COUNT)}
    vectors = {str(n): VECTORS[n] for n in range(COUNT)}
    found = retrieval(vectors, words, Oracle(right), seed=0)
    assert found is not None
    assert found["captions"] == sum(captions)
    return dict(found["figures"])


def draw(seed: int, share: float = 0.6) -> Tensor:
    return torch.rand(COUNT, generator=torch.Generator().manual_seed(seed)) < share


def test_captions_that_say_the_same_add_nothing_to_what_is_known() -> None:
    right = draw(0)
    once, often = figures(right, [1] * COUNT)["t2v_r1"], figures(right, [5] * COUNT)["t2v_r1"]
    assert often == pytest.approx(once)
    wanted = bootstrap_mean(right.double().numpy(), 0)
    assert (often["value"], often["low"], often["high"], often["n"]) == pytest.approx(
        (wanted.value, wanted.low, wanted.high, COUNT)
    )


def test_pictures_count_by_their_captions() -> None:
    right, captions = draw(1), [1 + number % 4 for number in range(COUNT)]
    found = figures(right, captions)["t2v_r1"]
    hits = right.double() * torch.tensor(captions)
    wanted = bootstrap_ratio(hits.numpy(), captions, 0)
    assert (found["value"], found["low"], found["high"]) == pytest.approx((wanted.value, wanted.low, wanted.high))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Resampling five captions a picture as if each were drawn alone, it would hold it 60 times of 100."""
    found = [figures(draw(seed), [5] * COUNT)["t2v_r1"] for seed in range(60)]
    assert sum(one["low"] <= 0.6 <= one["high"] for one in found) >= 52


def test_hits_tell_which_captions_are_right() -> None:
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0.2, 0], [0.5, 1.0, 0], [0, 1.0, 0], [0.8, 1.0, 0.9]])
    found = retrieve(images, texts, torch.tensor([0, 0, 1, 2]), at=(1, 2))
    assert found.text_hits[1].tolist() == [True, False, True, False]
    assert found.text_hits[2].tolist() == [True, True, True, True]
    assert found.text_to_image == {1: 0.5, 2: 1.0}


@pytest.mark.parametrize(
    ("samples", "captions", "wanted"),
    [
        (2, 1, {"t2v_r1", "v2t_r1"}),
        (5, 1, {"t2v_r1", "v2t_r1"}),
        (6, 1, {"t2v_r1", "t2v_r5", "v2t_r1", "v2t_r5"}),
        (5, 2, {"t2v_r1", "v2t_r1", "v2t_r5"}),  # eight captions are of others
        (10, 1, {"t2v_r1", "t2v_r5", "v2t_r1", "v2t_r5"}),
        (11, 1, {"t2v_r1", "t2v_r5", "t2v_r10", "v2t_r1", "v2t_r5", "v2t_r10"}),
    ],
)
def test_recalls_that_nobody_can_miss_are_left_out(samples: int, captions: int, wanted: set[str]) -> None:
    words = {str(n): [f"{n} words {word}" for word in range(captions)] for n in range(samples)}
    wrong = Oracle(torch.zeros(COUNT, dtype=torch.bool))
    found = retrieval({str(n): VECTORS[n] for n in range(samples)}, words, wrong, seed=0)
    assert found is not None
    assert set(found["figures"]) == wanted


@pytest.mark.parametrize(("classes", "wanted"), [(4, {"top1"}), (5, {"top1"}), (6, {"top1", "top5"})])
def test_the_five_nearest_of_five_classes_are_no_figure(classes: int, wanted: set[str]) -> None:
    vectors = {str(n): VECTORS[n] for n in range(classes)}
    names = {f"class {n}": f"{n}" for n in range(classes)}
    labels = {str(n): f"class {n}" for n in range(classes)}
    found = zero_shot(vectors, labels, names, Oracle(torch.ones(COUNT, dtype=torch.bool)), ["{} of them"], seed=0)
    assert found is not None
    assert set(found["figures"]) == wanted
    assert found["figures"]["top1"]["value"] == 1
