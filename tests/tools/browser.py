"""Headless Chromium, driven by its DevTools protocol over a WebSocket."""

import base64
import itertools
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, Message, Request, TextMessage

from tests.tools.server import wait_until

CHROMIUM = shutil.which("chromium")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--remote-debugging-port=0", "--window-size=1280,1600",
)  # fmt: skip
TIMEOUT_SECONDS = 120.0
POLL_SECONDS = 0.05


class Page:
    """One page. `requested` holds every address that it asked for."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._socket = socket.create_connection((parts.hostname, parts.port), TIMEOUT_SECONDS)
        self._websocket = WSConnection(ConnectionType.CLIENT)
        self._numbers = itertools.count(1)
        self._texts: list[str] = []
        self._pieces: list[str] = []
        self.requested: list[str] = []
        opening = Request(host=parts.netloc, target=parts.path)
        self._socket.sendall(self._websocket.send(opening))
        self._receive(AcceptConnection)
        for domain in ("Network", "Page", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result; events that come before it are noted."""
        number = next(self._numbers)
        command = json.dumps({"id": number, "method": method, "params": parameters})
        self._socket.sendall(self._websocket.send(Message(data=command)))
        while True:
            told = json.loads(self._next_text())
            if told.get("method") == "Network.requestWillBeSent":
                self.requested.append(told["params"]["request"]["url"])
            if told.get("id") == number:
                assert "error" not in told, told
                result: dict[str, Any] = told["result"]
                return result

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Waits until a JavaScript expression is true."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(POLL_SECONDS)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._socket.close()

    def _next_text(self) -> str:
        while not self._texts:
            self._receive(TextMessage)
        return self._texts.pop(0)

    def _receive(self, wanted: type) -> None:
        """Reads until an event of this kind has come."""
        found = False
        while not found:
            data = self._socket.recv(1 << 20)
            assert data, "the browser has closed the connection"
            self._websocket.receive_data(data)
            for event in self._websocket.events():
                found |= isinstance(event, wanted)
                if isinstance(event, TextMessage):
                    self._pieces.append(event.data)
                    if event.message_finished:
                        self._texts.append("".join(self._pieces))
                        self._pieces.clear()


@contextmanager
def page(folder: Path) -> Iterator[Page]:
    """An empty page of a browser whose profile is in `folder`."""
    assert CHROMIUM
    profile = folder / "profile"
    process = subprocess.Popen(
        [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        told = profile / "DevToolsActivePort"
        wait_until(lambda: told.exists() and told.read_text().count("\n") >= 1, TIMEOUT_SECONDS)
        port = told.read_text().split()[0]
        opened = Page(_address(port))
        try:
            yield opened
        finally:
            opened.close()
    finally:
        process.terminate()
        process.wait(20)


def _address(port: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
        pages = [one for one in json.load(answer) if one["type"] == "page"]
    return str(pages[0]["webSocketDebuggerUrl"])
