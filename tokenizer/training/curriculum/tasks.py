"""What a batch is trained for: six tasks, three kinds of visuals (PAPER 3)."""

from __future__ import annotations

IMAGE_UNDERSTANDING = "image_understanding"
IMAGE_RECONSTRUCTION = "image_reconstruction"
VIDEO_UNDERSTANDING = "video_understanding"
VIDEO_RECONSTRUCTION = "video_reconstruction"
ASSET_UNDERSTANDING = "asset_understanding"
ASSET_RECONSTRUCTION = "asset_reconstruction"

TASKS = (
    *(IMAGE_UNDERSTANDING, IMAGE_RECONSTRUCTION),
    *(VIDEO_UNDERSTANDING, VIDEO_RECONSTRUCTION),
    *(ASSET_UNDERSTANDING, ASSET_RECONSTRUCTION),
)


def is_understanding(task: str) -> bool:
    """Whether a task aligns pooled vectors with texts; the others reconstruct."""
    return task.endswith("_understanding")


def is_asset(task: str) -> bool:
    """Whether a task is of voxels."""
    return task.startswith("asset")


def is_video(task: str) -> bool:
    """Whether all frames of a patch hold something; stills and voxels fill the first alone."""
    return task.startswith("video")
