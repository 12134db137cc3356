"""A headless chromium that opens one page, driven over a pipe (the DevTools protocol); it knows no page of ours."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-quic"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    "--remote-debugging-pipe",
)
PATIENCE_S = 60.0
_LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, wanted in zip(ends, (3, 4)):  # where chromium looks for its pipe
    os.dup2(end, wanted)
    os.close(end)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """Its path, None where it is not installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def open_page(chromium: str, page: Path, profile: Path) -> Iterator[Page]:
    """A page in a browser of its own, until the end of the block."""
    from_us, to_us = os.pipe(), os.pipe()
    words = [sys.executable, "-ISc", _LAUNCH, str(from_us[0]), str(to_us[1]), chromium, *FLAGS]
    words += [f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(
        words, pass_fds=(from_us[0], to_us[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        os.close(from_us[0])
        os.close(to_us[1])
        try:
            yield Page(from_us[1], to_us[0], page)
        finally:
            os.close(from_us[1])  # chromium ends with its pipe
            os.close(to_us[0])
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


class Page:
    """What a reader can do with a page, and what the page did.

    Attributes:
        errors: What it complained of, exceptions included.
        requests: Addresses that it asked for, its own aside.
    """

    def __init__(self, write_fd: int, read_fd: int, page: Path) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._write_fd, self._read_fd = write_fd, read_fd
        self._numbers = itertools.count(1)
        self._rest = b""
        self._loaded = False
        self._session: dict[str, str] = {}
        self._url = page.resolve().as_uri()
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")
        self.resize(1300, 860)
        self._loaded = False
        self._ask("Page.navigate", url=self._url)
        self._read_until(lambda: self._loaded)

    def resize(self, width: int, height: int) -> None:
        """Another window (CSS pixels)."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def show_as(self, *, media: str = "", scheme: str = "light") -> None:
        """On paper (media "print"), or in a dark room (scheme "dark")."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._ask("Emulation.setEmulatedMedia", media=media, features=features)

    def read(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """One key, down and up."""
        for kind in ("keyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def click(self, selector: str) -> None:
        """The middle of the first such element, scrolled into view."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.read(f"{found}.scrollIntoView({{block: 'center', inline: 'center'}})")
        x, y = self.read(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({found}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def keep_picture(self, path: Path, *, whole: bool = False) -> None:
        """What is seen now, or the whole page, as PNG."""
        answer = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **self._session}
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        answers: list[dict[str, Any]] = []
        self._read_until(lambda: bool(answers), number, answers)
        assert "error" not in answers[0], f"{method}: {answers[0]['error']}"
        return answers[0]["result"]

    def _read_until(self, done: Any, number: int = 0, answers: list[dict[str, Any]] | None = None) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not done():
            ready, _, _ = select.select([self._read_fd], [], [], max(0.0, end_s - time.monotonic()))
            part = os.read(self._read_fd, 1 << 16) if ready else b""
            assert part, "chromium does not answer"
            *whole, self._rest = (self._rest + part).split(b"\0")
            for text in whole:
                message = json.loads(text)
                if answers is not None and message.get("id") == number:
                    answers.append(message)
                self._notice(message.get("method", ""), message.get("params", {}))

    def _notice(self, method: str, what: dict[str, Any]) -> None:
        match method:
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.exceptionThrown":
                self.errors.append(what["exceptionDetails"]["text"])
            case "Runtime.consoleAPICalled" if what["type"] in ("error", "warning", "assert"):
                self.errors.append(str([one.get("value") for one in what["args"]]))
            case "Log.entryAdded" if what["entry"]["level"] in ("error", "warning"):
                self.errors.append(what["entry"]["text"])
            case "Network.requestWillBeSent" if what["request"]["url"].partition("#")[0] != self._url:
                if not what["request"]["url"].startswith("data:"):
                    self.requests.append(what["request"]["url"])
