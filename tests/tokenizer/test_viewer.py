"""The page that shows Gaussians: what is in it, and, in a headless Chromium, what it draws and how it handles."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.tokenizer.browser import Browser, Page
from tokenizer.cameras import orbit_cameras
from tokenizer.cli import outcome
from tokenizer.cli.view import view
from tokenizer.errors import InputError
from tokenizer.gaussians import Gaussians, read_ply, write_ply
from tokenizer.gaussians.attributes import SH_DEGREE_0, rotation_matrices
from tokenizer.viewer import splat_page, write_page
from tokenizer.viewer.pack import BYTES, most_visible, pack

Floats = NDArray[np.float64]
SIDE = 200
"""Pixels of the pages that are compared."""


def gaussians_of(rows: list[tuple[tuple[float, ...], ...]]) -> Gaussians:
    """Rows of mean, scales, quaternion, colour, (opacity,)."""
    means, scales, quaternions, colours, opacities = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)
    )
    return Gaussians(
        means, scales, quaternions, (colours - 0.5) / SH_DEGREE_0, opacities.logit(), torch.tensor([len(rows)])
    ).to(dtype=torch.float32)


RED, GREEN, BLUE = (1.0, 0.1, 0.1), (0.1, 0.9, 0.2), (0.2, 0.3, 1.0)
THREE = gaussians_of(
    [
        # In front on the left, flat, turned; behind it and higher; far right, round and faint.
        ((-0.25, -0.3, 0.0), (0.16, 0.05, 0.02), (0.9, 0.1, 0.3, -0.2), RED, (0.9,)),
        ((-0.15, 0.3, 0.12), (0.10, 0.10, 0.10), (1.0, 0.0, 0.0, 0.0), GREEN, (0.999,)),
        ((0.30, 0.0, -0.1), (0.08, 0.03, 0.09), (0.2, 0.5, 0.5, 0.7), BLUE, (0.5,)),
        # Smaller than a pixel, which the filter dims.
        ((0.05, 0.0, 0.3), (0.002, 0.001, 0.002), (1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 0.0), (0.95,)),
    ]
)


def random_gaussians(count: int, seed: int = 0) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 14, generator=generator)
    means, scales, quaternions, dc, logits = values.split([3, 3, 4, 3, 1], dim=1)
    return Gaussians(0.2 * means, torch.exp(scales - 4), quaternions, dc, logits, torch.tensor([count]))


def picture(gaussians: Gaussians, yaw: float, pitch: float, background: float, framing: Gaussians) -> Floats:
    """The predicted page [SIDE, SIDE, 3] in 0..255: each Gaussian over every pixel, the farthest first, in float64.

    yaw, pitch: of the camera, in degrees; it frames `framing` as the page does.
    """
    scene, _ = pack(framing)
    a, e = math.radians(yaw), math.radians(pitch)
    direction = torch.tensor([[math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)]])
    camera = orbit_cameras(direction, scene.radius).to(dtype=torch.float64)
    rotation, offset = (camera.world_to_camera[0, :3, part].numpy() for part in (slice(0, 3), 3))
    focal = float(camera.intrinsics[0, 0, 0]) * SIDE
    exact = gaussians.to(dtype=torch.float64)
    axes = (rotation_matrices(exact.rotations) * exact.scales[:, None]).numpy()
    local = (exact.means.numpy() - np.array(scene.centre)) @ rotation.T + offset
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    image = np.full((SIDE, SIDE, 3), background)
    for i in np.argsort(-local[:, 2]):
        x, y, z = local[i]
        jacobian = focal / z * np.array([[1, 0, -x / z], [0, 1, -y / z]])
        sharp = jacobian @ rotation @ axes[i] @ axes[i].T @ rotation.T @ jacobian.T
        wide = sharp + 0.1 * np.eye(2)
        u, v = SIDE / 2 + focal * x / z, SIDE / 2 + focal * y / z
        # Beyond 3.4 standard deviations nothing reaches an alpha of 1/255.
        reach = 3.4 * math.sqrt(np.linalg.norm(wide, 2)) + 1
        at = np.s_[max(0, int(v - reach)) : max(0, int(v + reach)), max(0, int(u - reach)) : max(0, int(u + reach))]
        away = np.stack([columns[at] - u, rows[at] - v], axis=-1)
        power = np.einsum("hwi,ij,hwj->hw", away, np.linalg.inv(wide), away)
        dimming = math.sqrt(np.linalg.det(sharp) / np.linalg.det(wide))
        alpha = float(exact.opacities[i]) * dimming * np.exp(-power / 2)
        alpha = np.where(alpha > 1 / 255, np.minimum(alpha, 0.999), 0.0)[:, :, None]
        image[at] = (1 - alpha) * image[at] + alpha * exact.colours[i].numpy()
    levels: Floats = 255 * np.clip(image, 0, 1)
    return levels


# ---------------------------------------------------------------------- the bytes


def unpack(page: str) -> tuple[dict[str, Any], dict[str, Floats]]:
    """What the format says, read with numpy alone: means, rotations, scales, colours, opacities."""
    scene = json.loads(re.findall(r'<script type="application/json" id="scene">(.*?)</script>', page)[0])
    data = base64.b64decode(re.findall(r'<script type="text/plain" id="splats">(.*?)</script>', page)[0])
    m = scene["count"]
    assert len(data) == BYTES * m
    bits = np.frombuffer(data, "<u4", m, 12 * m)
    low, high = scene["scale_range"]
    paint = np.frombuffer(data, "<u2", 4 * m, 22 * m).reshape(m, 4) / 65535
    rotations = np.empty((m, 4))
    for i, word in enumerate(bits.tolist()):
        small = [((word >> shift & 1023) / 1023 * 2 - 1) / math.sqrt(2) for shift in (20, 10, 0)]
        small.insert(word >> 30, math.sqrt(1 - sum(value**2 for value in small)))
        rotations[i] = small
    return scene, {
        "means": np.frombuffer(data, "<f4", 3 * m).reshape(m, 3).astype(np.float64),
        "rotations": rotations,
        "scales": np.exp(low + (high - low) * np.frombuffer(data, "<u2", 3 * m, 16 * m).reshape(m, 3) / 65535),
        "colours": paint[:, :3] * scene["peak"],
        "opacities": paint[:, 3:],
    }


def test_the_bytes_hold_the_gaussians() -> None:
    gaussians = random_gaussians(400)
    scene, found = unpack(splat_page(gaussians, "x"))
    assert scene["count"] == 400
    np.testing.assert_array_equal(found["means"], gaussians.means.numpy())
    np.testing.assert_allclose(found["scales"], gaussians.scales.numpy(), rtol=1e-4)
    np.testing.assert_allclose(found["colours"], gaussians.colours.numpy(), rtol=0, atol=scene["peak"] / 65535)
    np.testing.assert_allclose(found["opacities"], gaussians.opacities.numpy(), rtol=0, atol=1 / 65535)
    cosines = np.abs((found["rotations"] * gaussians.rotations.numpy()).sum(axis=1))
    assert np.degrees(2 * np.arccos(np.minimum(cosines, 1))).max() < 0.28
    inside = np.linalg.norm(found["means"] - np.array(scene["centre"]), axis=1) < scene["radius"]
    assert 0.95 < inside.mean() <= 1
    stray = replace(gaussians, means=torch.cat([gaussians.means[:-1], torch.full((1, 3), 1e4)]))
    assert unpack(splat_page(stray, "x"))[0]["radius"] < 1.2 * scene["radius"]


def test_of_too_many_the_most_visible_are_shown() -> None:
    gaussians = random_gaussians(50)
    a, b, c = gaussians.scales.unbind(1)
    weight = gaussians.opacities[:, 0] * (a * b + b * c + c * a)
    kept = sorted(sorted(range(50), key=lambda i: -float(weight[i]))[:20])
    assert torch.equal(most_visible(gaussians, 20).means, gaussians.means[kept])
    page = splat_page(gaussians, "x", max_gaussians=20)
    assert unpack(page)[0]["count"] == 20
    assert "the 20 most visible of 50 Gaussians" in page
    assert "50 Gaussians" in splat_page(gaussians, "x", max_gaussians=50)


def test_pages_it_refuses(tmp_path: Path) -> None:
    for count in (0, -1, 10**9):
        with pytest.raises(InputError, match=r"must be in 1\.\.10000000, got"):
            splat_page(THREE, "x", max_gaussians=count)
    with pytest.raises(InputError, match="one asset, got 1 with 0 Gaussians"):
        splat_page(THREE.select(slice(0, 0)), "x")
    with pytest.raises(InputError, match=r"one asset, got 2 .* gaussians\[i\]"):
        write_page(replace(THREE, lengths=torch.tensor([2, 2])), tmp_path / "x.html", "x")
    assert list(tmp_path.iterdir()) == []


def test_the_page_is_closed_to_the_network() -> None:
    page = splat_page(THREE, "x")
    assert "content=\"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'\"" in page
    assert not re.findall(r"https?:|\bsrc=|\bhref=|@import|url\(", page)


# ---------------------------------------------------------------------- the command


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `atoken view` in an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(source: str, out: str | None = None, **options: Any) -> tuple[int, str, str]:
        chosen = {"max_gaussians": None, "open_page": False, "as_json": False, **options}
        status = outcome.run(lambda: view(source, out, **chosen))
        return status, *capsys.readouterr()

    return run


def test_the_command_writes_a_page(tmp_path: Path, command: Callable[..., Any]) -> None:
    write_ply(THREE, tmp_path / "chair.ply")
    status, out, err = command("chair.ply")
    size = (tmp_path / "chair.html").stat().st_size
    assert (status, err) == (0, "")
    assert re.fullmatch(rf"chair\.ply -> chair\.html: 4 Gaussians, {size} bytes, \d+\.\d\d s\n", out)
    assert "<title>chair.ply</title>" in (tmp_path / "chair.html").read_text()
    assert command("chair.ply")[0] == 0  # its own page may be replaced

    status, out, _ = command("chair.ply", "pages/", max_gaussians=2, as_json=True)
    result = json.loads(out)["results"][0]
    assert status == 0
    assert (result["out"], result["gaussians"], result["shown"]) == ("pages/chair.html", 4, 2)
    assert result["bytes"] == (tmp_path / "pages" / "chair.html").stat().st_size
    assert "the 2 most visible shown" in command("chair.ply", "pages", max_gaussians=2)[1]


def test_what_the_command_refuses(tmp_path: Path, command: Callable[..., Any]) -> None:
    write_ply(THREE, tmp_path / "chair.ply")
    (tmp_path / "cut.ply").write_bytes((tmp_path / "chair.ply").read_bytes()[:-3])
    (tmp_path / "mine.html").write_text("my own page")
    write_ply(THREE, tmp_path / "mine.ply")
    write_ply(THREE, tmp_path / "odd.html")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments, message in (
        (("cut.ply",), "error: cut.ply: the header announces"),
        (("none.ply",), "error: none.ply: no such file"),
        (("chair.ply", "chair.png"), "error: --out chair.png: pages end in .html, .htm"),
        (("mine.ply",), "error: mine.html: exists and is not a page of atoken view; choose"),
        (("odd.html", "odd.html"), "error: odd.html: the result would replace its own source"),
    ):
        status, out, err = command(*arguments)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert err.startswith(message)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_remarks_and_opening(tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    write_ply(THREE, tmp_path / "a.ply")
    data = (tmp_path / "a.ply").read_bytes().replace(b"float nx", b"float f_rest_0", 1)
    (tmp_path / "a b.ply").write_bytes(data)
    opened: list[str] = []

    def open_browser(url: str) -> bool:
        opened.append(url)
        return len(opened) > 1

    monkeypatch.setattr("webbrowser.open", open_browser)
    status, out, err = command("a b.ply", open_page=True)
    assert status == 0
    first, second = err.splitlines()
    assert first.startswith("note: a b.ply: colours that change with the direction of view")
    assert second == "note: no browser could be opened; open a b.html yourself"
    status, out, err = command("a b.ply", open_page=True, as_json=True)
    assert (err, len(json.loads(out)["results"][0]["remarks"])) == ("", 1)
    assert opened == [(tmp_path / "a b.html").as_uri()] * 2


# ---------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(needs_program: Callable[[str], None], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    needs_program("chromium")
    running = Browser(tmp_path_factory.mktemp("chromium"))
    yield running
    running.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    opened = Page(browser, (SIDE, SIDE))
    yield opened
    opened.close()


def saved(folder: Path, gaussians: Gaussians, name: str = "scene.ply") -> str:
    """Address of a page of what a .ply file of the Gaussians holds."""
    write_ply(gaussians, folder / name)
    write_page(read_ply(folder / name), folder / "scene.html", name)
    return (folder / "scene.html").as_uri()


@pytest.mark.parametrize(("yaw", "pitch"), [(-90, 20), (90, 0), (30, -50), (0, 89)])
def test_it_draws_what_the_projection_predicts(page: Page, tmp_path: Path, yaw: float, pitch: float) -> None:
    """From the front the red one covers the green one, from the back the green one the red one."""
    address = saved(tmp_path, THREE)
    for background, level in (("white", 1.0), ("black", 0.0)):
        page.go(f"{address}#yaw={yaw}&pitch={pitch}&background={background}&spin=0&ui=0")
        seen = page.screenshot().astype(np.float64)
        expected = picture(THREE, yaw, pitch, level, THREE)
        assert expected.std() > 15
        assert np.abs(seen - expected).max() <= 3
        assert np.abs(seen - expected).mean() < 0.5
        page.evaluate("document.documentElement.dataset.state = 'old'")
    assert page.complaints() == []
    assert set(page.requests()) == {address}


def test_many_faint_layers_add_up(page: Page, tmp_path: Path) -> None:
    """More than a row of the data texture, and light that 8 bits would round away layer by layer (errors of 7)."""
    gaussians = random_gaussians(1500, seed=3)
    gaussians = replace(gaussians, opacity_logits=0.3 * gaussians.opacity_logits - 4, scales=2 * gaussians.scales)
    page.go(f"{saved(tmp_path, gaussians)}#yaw=20&pitch=10&background=black&spin=0&ui=0")
    expected = picture(gaussians, 20, 10, 0.0, gaussians)
    assert expected.std() > 15
    error = np.abs(page.screenshot() - expected)
    assert error.max() <= 3
    assert error.mean() < 0.15


def hash_of(page: Page) -> dict[str, str]:
    """The view that the page keeps in its address."""
    return {key: values[0] for key, values in parse_qs(urlparse(page.evaluate("location.href")).fragment).items()}


def test_mouse_wheel_and_keys(page: Page, tmp_path: Path) -> None:
    page.go(f"{saved(tmp_path, THREE)}#yaw=-90&pitch=0&distance=3&spin=0")
    page.drag((60, 60), (80, 50))
    page.wait(lambda: hash_of(page).get("yaw") == f"{-90 - math.degrees(20 * 0.0075):.2f}")
    assert float(hash_of(page)["pitch"]) == pytest.approx(-math.degrees(10 * 0.0075), abs=0.01)
    page.mouse("Wheel", 60, 60, deltaX=0, deltaY=100)
    page.wait(lambda: float(hash_of(page)["distance"]) == pytest.approx(3 * math.exp(0.15), rel=1e-3))

    page.key("r")
    page.wait(lambda: hash_of(page)["yaw"] == "-90.00")
    page.key("ArrowRight")
    page.wait(lambda: hash_of(page)["yaw"] == "-85.00")
    home = float(hash_of(page)["distance"])
    page.key("+")
    page.wait(lambda: float(hash_of(page)["distance"]) == pytest.approx(home / 1.15, rel=1e-3))
    page.key("r")
    page.wait(lambda: hash_of(page)["yaw"] == "-90.00")

    # The scene follows the hand: at the target, 20 pixels are 20 pixels.
    before = [float(value) for value in hash_of(page)["target"].split(",")]
    page.drag((60, 60), (80, 60), button="right")
    unit = 2 * home * math.tan(math.radians(20)) / SIDE
    page.wait(lambda: float(hash_of(page)["target"].split(",")[0]) == pytest.approx(before[0] - 20 * unit, abs=1e-3))

    for colour in ("black", "white", "grey"):
        page.key("b")
        page.wait(f"document.documentElement.dataset.background === '{colour}'")
        page.wait(f"location.href.includes('background={colour}')")
    page.key("h")
    assert page.evaluate("document.documentElement.dataset.help") == "off"
    assert page.complaints() == []
    # The address is a bookmark.
    kept = page.evaluate("location.href")
    page.go(kept)
    assert page.evaluate("location.href") == kept


def test_the_turntable_turns_until_it_is_touched(page: Page, tmp_path: Path) -> None:
    page.go(f"{saved(tmp_path, THREE)}#background=black")
    assert page.evaluate("document.getElementById('spin').getAttribute('aria-pressed')") == "true"
    first = page.screenshot()
    page.wait(lambda: np.abs(page.screenshot()[:, :, 0].astype(int) - first[:, :, 0]).max() > 40)
    page.mouse("Pressed", 90, 90, button="left", clickCount=1)
    page.mouse("Released", 90, 90, button="left", clickCount=1)
    page.wait(lambda: hash_of(page).get("spin") == "0")
    page.key(" ")
    page.wait("document.getElementById('spin').getAttribute('aria-pressed') === 'true'")
    page.evaluate("document.getElementById('reset').click()")
    page.wait(lambda: hash_of(page)["pitch"] == "20.00" and hash_of(page)["yaw"] == "-90.00")
    # However slow the turning was, what stands still is drawn in full.
    assert page.evaluate("document.getElementById('view').width") == SIDE


def test_two_fingers_zoom_and_move(page: Page, tmp_path: Path) -> None:
    page.call("Emulation.setTouchEmulationEnabled", enabled=True, maxTouchPoints=2)
    page.go(f"{saved(tmp_path, THREE)}#yaw=-90&pitch=0&distance=3&target=0,0,0&spin=0")
    page.touch("Start", (80, 100))
    page.touch("Start", (80, 100), (120, 100))
    page.touch("Move", (60, 100), (120, 100))
    page.touch("Move", (60, 100), (140, 100))
    page.touch("End")
    page.wait(lambda: float(hash_of(page).get("distance", 0)) == pytest.approx(1.5, rel=1e-3))
    assert hash_of(page)["yaw"] == "-90.00"
    page.touch("Start", (100, 100))
    page.touch("Move", (100, 120))
    page.touch("End")
    page.wait(lambda: float(hash_of(page)["pitch"]) == pytest.approx(math.degrees(20 * 0.0075), abs=0.01))


def test_on_another_screen_it_draws_that_ones_pixels(page: Page, tmp_path: Path) -> None:
    """A window keeps its size in CSS pixels when it moves, so that nothing but the density tells."""
    page.go(f"{saved(tmp_path, THREE)}#yaw=-90&pitch=20&background=white&spin=0&ui=0")
    for density in (2, 1.5, 1.25):
        metrics = {"width": SIDE, "height": SIDE, "deviceScaleFactor": density, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **metrics)

        def drawn(width: float = density * SIDE) -> bool:
            page.screenshot()  # without anybody who looks, nothing is laid out anew
            return bool(page.evaluate("document.getElementById('view').width") == width)

        page.wait(drawn)
    assert page.screenshot().shape == (1.25 * SIDE, 1.25 * SIDE, 3)


def test_a_view_put_into_the_address_is_shown(page: Page, tmp_path: Path) -> None:
    """By hand or by a link: the browser keeps the page, so that the page has to look."""
    page.go(f"{saved(tmp_path, THREE)}#yaw=-90&pitch=20&distance=9&background=black&spin=0&ui=0")
    page.evaluate("location.hash = 'yaw=-60&pitch=10&background=white&spin=0&ui=0'")
    # What it does not name is as if the page had been opened with it.
    expected = picture(THREE, -60, 10, 1.0, THREE)
    page.wait(lambda: np.abs(page.screenshot() - expected).max() <= 3)
    page.evaluate("location.hash = 'ui=0'")
    page.wait(lambda: page.evaluate("document.getElementById('spin').getAttribute('aria-pressed')") == "true")


HOSTILE = [
    "</title><script>window.hurt = 1</script>.ply",
    "<img src=x onerror='window.hurt = 1'>&amp;\"'.ply",
    "{{splats}} {{script}} \\1 \\u003c $& `${1}`.ply",
    "ein Stühlchen, 椅子 \u202e\udcff.ply",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text(page: Page, tmp_path: Path, name: str) -> None:
    write_page(THREE, tmp_path / "x.html", name)
    page.go((tmp_path / "x.html").as_uri() + "#spin=0")
    shown = name.replace("\udcff", "?")
    assert page.evaluate("document.querySelector('h1').textContent") == shown
    assert page.evaluate("document.querySelector('header p').textContent") == "4 Gaussians"
    assert page.evaluate("document.documentElement.dataset.state") == "drawn"
    assert page.evaluate("window.hurt ?? 0") == 0
    assert page.evaluate("document.images.length") == 0


def test_without_webgl_it_says_so(browser: Browser, tmp_path: Path) -> None:
    page = Page(browser, (SIDE, SIDE), before="HTMLCanvasElement.prototype.getContext = () => null")
    page.go(saved(tmp_path, THREE))
    assert "WebGL 2, which this browser lacks" in page.evaluate("document.getElementById('message').innerText")
    assert page.evaluate("document.documentElement.dataset.state") == "failed"
    assert page.screenshot().std() > 5
    page.close()


def test_a_lost_graphics_context_comes_back(page: Page, tmp_path: Path) -> None:
    before = (
        "const make = HTMLCanvasElement.prototype.getContext;"
        "HTMLCanvasElement.prototype.getContext = function (...rest) { return window.gl = make.apply(this, rest); };"
    )
    page.call("Page.addScriptToEvaluateOnNewDocument", source=before)
    page.go(f"{saved(tmp_path, THREE)}#yaw=-90&pitch=20&background=white&spin=0&ui=0")
    page.evaluate("window.loss = window.gl.getExtension('WEBGL_lose_context'); window.loss.loseContext()")
    page.wait("window.gl.isContextLost()")
    page.evaluate("new Promise((done) => setTimeout(done, 50)).then(() => window.loss.restoreContext())")
    expected = picture(THREE, -90, 20, 1.0, THREE)
    page.wait(lambda: np.abs(page.screenshot() - expected).max() <= 3)
