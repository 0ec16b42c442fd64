"""Pictures and videos in files <-> uint8 RGB arrays. Knows nothing of tokens or models."""

from tokenizer.media.images import IMAGE_ENDINGS, MAX_PIXELS, SAVED_IMAGE_ENDINGS, load_image, save_image
from tokenizer.media.kinds import MediaKind, find_media, media_kind
from tokenizer.media.videos import VIDEO_ENDINGS, VideoReader
from tokenizer.media.writers import SAVED_VIDEO_ENDINGS, VideoWriter

__all__ = [
    "IMAGE_ENDINGS",
    "MAX_PIXELS",
    "SAVED_IMAGE_ENDINGS",
    "SAVED_VIDEO_ENDINGS",
    "VIDEO_ENDINGS",
    "MediaKind",
    "VideoReader",
    "VideoWriter",
    "find_media",
    "load_image",
    "media_kind",
    "save_image",
]
