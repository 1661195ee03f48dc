"""Chromium without a window, spoken to through two pipes in its own protocol (--remote-debugging-pipe): no port, no package."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# nothing of its own goes out, and nothing asks for a sandbox that a container may not have
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


def chromium() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """A page at a time. events: what the browser said that was not an answer."""

    def __init__(self, program: str):
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (theirs, mine), (read, said) = os.pipe(), os.pipe()
        fds = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs, said)]  # it reads 3, writes 4
        os.close(theirs)
        os.close(said)

        def place() -> None:
            for target, fd in zip((3, 4), fds, strict=True):
                os.dup2(fd, target)

        words = [program, *FLAGS, f"--user-data-dir={self._home.name}", "about:blank"]
        pipes: dict[str, Any] = {"preexec_fn": place, "pass_fds": (3, 4)}
        self._child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **pipes)
        for fd in fds:
            os.close(fd)
        self._to, self._from, self._buffer, self._number = mine, read, b"", 0
        self.events: list[dict[str, Any]] = []
        self._session = ""
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            more = os.read(self._from, 1 << 16)
            assert more, "the browser has ended"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 30
        while (found := self._next(deadline)).get("id") != self._number:
            self.events.append(found)
        assert "error" not in found, found
        answer: dict[str, Any] = found["result"]
        return answer

    def open(self, path: Path, wide: int, dark: bool = False) -> None:
        """Show a file in a window of so many pixels, until it has loaded."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=wide, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + 30
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next(deadline))

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        """What a reader of the console would have seen, and every request but for the page itself."""
        self.ask("1")  # what was said before this answer has arrived with it
        asked = [e for e in self.events if e["method"] == "Network.requestWillBeSent"]
        others = [e for e in asked if e["params"]["type"] != "Document"]
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return others + [e for e in self.events if e["method"] in kinds]

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        os.close(self._to)
        os.close(self._from)
        self._child.terminate()
        self._child.wait(10)
        self._home.cleanup()
