"""Headless Chromium over its debugging pipe (two file descriptors): no driver, no port, no client library.

A page that is opened here is watched: every console message, exception and request is kept, so that a test can say
that there was none.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 20.0
FLAGS = (
    "--headless=new",
    # Containers have neither the namespaces nor the shared memory that its sandbox and its buffers ask for.
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome; HARNESS_CHROMIUM goes before what PATH holds."""
    asked = os.environ.get("HARNESS_CHROMIUM")
    return asked or next((found for name in NAMES if (found := shutil.which(name)) is not None), None)


class BrowserError(RuntimeError):
    """What the browser said of a command that failed."""


class Browser:
    """One Chromium process; `page` opens a tab."""

    def __init__(self, chromium: str) -> None:
        to_child, self._out = os.pipe()
        self._in, from_child = os.pipe()
        self._profile = tempfile.mkdtemp(prefix="harness-chromium-")

        def in_place() -> None:
            # Chromium reads commands from descriptor 3 and answers on 4. Moved out of the way first, as one of the
            # pipe's own ends may be either.
            source, sink = os.dup(to_child), os.dup(from_child)
            os.dup2(source, 3)
            os.dup2(sink, 4)

        self._process = subprocess.Popen(
            [chromium, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=in_place,
        )
        os.close(to_child)
        os.close(from_child)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        """End the process and delete its profile."""
        with suppress(BrowserError, OSError):
            self.send("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._out)
        os.close(self._in)
        shutil.rmtree(self._profile, ignore_errors=True)

    def send(self, method: str, session: str | None = None, /, **params: Any) -> dict[str, Any]:
        """Carry out one command of the DevTools protocol; events that arrive meanwhile are kept."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while True:
            got = self._receive(deadline, method)
            if got.get("id") == number:
                if "error" in got:
                    raise BrowserError(f"{method}: {got['error']}")
                return dict(got["result"])
            self.events.append(got)

    def drain(self) -> None:
        """Take in the events that have arrived."""
        while self._buffer.count(b"\0") or select.select([self._in], [], [], 0)[0]:
            self.events.append(self._receive(time.monotonic() + SECONDS, "an event"))

    def _receive(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise BrowserError(f"{what}: no answer in {SECONDS:g} s")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise BrowserError(f"{what}: the browser has ended (exit code {self._process.poll()})")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))

    @contextmanager
    def page(
        self, url: str, *, width: int = 1400, height: int = 900, media: dict[str, str] | None = None
    ) -> Iterator[Page]:
        """Open a tab at ``url`` and wait until it has loaded. ``media``: features, as prefers-color-scheme."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.size(width, height)
        if media:
            page.media("", **media)
        try:
            page.open(url)
            yield page
        finally:
            self.send("Target.closeTarget", targetId=target)


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def send(self, method: str, /, **params: Any) -> dict[str, Any]:
        """One command to this tab."""
        return self.browser.send(method, self.session, **params)

    def events(self, *methods: str) -> list[dict[str, Any]]:
        """Parameters of the events of this tab that have arrived so far, in order."""
        self.browser.drain()
        return [
            dict(event["params"])
            for event in self.browser.events
            if event.get("sessionId") == self.session and event.get("method") in methods
        ]

    def open(self, url: str) -> None:
        """Load a page and wait for its load event."""
        before = len(self.events("Page.loadEventFired"))
        self.send("Page.navigate", url=url)
        self.wait(lambda: len(self.events("Page.loadEventFired")) > before, f"{url} loads")
        # Clicks before the first frame are dropped.
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something holds."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise BrowserError(f"in {SECONDS:g} s not: {what}")
            time.sleep(0.02)

    def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        self.wait(lambda: self.run(f"Boolean({expression})"), expression)

    def run(self, expression: str) -> Any:
        """Value of a JavaScript expression, promises awaited; the page's policy does not hold for a debugger."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise BrowserError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        """Visible text of every element that a selector finds."""
        return list(
            self.run(f"Array.from(document.querySelectorAll({json.dumps(selector)}), one => one.innerText.trim())")
        )

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key, as a person does: it goes to what has the focus."""
        text = {"Enter": "\r", "Space": " "}.get(key, key if len(key) == 1 else "")
        codes = {"Enter": 13, "Space": 32, "Tab": 9, "Escape": 27, "ArrowDown": 40, "ArrowUp": 38}
        key_name = " " if key == "Space" else key
        common = {
            "key": key_name,
            "code": key,
            "windowsVirtualKeyCode": codes.get(key, ord(key[0].upper())),
            "modifiers": 8 if shift else 0,
        }
        self.send("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def choose(self, selector: str, value: str) -> None:
        """Give a field a value and say so to the page."""
        self.run(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)}); one.value = {json.dumps(value)};"
            " for (const kind of ['input', 'change']) one.dispatchEvent(new Event(kind, {bubbles: true})); })()"
        )

    def place(self, selector: str) -> tuple[float, float]:
        """Left and top of an element in the window (CSS pixels)."""
        found = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        left, top = self.run(f"(box => [box.left, box.top])({found})")
        return left, top

    def write(self, text: str) -> None:
        """Type into what has the focus."""
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Click the middle of the first element that a selector finds, by the mouse."""
        at = self.run(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)});"
            " one.scrollIntoView({block: 'center', inline: 'center'}); const box = one.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)

    def size(self, width: int, height: int) -> None:
        """Size of the window in CSS pixels; phones are those below 500."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def media(self, kind: str = "", /, **features: str) -> None:
        """Emulate a medium (`print`) or features (`prefers-color-scheme`)."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", media=kind, features=named)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write a PNG of the window, or of the whole page."""
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        if whole:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 12_000), "scale": 1}
            found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self, path: Path) -> None:
        """Print to a PDF on A4."""
        found = self.send("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(found["data"]))

    @property
    def complaints(self) -> list[str]:
        """Everything that the console shows as a warning or error, exceptions and what the policy blocked included."""
        logged = [
            f"{one['entry']['level']}: {one['entry']['text']}"
            for one in self.events("Log.entryAdded")
            if one["entry"]["level"] in ("warning", "error")
        ]
        said = [
            f"console.{one['type']}: {[argument.get('value') for argument in one['args']]}"
            for one in self.events("Runtime.consoleAPICalled")
        ]
        thrown = [str(one["exceptionDetails"]) for one in self.events("Runtime.exceptionThrown")]
        return logged + said + thrown

    @property
    def requests(self) -> list[str]:
        """Every address that was asked for, the page's own first."""
        return [one["request"]["url"] for one in self.events("Network.requestWillBeSent")]
