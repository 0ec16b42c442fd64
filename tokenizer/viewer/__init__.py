"""A page that shows Gaussians: one HTML file, its own WebGL 2 renderer, nothing from a network.

Python makes the page (`pack`: Gaussians as few bytes, `page`: the file). In the page, `scene.js` unpacks the bytes,
`camera.js` holds the view, `painter.js` sorts and draws as `tokenizer.gaussians.projection` does, `controls.js` hears
mouse, fingers and keys, and `viewer.js` ties them together.
"""

from __future__ import annotations

from tokenizer.viewer.page import splat_page, write_page

__all__ = ["splat_page", "write_page"]
