"""Connections that drip, bodies at and over the limit, bodies that nobody reads."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tools.process_memory import descriptor_count, resident_bytes
from tests.tools.raw_http import Connection, head
from tests.tools.server import SCRIPTED, RunningServer, running, wait_until

MB = 2**20
LIMIT = MB
KEY = {"Authorization": "Bearer a-key"}
JSON = {"Content-Type": "application/json"}
POST = "POST /generate"
SECONDS = 1.0
"""The server's time limits in these tests."""


@pytest.fixture(scope="module")
def keyed(
    scripted_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    settings = {
        "MODEL_DIR": str(scripted_model_dir),
        "API_KEY": "a-key",
        "MAX_BODY_MB": "1",
        "BODY_TIMEOUT_SECONDS": str(SECONDS),
        "HEADER_TIMEOUT_SECONDS": str(SECONDS),
    }
    with running(tmp_path_factory.mktemp("keyed"), SCRIPTED, **settings) as server:
        yield server


def body_of(size: int) -> bytes:
    """A request for a picture, padded to exactly this size."""
    body = json.dumps(
        {"checkpoint": "sd15", "parameters": {"prompt": "a", "num_inference_steps": 1}}
    )
    return body.encode().ljust(size)


def chunked(body: bytes, size: int = 60_000) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


def dripped(connection: Connection, data: bytes, seconds: float) -> float:
    """Sends a byte every tenth of a second until the server says or ends something.

    The seconds that took; they are those of the server's own limit.
    """
    began = time.monotonic()
    connection.socket.settimeout(0.1)
    for index in range(len(data)):
        connection.send(data[index : index + 1])
        try:
            connection.peek()
        except TimeoutError:
            assert time.monotonic() - began < seconds, "the server waits for ever"
            continue
        break
    connection.socket.settimeout(10)
    return time.monotonic() - began


def test_a_head_that_drips_is_cut_off(keyed: RunningServer) -> None:
    with Connection(keyed.url) as connection:
        took = dripped(connection, head("GET /hc", {"X-Padding": "x" * 500}), SECONDS + 3)
        assert connection.is_closed
    assert took >= SECONDS * 0.8


def test_a_body_that_drips_is_answered_408(keyed: RunningServer) -> None:
    with Connection(keyed.url) as connection:
        connection.send(head(POST, {**KEY, **JSON, "Content-Length": "1000"}))
        took = dripped(connection, b" " * 900, SECONDS + 3)
        answer = connection.answer()
        assert answer.status == 408
        assert json.loads(answer.body)["code"] == "body_timeout"
        assert connection.is_closed
    assert took >= SECONDS * 0.8


def test_an_idle_connection_is_closed(keyed: RunningServer) -> None:
    with Connection(keyed.url) as connection:
        assert connection.request("GET /hc").status == 200
        assert connection.is_closed


@pytest.mark.parametrize("size", [LIMIT - 1, LIMIT])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_up_to_the_limit_is_read(keyed: RunningServer, size: int, framing: str) -> None:
    with Connection(keyed.url) as connection:
        send(connection, body_of(size), framing)
        assert connection.answer().status == 200
        assert connection.request("GET /hc").status == 200, "the connection goes on"


@pytest.mark.parametrize("size", [LIMIT + 1, LIMIT + 500_000, 8 * LIMIT])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_over_the_limit_is_answered_413(
    keyed: RunningServer, size: int, framing: str
) -> None:
    with Connection(keyed.url) as connection:
        send(connection, body_of(size), framing)
        answer = connection.answer()
        assert answer.status == 413
        assert answer.headers["content-type"] == "application/problem+json"
        assert json.loads(answer.body)["code"] == "body_too_large"
        assert connection.is_closed


def test_a_body_that_is_announced_too_large_is_refused_before_it_is_sent(
    keyed: RunningServer,
) -> None:
    with Connection(keyed.url) as connection:
        connection.send(head(POST, {**KEY, **JSON, "Content-Length": str(2**40)}))
        assert connection.answer().status == 413


def test_a_body_without_end_takes_no_memory(keyed: RunningServer) -> None:
    before = resident_bytes(keyed.process.pid)
    with Connection(keyed.url) as connection:
        connection.send(head(POST, {**KEY, **JSON, "Transfer-Encoding": "chunked"}))
        piece = chunked(b" " * 500_000)[: -len(b"0\r\n\r\n")]
        sent = 0
        try:
            while sent < 100 * MB:
                connection.send(piece)
                sent += len(piece)
        except ConnectionError:
            pass
    assert sent < 100 * MB
    assert resident_bytes(keyed.process.pid) - before < 10 * MB


def send(connection: Connection, body: bytes, framing: str) -> None:
    """The whole of it, unless the server ends the connection before."""
    headers = {**KEY, **JSON}
    try:
        if framing == "length":
            connection.send(head(POST, headers | {"Content-Length": str(len(body))}) + body)
        else:
            connection.send(head(POST, headers | {"Transfer-Encoding": "chunked"}))
            connection.send(chunked(body))
    except ConnectionError:
        pass


@pytest.mark.parametrize(
    ("line", "headers", "status"),
    [
        ("POST /generate", JSON, 401),
        ("POST /nowhere", KEY | JSON, 404),
    ],
)
def test_a_body_that_nobody_wants_leaks_nothing(
    keyed: RunningServer, line: str, headers: dict[str, Any], status: int
) -> None:
    body = b"x" * 900_000
    pid = keyed.process.pid

    def ask(times: int) -> None:
        for _ in range(times):
            with Connection(keyed.url) as connection:
                assert connection.request(line, headers, body).status == status

    ask(20)
    memory, descriptors = resident_bytes(pid), descriptor_count(pid)
    ask(100)
    wait_until(lambda: descriptor_count(pid) <= descriptors + 2)
    assert resident_bytes(pid) - memory < 10 * MB


def test_probes_answer_while_many_connections_drip(keyed: RunningServer) -> None:
    dripping = [Connection(keyed.url) for _ in range(100)]
    try:
        for connection in dripping:
            connection.send(head(POST, {**KEY, **JSON, "Content-Length": "1000"}) + b" " * 10)
        began = time.monotonic()
        assert keyed.client.get("/hc").status_code == 200
        assert time.monotonic() - began < 0.5
        assert {connection.answer().status for connection in dripping} == {408}
    finally:
        for connection in dripping:
            connection.socket.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /hc HTTP/1.1\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /hc HTTP/1.1\r\nHost: a\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET /hc HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
    ],
)
def test_what_is_not_http_is_answered_or_closed(keyed: RunningServer, data: bytes) -> None:
    with Connection(keyed.url) as connection:
        try:
            connection.send(data)
            received = connection.rest()
        except ConnectionError:
            received = b""
    assert b" 200 " not in received[:20]
    assert b" 500 " not in received[:20]
    assert keyed.client.get("/hc").status_code == 200
