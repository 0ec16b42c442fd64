"""Materials of glTF 2.0: base colour, its texture with sampler and transform, and alpha.

Light has no part in the colours here: metal, roughness and emission are passed over. Factors are linear light in the
file; textures are display values already.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np

from tokenizer.assets.gltf_document import Document, JsonObject, field, number, numbers, size
from tokenizer.assets.materials import Pictures, Skin, linear_to_display
from tokenizer.assets.mesh import Floats, Material, Texture, Wrap

_WRAPS: Final[dict[int, Wrap]] = {33071: "clamp", 33648: "mirror", 10497: "repeat"}
_ALPHA_MODES: Final[dict[str, Literal["opaque", "mask", "blend"]]] = {
    "OPAQUE": "opaque",
    "MASK": "mask",
    "BLEND": "blend",
}
_OLD_WORKFLOW: Final = "KHR_materials_pbrSpecularGlossiness"

# Texture coordinates of glTF count v downwards from the top of the picture: (u, v) -> (u, 1 - v), either way.
_FLIP: Final = np.array([[1.0, 0, 0], [0, -1, 1], [0, 0, 1]])


def read_material(document: Document, item: JsonObject, pictures: Pictures) -> Skin:
    """One entry of "materials"."""
    surface = field(item, "pbrMetallicRoughness", dict, {})
    factor_key, texture_key = "baseColorFactor", "baseColorTexture"
    extensions = field(item, "extensions", dict, {})
    if _OLD_WORKFLOW in extensions:
        surface = field(extensions, _OLD_WORKFLOW, dict)
        factor_key, texture_key = "diffuseFactor", "diffuseTexture"
    *factor, alpha = numbers(surface, factor_key, [1.0, 1.0, 1.0, 1.0])
    red, green, blue = (float(value) for value in linear_to_display(np.array(factor)))
    info = field(surface, texture_key, dict, {})
    transform = field(field(info, "extensions", dict, {}), "KHR_texture_transform", dict, {})
    return Skin(
        Material(
            colour=(red, green, blue, min(max(alpha, 0.0), 1.0)),
            texture=_texture(document, info, pictures) if info else None,
            alpha=_ALPHA_MODES.get(field(item, "alphaMode", str, "OPAQUE"), "opaque"),
            cutoff=number(item, "alphaCutoff", 0.5),
        ),
        uv_matrix=_uv_matrix(transform) if transform else None,
        uv_set=size(transform, "texCoord", size(info, "texCoord", 0)),
    )


def _uv_matrix(transform: JsonObject) -> Floats:
    """KHR_texture_transform as a matrix for coordinates with v up.

    The rotation is counter-clockwise as one sees it; the formula in the text of the extension turns the other way, its
    definition, its example and its test model all turn this way.
    """
    offset, scale = numbers(transform, "offset", [0.0, 0.0]), numbers(transform, "scale", [1.0, 1.0])
    angle = number(transform, "rotation", 0.0)
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, sin], [-sin, cos]])
    matrix = np.eye(3)
    matrix[:2, :2] = rotation * np.array(scale)
    matrix[:2, 2] = offset
    turned: Floats = (_FLIP @ matrix @ _FLIP)[:2]
    return turned


def _texture(document: Document, info: JsonObject, pictures: Pictures) -> Texture | None:
    texture = document.item("textures", info.get("index"))
    webp = field(field(texture, "extensions", dict, {}), "EXT_texture_webp", dict, {})
    source = webp.get("source", texture.get("source"))
    if source is None:
        # Only an extension that is not known here says where the picture is.
        pixels = pictures.get(("texture", info["index"]), f"textures[{info['index']}]", lambda: b"")
    else:
        image = document.item("images", source)
        uri = field(image, "uri", str, "")
        label = uri if uri and not uri.startswith("data:") else f"images[{source}]"
        pixels = pictures.get(
            source, label, lambda: document.resource(uri) if uri else bytes(document.view(image.get("bufferView"))[0])
        )
    if pixels is None:
        return None
    sampler = document.item("samplers", texture["sampler"]) if "sampler" in texture else {}
    across, down = (_WRAPS.get(size(sampler, key, 10497), "repeat") for key in ("wrapS", "wrapT"))
    return Texture(pixels, across, down)
