"""Telling pictures from videos, and finding both in folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from tokenizer.errors import InputError
from tokenizer.media.animations import is_animation
from tokenizer.media.images import IMAGE_ENDINGS, check_file, open_image
from tokenizer.media.videos import VIDEO_ENDINGS

MediaKind = Literal["image", "video"]


def media_kind(path: str | os.PathLike[str]) -> MediaKind:
    """Whether a file holds a picture or a video. An animated GIF, WebP or PNG is a video.

    Looks at the content where the ending does not say it; opens pictures only as far as their header.

    Raises:
        InputError: no such file, or an empty one.
    """
    file = check_file(path)
    ending = file.suffix.lower()
    if ending in VIDEO_ENDINGS:
        return "video"
    if is_animation(file):
        return "video"
    if ending in IMAGE_ENDINGS or ending == ".gif":
        return "image"
    try:
        open_image(file).close()
    except InputError:
        return "video"
    return "image"


def find_media(folder: Path) -> list[Path]:
    """All pictures and videos below `folder`, by ending, sorted; hidden files and folders are left out.

    Raises:
        InputError: there are none.
    """
    endings = {*IMAGE_ENDINGS, *VIDEO_ENDINGS, ".gif"}
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in endings
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        raise InputError(f"{folder}: no pictures or videos in it ({', '.join(sorted(endings))})")
    return found
