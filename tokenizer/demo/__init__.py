"""The photograph, the clip and the 3D model that `atoken demo` reconstructs; CREDITS.md says where they come from."""

from pathlib import Path

PHOTOGRAPH = Path(__file__).with_name("coffee.jpg")
"""600x400 scaled to 384x256."""

CLIP = Path(__file__).with_name("bunny.mp4")
"""36 frames of 320x180 at 25 frames per second."""

ASSET = Path(__file__).with_name("bread.glb")
"""420 triangles with a texture of 512x512."""
