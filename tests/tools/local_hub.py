"""A server on this machine that speaks as much of the hub's protocol as downloads need.

It counts what it is asked for, can hold a download back, and can drop a connection in
the middle of a file.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+?)(/revision/(?P<revision>[^/?]+))?(\?.*)?")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>[^?]+)(\?.*)?")


class LocalHub:
    """Serves repositories from folders; `asked` counts requests by method and file."""

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.asked: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.drop_once: dict[str, int] = {}
        """File names whose next download ends after so many bytes."""
        self.gate = threading.Event()
        self.gate.set()
        self.gated_ending = ""
        """Of the names of the files that the gate holds back."""
        self.endpoint = ""

    def names(self, repo: str) -> list[str]:
        root = self.repos[repo]
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def sha(self, repo: str) -> str:
        return hashlib.sha1(repo.encode()).hexdigest()


@contextmanager
def running() -> Iterator[LocalHub]:
    hub = LocalHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: LocalHub

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if match := API.fullmatch(self.path):
            self.state.asked["API"] += 1
            self._repository(match["repo"], match["revision"])
        elif match := FILE.fullmatch(self.path):
            self.state.asked[f"{self.command} {match['name']}"] += 1
            self._file(match["repo"], match["name"])
        else:
            self._refuse(404, "EntryNotFound")

    def _repository(self, repo: str, revision: str | None) -> None:
        if not self._is_given(repo):
            return
        if revision not in (None, "main", "v1", self.state.sha(repo)):
            self._refuse(404, "RevisionNotFound")
            return
        root = self.state.repos[repo]
        files = [
            {"rfilename": name, "size": (root / name).stat().st_size}
            for name in self.state.names(repo)
        ]
        body = json.dumps({"id": repo, "sha": self.state.sha(repo), "siblings": files}).encode()
        self._answer(200, {"Content-Type": "application/json"}, body)

    def _is_given(self, repo: str) -> bool:
        if repo in self.state.gated:
            self._refuse(403, "GatedRepo")
        elif repo not in self.state.repos:
            self._refuse(404, "RepoNotFound")
        else:
            return True
        return False

    def _file(self, repo: str, name: str) -> None:
        if not self._is_given(repo):
            return
        path = self.state.repos[repo] / name
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        if name.endswith(self.state.gated_ending):
            self.state.gate.wait(30)
        data = path.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.state.sha(repo)}
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if begin:
            self.state.ranges.append(f"{name} {begin[1]}")
            first = int(begin[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self._answer(206, headers, data[first:], name)
        else:
            self._answer(200, headers, data, name)

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, name: str | None = None
    ) -> None:
        self.send_response(status)
        for field, value in headers.items():
            self.send_header(field, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        dropped = self.state.drop_once.pop(name, None) if name else None
        self.wfile.write(body if dropped is None else body[:dropped])
        if dropped is not None:
            self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}")
