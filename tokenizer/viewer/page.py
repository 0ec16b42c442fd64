"""Gaussians -> the text of a page that shows them.

The page must work from a disk, from a mail and in ten years: everything is in it, and its content security policy
forbids it to load anything. A name is text, never markup, whatever characters it has.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from importlib.resources import files
from typing import Final

from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError
from tokenizer.gaussians import Gaussians
from tokenizer.viewer.pack import most_visible, pack

MAX_GAUSSIANS: Final = 500_000
"""Shown by default: 20 MB of page, which phones still turn smoothly."""

MOST_GAUSSIANS: Final = 10_000_000
"""Browsers take no string of 512 MB or more."""

MARK: Final = '<meta name="generator" content="atoken view">'
"""By which a page is known again, in its first 2 KB."""

_SCRIPTS: Final = ("scene.js", "camera.js", "painter.js", "controls.js", "viewer.js")
_PLACEHOLDER: Final = re.compile(r"\{\{(\w+)\}\}")


def splat_page(gaussians: Gaussians, name: str, *, max_gaussians: int = MAX_GAUSSIANS) -> str:
    """A self-contained HTML page.

    Args:
        gaussians: one asset.
        name: shown as the title, as it is.
        max_gaussians: of more, the most visible are shown, and the page says so.

    Raises:
        InputError: no Gaussians, several assets, or `max_gaussians` is not in 1..MOST_GAUSSIANS.
    """
    if not 1 <= max_gaussians <= MOST_GAUSSIANS:
        raise InputError(f"the number of Gaussians to show must be in 1..{MOST_GAUSSIANS}, got {max_gaussians}")
    if len(gaussians.lengths) != 1 or not len(gaussians):
        raise InputError(
            f"a page shows one asset, got {len(gaussians.lengths)} with {len(gaussians)} Gaussians in all; "
            "give it gaussians[i]"
        )
    shown = most_visible(gaussians, max_gaussians)
    scene, data = pack(shown)
    count = f"{len(shown):,} Gaussians"
    if len(shown) < len(gaussians):
        count = f"the {len(shown):,} most visible of {len(gaussians):,} Gaussians"
    # File names of other encodings hold lone surrogates, which UTF-8 cannot.
    title = name.encode("utf-8", "replace").decode("utf-8")
    parts = {
        "title": html.escape(title),
        "count": html.escape(count),
        "mark": MARK,
        "style": _resource("viewer.css"),
        "script": "\n".join(map(_resource, _SCRIPTS)),
        # Nothing in a JSON script may look like the end of the script.
        "scene": json.dumps(scene.as_json()).replace("<", "\\u003c"),
        "splats": base64.b64encode(data).decode("ascii"),
    }
    # In one pass, so that what is put in is not searched for placeholders again.
    return _PLACEHOLDER.sub(lambda match: parts[match[1]], _resource("viewer.html"))


def write_page(
    gaussians: Gaussians, path: str | os.PathLike[str], name: str, *, max_gaussians: int = MAX_GAUSSIANS
) -> int:
    """Write `splat_page` to `path`, whole or not at all, and return its size in bytes."""
    content = splat_page(gaussians, name, max_gaussians=max_gaussians).encode("utf-8")
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return len(content)


def _resource(name: str) -> str:
    return files("tokenizer.viewer").joinpath(name).read_text(encoding="utf-8")
