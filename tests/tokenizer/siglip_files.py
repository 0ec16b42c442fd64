"""A tiny SigLIP 2 with random weights on disk, for tests of what reads such folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SENTENCES = (
    *("a photo of a cat", "a photo of a dog", "two chairs and a table", "the red lamp stands on a wooden desk"),
    *("a drawing of the sun over green hills", "people walking along a busy street at night", "a small blue boat"),
)
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_siglip2(
    folder: Path, *, vocabulary: int = 64, positions: int = 16, patch: int = 8, projection: int = 24
) -> Any:
    """Save a checkpoint with both towers, and return the model; the tokenizer is left to the caller."""
    import transformers

    vision = {**TEXT, "num_patches": positions, "patch_size": patch}
    text = {**TEXT, "vocab_size": vocabulary, "projection_size": projection}
    torch.manual_seed(0)  # transformers draws weights from the global generator alone
    model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


def save_fast_tokenizer(folder: Path, vocabulary: int = 64) -> Any:
    """A `tokenizer.json` with the special tokens of SigLIP 2, which would add a start token and pad to 16."""
    from tokenizers import Tokenizer, models, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def save_sentencepiece(folder: Path, vocabulary: int = 64) -> None:
    """A `tokenizer.model` with the special tokens of SigLIP 2."""
    import io

    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=written,
        vocab_size=vocabulary,
        model_type="bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
