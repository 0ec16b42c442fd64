"""A headless Chromium that tests can look into: the DevTools protocol over two pipes, with the standard library alone.

Protocol: https://chromedevtools.github.io/devtools-protocol/, JSON messages that end in a zero byte. The browser gets
no network worth the name, draws in software, and keeps its profile in a folder of the test.
"""

from __future__ import annotations

import base64
import io
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions"),
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--force-color-profile=srgb"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe"),
)

# Chromium reads commands from descriptor 3 and answers on 4. The two are moved out of the way of each other first.
_WITH_PIPES = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for place, end in zip((3, 4), ends):
    os.dup2(end, place)
os.execvp(sys.argv[3], sys.argv[3:])
"""

_PATIENCE = 120.0
"""Seconds for anything; software drawing beside a busy machine takes its time."""


class Browser:
    """A running Chromium; `close` ends it.

    Args:
        folder: for its profile and its log.
    """

    def __init__(self, folder: Path) -> None:
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        shim = [sys.executable, "-c", _WITH_PIPES, str(commands), str(answers)]
        self._log = (folder / "chromium.log").open("wb")
        self._process = subprocess.Popen(
            [*shim, "chromium", *_FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            pass_fds=(commands, answers),
            stdout=self._log,
            stderr=self._log,
        )
        os.close(commands)
        os.close(answers)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for end in (self._read, self._write):
            os.close(end)
        self._log.close()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """One command and its result; events that come in between are kept in `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next(method)).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self, reason: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], _PATIENCE)
            data = os.read(self._read, 1 << 16) if ready else b""
            assert data, f"Chromium {'ended' if ready else 'is silent'} on {reason}: {self._last_words()}"
            self._buffer += data
        first, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(first)
        return message

    def _last_words(self) -> str:
        return Path(self._log.name).read_text(errors="replace")[-500:]


class Page:
    """A tab of `size` (width, height) pixels. `before` is JavaScript that runs before any of the page's own."""

    def __init__(self, browser: Browser, size: tuple[int, int], before: str = "") -> None:
        self._browser = browser
        self._target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        width, height = size
        for method in ("Page.enable", "Runtime.enable", "Network.enable", "Log.enable"):
            self.call(method)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.addScriptToEvaluateOnNewDocument", source=before)

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def go(self, url: str) -> None:
        """Load a page anew and wait until it has drawn or failed."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url.split('#')[0])})")
        self.wait("['drawn', 'failed'].includes(document.documentElement.dataset.state)")

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str | Callable[[], object]) -> None:
        """Until a JavaScript expression, or a function, is true."""
        end = time.monotonic() + _PATIENCE
        while not (self.evaluate(condition) if isinstance(condition, str) else condition()):
            assert time.monotonic() < end, f"still not: {condition}"
            time.sleep(0.02)

    def screenshot(self) -> NDArray[np.uint8]:
        """[height, width, 3]."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def mouse(self, kind: str, x: float, y: float, button: str = "none", **more: Any) -> None:
        """kind: Pressed, Moved, Released or Wheel (then deltaX and deltaY)."""
        held = {"left": 1, "right": 2}.get(button, 0) if kind == "Moved" else 0
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button=button, buttons=held, **more)

    def drag(self, start: tuple[float, float], end: tuple[float, float], button: str = "left") -> None:
        self.mouse("Pressed", *start, button=button, clickCount=1)
        self.mouse("Moved", *end, button=button)
        self.mouse("Released", *end, button=button, clickCount=1)

    def touch(self, kind: str, *points: tuple[float, float]) -> None:
        """kind: Start, Move or End."""
        places = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        self.call("Input.dispatchTouchEvent", type=f"touch{kind}", touchPoints=places)

    def key(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def requests(self) -> list[str]:
        """Addresses of everything that was asked for."""
        sent = self._events("Network.requestWillBeSent")
        return [event["request"]["url"] for event in sent]

    def complaints(self) -> list[str]:
        """Exceptions, and what else the console shows as errors."""
        thrown = [str(event["exceptionDetails"]) for event in self._events("Runtime.exceptionThrown")]
        logged = [event["entry"] for event in self._events("Log.entryAdded")]
        return thrown + [entry["text"] for entry in logged if entry["level"] == "error"]

    def _events(self, method: str) -> list[dict[str, Any]]:
        mine = (event for event in self._browser.events if event.get("sessionId") == self._session)
        return [event["params"] for event in mine if event["method"] == method]
