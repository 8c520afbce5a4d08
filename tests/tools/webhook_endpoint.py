"""A webhook endpoint on 127.0.0.1 that fails on request, and remembers what it was sent."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

WAIT_SECONDS = 30.0


class Received(NamedTuple):
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


class Answer(NamedTuple):
    """What to answer; `hang` answers nothing, `endless` never ends the body."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    hang: bool = False
    endless: bool = False
    raw: bytes | None = None


Script = Callable[[Received, int], Answer]
"""The answer to a request and its number, from 1."""


def obliging(received: Received, number: int) -> Answer:
    return Answer()


class Endpoint:
    def __init__(self, script: Script = obliging, port: int = 0, remember: bool = True) -> None:
        self.script = script
        self.received: list[Received] = []
        self.count = 0
        self.bodies_cut = 0
        self.remember = remember
        self.closing = threading.Event()
        self.changed = threading.Condition()
        self.server = _Server(("127.0.0.1", port), _handler(self))
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, path: str = "/") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def take(self, received: Received) -> Answer:
        with self.changed:
            self.count += 1
            number = self.count
            if self.remember:
                self.received.append(received)
            self.changed.notify_all()
        return self.script(received, number)

    def wait_for(self, condition: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, seconds), f"{self.count} requests came"

    def wait_for_requests(self, count: int) -> None:
        self.wait_for(lambda: self.count >= count)

    def body_was_cut(self) -> None:
        with self.changed:
            self.bodies_cut += 1
            self.changed.notify_all()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def endpoint(script: Script = obliging, port: int = 0, remember: bool = True) -> Iterator[Endpoint]:
    it = Endpoint(script, port, remember)
    try:
        yield it
    finally:
        it.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a caller that goes in mid-answer is no news here


def _handler(endpoint: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # One write an answer: with headers and body apart, delayed ACKs cost 40 ms each.
        wbufsize = -1

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.answer(endpoint.take(Received(self.path, headers, body)))

        def answer(self, answer: Answer) -> None:
            if answer.hang:
                endpoint.closing.wait()
                self.close_connection = True
            elif answer.raw is not None:
                self.wfile.write(answer.raw)
                self.close_connection = True
            else:
                self.send_response(answer.status)
                for name, value in answer.headers:
                    self.send_header(name, value)
                self.send_body(answer)

        def send_body(self, answer: Answer) -> None:
            if not answer.endless:
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.close_connection = True
            with suppress(OSError):
                while not endpoint.closing.is_set():
                    self.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")
                    self.wfile.flush()
                return
            endpoint.body_was_cut()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return Handler
