"""HTTP/1.1 as bytes, for requests that no well-behaved client would send."""

import socket
from types import TracebackType
from typing import NamedTuple
from urllib.parse import urlsplit

import h11

TIMEOUT_SECONDS = 30.0


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Connection:
    """One TCP connection to a server; sends bytes as they are, reads answers by h11."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname, parts.port), TIMEOUT_SECONDS)
        self._reader = h11.Connection(h11.CLIENT)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def request(
        self, line: str, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        """Sends a request with this line (`GET /hc`) and reads its answer."""
        self.send(head(line, {"Content-Length": str(len(body)), **(headers or {})}))
        self.send(body)
        return self.answer()

    def answer(self) -> Answer:
        """The next answer; ConnectionError when the server closes before it is whole."""
        self._expect_another()
        status, headers, body = 0, {}, bytearray()
        while True:
            event = self._reader.next_event()
            if event is h11.NEED_DATA:
                data = self.socket.recv(65536)
                if not data and not status:
                    raise ConnectionError("closed without an answer")
                self._reader.receive_data(data)
            elif isinstance(event, h11.Response):
                status = event.status_code
                headers = {name.decode(): value.decode() for name, value in event.headers}
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return Answer(status, headers, bytes(body))

    def _expect_another(self) -> None:
        """h11 reads answers only to requests that it has seen."""
        if self._reader.our_state is h11.DONE and self._reader.their_state is h11.DONE:
            self._reader.start_next_cycle()
        self._reader.send(h11.Request(method="GET", target="/", headers=[("Host", "server")]))
        self._reader.send(h11.EndOfMessage())

    def peek(self) -> bytes:
        """What the server has said or b"" at its end; TimeoutError while it says nothing."""
        return self.socket.recv(1, socket.MSG_PEEK)

    def rest(self) -> bytes:
        """All that the server says until it closes."""
        received = bytearray()
        while data := self.socket.recv(65536):
            received += data
        return bytes(received)

    def read_until(self, words: bytes) -> bytes:
        """What is said up to some words and a little after; ConnectionError when it ends before."""
        received = bytearray()
        while words not in received:
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionError("closed before it was said")
            received += data
        return bytes(received)

    @property
    def is_closed(self) -> bool:
        """Waits until the server has closed the connection; false if it says something."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True


def head(line: str, headers: dict[str, str]) -> bytes:
    fields = {"Host": "server", **headers}
    lines = [f"{line} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
