"""AToken: images, videos and 3D assets as one kind of token, a sparse set in a 4D grid (arXiv 2509.14476)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizer.api import AToken
    from tokenizer.errors import InputError
    from tokenizer.model.config import ATokenConfig
    from tokenizer.sparse import SparseTokens
    from tokenizer.tokenfile import TokenFile

__all__ = ["AToken", "ATokenConfig", "InputError", "SparseTokens", "TokenFile"]

_HOMES = {
    "AToken": "tokenizer.api",
    "ATokenConfig": "tokenizer.model.config",
    "InputError": "tokenizer.errors",
    "SparseTokens": "tokenizer.sparse",
    "TokenFile": "tokenizer.tokenfile",
}


def __getattr__(name: str) -> Any:
    # Names are resolved on first use, so that `atoken --help` does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'tokenizer' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
