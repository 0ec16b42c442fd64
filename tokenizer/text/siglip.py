"""The text tower of SigLIP 2 from a local folder (FORMAT 12; arXiv 2502.14786).

A text becomes exactly 64 numbers: at most 63 of its tokens, the end token 1, and zeros. The tower reads the last place,
which is padding for all but long texts, and attends to the padding too: that is how it was trained, so the padding must
be there, and no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tokenizer.errors import InputError, require_package
from tokenizer.text.clean import clean_caption
from tokenizer.text.folder import load_frozen, read_kind
from tokenizer.text.protocol import check_texts, encode_in_chunks

CONTEXT = 64
PADDING, END = 0, 1
CHUNK = 256
"""Texts at a time."""

Tokenize = Callable[[str], list[int]]


class SiglipText:
    """SigLIP 2's text tower. A `TextTower`.

    Args:
        folder: a local folder as transformers saves it, with a tokenizer (`tokenizer.json`, or a sentencepiece
            `tokenizer.model`). A whole checkpoint will do; a fixed-size one (`siglip`) has the same text tower.
        device: where it runs.
        dtype: of the weights.
        clean: what a text goes through first; by default as captions were cleaned in training.

    Raises:
        InputError: a missing package or file, or a checkpoint of something else.
    """

    def __init__(
        self,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        clean: Callable[[str], str] = clean_caption,
    ) -> None:
        kind = "Siglip2TextModel" if read_kind(folder).startswith("siglip2") else "SiglipTextModel"
        self.tower = load_frozen(folder, kind, "reading texts with SigLIP 2", dtype).to(device)
        config = self.tower.config
        if config.max_position_embeddings < CONTEXT:
            raise InputError(
                f"{folder}: a text tower of {config.max_position_embeddings} places; SigLIP 2 has {CONTEXT}"
            )
        self.tokenize = _tokenizer(Path(folder))
        self.clean = clean
        self.width = int(config.projection_size)
        self.name = f"siglip2-text-{config.hidden_size}x{config.num_hidden_layers}"

    def encode(self, texts: Sequence[str]) -> Tensor:
        """See `TextTower`."""
        return encode_in_chunks(check_texts(texts), CHUNK, self._pooled)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """What the tower reads, int64 [B, 64] on the CPU."""
        rows = torch.full((len(texts), CONTEXT), PADDING)
        for row, text in zip(rows, texts, strict=True):
            ids = [*self.tokenize(self.clean(text))[: CONTEXT - 1], END]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def _pooled(self, texts: list[str]) -> Tensor:
        pooled: Tensor = self.tower(input_ids=self.tokens(texts).to(self.tower.device)).pooler_output
        return pooled


def _tokenizer(folder: Path) -> Tokenize:
    """The tokenizer of a checkpoint, without the special tokens and padding that differ between its releases."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return _fast_tokenizer(path)
    path = folder / "tokenizer.model"
    if path.is_file():
        return _sentencepiece_tokenizer(path)
    raise InputError(f"{folder}: holds neither tokenizer.json nor tokenizer.model; copy the tokenizer there")


def _fast_tokenizer(path: Path) -> Tokenize:
    require_package("tokenizers", "reading texts with SigLIP 2", "train")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # The package raises nothing more exact.
        raise InputError(f"{path}: not a tokenizer ({str(error).splitlines()[0]}); copy it again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def _sentencepiece_tokenizer(path: Path) -> Tokenize:
    require_package("sentencepiece", "reading texts with SigLIP 2", "train")
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: not a sentencepiece model ({str(error).splitlines()[0]}); copy it again") from None
    return lambda text: list(processor.encode(text, add_bos=False, add_eos=False))
