"""What other packages say while they are imported, and users can do nothing about."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_TALKATIVE = ("torchao", "torch.utils._pytree")
"""torchao names each of its libraries that is for another CUDA, and makes torch warn of how it registers its types.
transformers imports it wherever it is installed."""


@contextmanager
def quiet_imports() -> Iterator[None]:
    """These packages log errors alone; what they raise passes through."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
