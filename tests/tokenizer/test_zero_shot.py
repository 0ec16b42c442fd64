"""Zero-shot classification and retrieval against brute force and cases whose figures are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tokenizer.errors import InputError
from tokenizer.text.protocol import TextTower, check_texts
from tokenizer.text.zero_shot import IMAGE_PROMPTS, class_vectors, classify, retrieve

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


class Letters:
    """A text tower that counts letters."""

    name = "letters"
    width = 27

    def encode(self, texts: Sequence[str]) -> Tensor:
        counts = torch.zeros(len(check_texts(texts)), self.width)
        for row, text in zip(counts, texts, strict=True):
            for letter in text.lower():
                row[ord(letter) - 96 if "a" <= letter <= "z" else 0] += 1
        return F.normalize(counts, dim=1)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _one_line(action: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        action()
    assert "\n" not in str(caught.value)


def test_a_class_is_the_direction_of_the_mean_of_its_prompts() -> None:
    tower = Letters()
    assert isinstance(tower, TextTower)
    found = class_vectors(tower, ["cat", "{dog}"], ["{}", "a {} or two {}"])
    for row, texts in zip(found, (["cat", "a cat or two cat"], ["{dog}", "a {dog} or two {dog}"]), strict=True):
        torch.testing.assert_close(row, F.normalize(tower.encode(texts).mean(dim=0), dim=0))
    assert class_vectors(tower, ["cat"]).shape == (1, 27)
    assert all("{}" in prompt for prompt in IMAGE_PROMPTS)
    _one_line(lambda: class_vectors(tower, ["cat"], ["a photo"]), "no place for the name")
    _one_line(lambda: class_vectors(tower, []), "at least one text")


def test_classification_of_known_items() -> None:
    classes = torch.eye(3)
    items = torch.tensor([[5.0, 0, 0], [0.1, 0.2, 0.0], [0, 3.0, 1.0], [1.0, 0.9, 0.8]])
    found = classify(items, classes, torch.tensor([0, 1, 2, 2]), top=(1, 2, 3, 5))
    assert found.top == {1: 0.5, 2: 0.75, 3: 1.0}
    assert found.majority == 0.5
    assert found.confusion.tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 0]]
    assert found.recall.tolist() == [1.0, 1.0, 0.0]


def test_who_says_the_same_of_everything_is_right_about_nothing() -> None:
    same = torch.ones(6, 4)
    assert classify(same, torch.ones(3, 4), torch.zeros(6, dtype=torch.int64), top=(1, 2)).top == {1: 0.0, 2: 0.0}
    found = retrieve(same, torch.ones(12, 4), torch.arange(12) // 2, at=(1, 5))
    assert found.text_to_image == {1: 0.0, 5: 0.0}
    assert found.image_to_text == {1: 0.0, 5: 0.0}
    # Of an odd count the last column is summed in another order, so its score differs in the last bit.
    odd = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).repeat(5, 1)
    assert classify(odd, odd, torch.arange(5), top=(1,)).top == {1: 0.0}
    found = retrieve(odd, odd, torch.arange(5), at=(1,))
    assert (found.text_to_image, found.image_to_text) == ({1: 0.0}, {1: 0.0})


@QUICK
@given(st.integers(1, 20), st.integers(1, 7), st.integers(1, 9), st.integers(0, 1000))
def test_classification_is_that_of_sorting_whatever_the_chunk(count: int, kinds: int, chunk: int, seed: int) -> None:
    items, classes = _random(count, 4, seed=seed), _random(kinds, 4, seed=seed + 1)
    labels = torch.randint(kinds, (count,), generator=torch.Generator().manual_seed(seed))
    order = (F.normalize(items, dim=1) @ F.normalize(classes, dim=1).T).argsort(dim=1, descending=True)
    found = classify(items, classes, labels, top=(1, 3), chunk=chunk)
    for k, share in found.top.items():
        assert share == pytest.approx(float((order[:, :k] == labels[:, None]).any(dim=1).double().mean()))
    assert found.confusion.sum() == count
    assert found.confusion.diagonal().sum() / count == pytest.approx(found.top[1])


@QUICK
@given(st.integers(1, 8), st.integers(0, 12), st.integers(1, 9), st.integers(0, 1000))
def test_retrieval_is_that_of_sorting_whatever_the_chunk(count: int, more: int, chunk: int, seed: int) -> None:
    images, texts = _random(count, 5, seed=seed), _random(count + more, 5, seed=seed + 1)
    extra = torch.randint(count, (more,), generator=torch.Generator().manual_seed(seed))
    owners = torch.cat([torch.arange(count), extra])
    scores = F.normalize(texts, dim=1) @ F.normalize(images, dim=1).T
    found = retrieve(images, texts, owners, at=(1, 2, 10), chunk=chunk)
    for k in (1, 2, 10):
        of_texts = scores.argsort(dim=1, descending=True)[:, :k]
        of_images = scores.T.argsort(dim=1, descending=True)[:, :k]
        right = (owners[of_images] == torch.arange(count)[:, None]).any(dim=1)
        assert found.text_to_image[k] == pytest.approx(float((of_texts == owners[:, None]).any(dim=1).double().mean()))
        assert found.image_to_text[k] == pytest.approx(float(right.double().mean()))


def test_several_texts_of_an_image_do_not_stand_in_each_others_way() -> None:
    images = torch.eye(2)
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    found = retrieve(images, texts, torch.tensor([0, 0, 0, 1]), at=(1,))
    assert (found.text_to_image[1], found.image_to_text[1]) == (1.0, 1.0)
    # The only text of the second image is nearer to the first.
    found = retrieve(images, texts[:3], torch.tensor([0, 0, 1]), at=(1,))
    assert found.text_to_image[1] == pytest.approx(2 / 3)
    assert found.image_to_text[1] == 1.0


def test_what_does_not_fit_is_named() -> None:
    items, classes, labels = torch.ones(3, 4), torch.eye(4), torch.tensor([0, 1, 2])
    _one_line(lambda: classify(items, classes[:, :3], labels), "vectors of 4 and 3 numbers")
    _one_line(lambda: classify(items, classes, labels + 2), "labels must lie in 0..3, got 2 to 4")
    _one_line(lambda: classify(items, classes, labels.float()), "labels must be 3 integers")
    _one_line(lambda: classify(items[:0], classes, labels), "items must be floating")
    _one_line(lambda: classify(items / torch.tensor([[1.0], [0.0], [1.0]]), classes, labels), "row 1 of items")
    _one_line(lambda: retrieve(items, classes, torch.tensor([0, 0, 2, 2])), "image 1 has no text")
