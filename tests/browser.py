"""A browser without a window: pages that draw themselves, and pages that are used."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu"]


def browser() -> str:
    found = shutil.which("chromium")
    assert found is not None
    return found


def opened(page: Path) -> tuple[str, str]:
    """The page's document once its scripts have run, and what it wrote on the console."""
    done = subprocess.run(
        [browser(), *OPTIONS, "--enable-logging=stderr", "--v=0", "--virtual-time-budget=20000", "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


class Tab:
    """A page in use, by the browser's DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count()
        self.problems: list[str] = []
        """What the page wrote on the console, and errors that nothing caught."""
        self._send("Runtime.enable")
        self._send("Log.enable")

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=120))
            if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(json.dumps(message["params"]))
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return message["result"]

    def run(self, script: str) -> Any:
        """The value of an expression, awaited where it is a promise."""
        found = self._send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> None:
        """Until an expression is true."""
        limit = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < limit, f"never true: {script}\n{self.run('document.body.innerText')}"
            time.sleep(0.1)

    def type(self, text: str) -> None:
        self._send("Input.insertText", text=text)

    def press_enter(self) -> None:
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self._send("Input.dispatchKeyEvent", type="keyDown", **key)
        self._send("Input.dispatchKeyEvent", type="keyUp", **key)


@contextmanager
def tab(url: str, folder: Path) -> Iterator[Tab]:
    """A page that is loaded. `folder`: for the browser's profile."""
    command = [browser(), *OPTIONS, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        file, limit = folder / "DevToolsActivePort", time.monotonic() + 60
        while not file.exists() or not file.read_text().strip():
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.1)
        port = file.read_text().split()[0]
        targets = httpx.get(f"http://127.0.0.1:{port}/json/list", timeout=30).json()
        address = next(each["webSocketDebuggerUrl"] for each in targets if each["type"] == "page")
        with connect(address, max_size=None) as socket:
            page = Tab(socket)
            page._send("Page.navigate", url=url)
            page.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")
            yield page
    finally:
        process.terminate()
        process.wait(30)
