"""A headless Chromium, driven through its debugging pipe: one page, its console, its requests, and what a script in it returns."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
    --disable-sync --remote-debugging-pipe
""".split()
LIMIT = 60.0  # seconds an answer may take


def find() -> str | None:
    """Returns the path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def report(name: str, out: Path | None, check: Callable[[Path], list[str]]) -> int:
    """Prints what a check finds wrong, in words, and returns the exit status: 0, 1, or 2 where no Chromium is installed.

    Args:
      name: of the program.
      out: folder of its pictures, made where it is given.
      check: takes a folder for its files.
    """
    if find() is None:
        print(f"{name}: no Chromium on PATH ({', '.join(NAMES)}); on Debian: apt-get install chromium", file=sys.stderr)
        return 2
    if out:
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wrong = check(Path(folder))
    print("\n".join(wrong) or f"{name}: all well")
    return 1 if wrong else 0


class Tab:
    """One page.

    Attributes:
      complaints: console messages of any level, exceptions, and dialogs, in words.
      requests: URLs asked for, `data:` ones left out.
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._buffer, self._number = write, read, b"", 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Returns the answer to a command of the DevTools protocol. Events that come meanwhile are noted."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(LIMIT)
            if answer is None:
                raise TimeoutError(f"no answer to {method}")
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def run(self, script: str) -> Any:
        """Returns the value of an expression in the page; a promise is awaited."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script[:80]}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def open(self, page: Path | str, width: int = 1280, height: int = 1000, scheme: str = "light") -> None:
        """Loads a file or an address in a window of that size and colour scheme."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        end = time.monotonic() + LIMIT
        while self.run("document.readyState") != "complete" and time.monotonic() < end:
            self.wait(0.1)
        self.wait(0.3)

    def wait(self, seconds: float) -> None:
        """Lets the page work, and notes its events."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._next(left)

    def press(self, key: str) -> None:
        """Presses Tab or Enter."""
        code, text = {"Tab": (9, ""), "Enter": (13, "\r")}[key]
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)

    def type(self, text: str) -> None:
        """Types into what has the focus."""
        self.send("Input.insertText", text=text)

    def choose(self, selector: str, file: Path) -> None:
        """Gives a file to an input of the page, as its dialog would."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file.resolve())])

    def until(self, script: str, seconds: float = LIMIT) -> bool:
        """Returns whether an expression in the page becomes true in that time."""
        end = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > end:
                return False
            self.wait(0.1)
        return True

    def nameless(self) -> list[str]:
        """Returns the roles of what a screen reader finds no name for."""
        roles = {"link", "button", "combobox", "textbox", "searchbox", "spinbutton", "radio", "image", "img", "region", "table"}
        return [
            node["role"]["value"]
            for node in self.send("Accessibility.getFullAXTree")["nodes"]
            if node.get("role", {}).get("value") in roles and not node.get("ignored") and not node.get("name", {}).get("value")
        ]

    def picture(self, path: Path, whole: bool = False) -> None:
        """Writes a screenshot as PNG: of the window, or of the whole page."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def _next(self, seconds: float) -> dict[str, Any] | None:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                return None
            data = os.read(self._read, 1 << 16)
            if not data:
                raise RuntimeError("the browser has closed")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console.{params['type']}: {params['args'][:1]}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {params['exceptionDetails'].get('text')}")
        elif method == "Log.entryAdded":
            self.complaints.append(f"{params['entry']['source']} {params['entry']['level']}: {params['entry']['text']}")
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {params['message']}")
        elif method == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.requests.append(params["request"]["url"])


@contextlib.contextmanager
def tab() -> Iterator[Tab]:
    """Yields a page in a fresh browser with a profile of its own, and ends both.

    Raises:
      FileNotFoundError: where no Chromium is installed.
    """
    program = find()
    if program is None:
        raise FileNotFoundError(f"no Chromium on PATH (looked for {', '.join(NAMES)}); install one, on Debian: apt-get install chromium")
    to_browser, from_us = os.pipe()
    to_us, from_browser = os.pipe()
    with tempfile.TemporaryDirectory(prefix="report-check-", ignore_cleanup_errors=True) as profile:
        # The pipe's ends must be descriptors 3 and 4 of the browser, which the shell arranges.
        order = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        browser = subprocess.Popen(
            ["bash", "-c", order, program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            yield Tab(from_us, to_us)
        finally:
            browser.terminate()
            try:
                browser.wait(10)
            except subprocess.TimeoutExpired:
                browser.kill()
                browser.wait()
            os.close(from_us)
            os.close(to_us)
