"""Names of the ways in which views become voxels. They stand alone so that a configuration can name one cheaply."""

from __future__ import annotations

from typing import Literal, get_args

PackingRule = Literal["surface", "average", "visible", "released"]
"""`tokenizer.assets.packing` says what each does."""

PACKING_RULES: tuple[PackingRule, ...] = get_args(PackingRule)
