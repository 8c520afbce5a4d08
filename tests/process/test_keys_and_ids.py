"""API keys on every route, idempotency keys, request ids, and answers to wrong addresses."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from supervisor.app import OPERATIONS
from supervisor.guards import OPEN_PATHS
from tests.tools.raw_http import Connection
from tests.tools.server import SCRIPTED, RunningServer, running, wait_until

ROUTES = [
    (one.method, one.path.replace("{pipeline}", "StableDiffusionPipeline").replace(":path", ""))
    for one in OPERATIONS
]
BODY: dict[str, Any] = {
    "checkpoint": "sd15",
    "parameters": {"prompt": "a fox", "num_inference_steps": 1},
}
SLOW: dict[str, Any] = {
    "checkpoint": "sd15",
    "parameters": {"prompt": "fault:slow step_seconds=0.2", "num_inference_steps": 4},
}


@pytest.fixture(scope="module")
def locked(
    scripted_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    settings = {"MODEL_DIR": str(scripted_model_dir), "API_KEY": "first-key,second-key"}
    with running(tmp_path_factory.mktemp("locked"), SCRIPTED, **settings) as server:
        yield server


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "first-key",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer first-ke",
        "Bearer first-key2",
        "Bearer first-key,second-key",
        "Bearer FIRST-KEY",
        "Basic first-key",
        "Bearer schl\u00fcssel",
        "Bearer \u00ff\u00fe",
        "Bearer " + "x" * 5000,
    ],
)
def test_every_route_but_the_probes_asks_for_the_key(
    locked: RunningServer, given: str | None
) -> None:
    headers = {"Content-Type": "application/json"}
    if given is not None:
        headers["Authorization"] = given
    with Connection(locked.url) as connection:
        for method, path in ROUTES:
            answer = connection.request(f"{method} {path}", headers)
            if path in OPEN_PATHS:
                assert answer.status == 200, path
                continue
            assert answer.status == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            form = "application/json" if path.startswith("/v1/") else "application/problem+json"
            assert answer.headers["content-type"] == form


@pytest.mark.parametrize("key", ["first-key", "second-key"])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_each_of_the_keys_opens(locked: RunningServer, scheme: str, key: str) -> None:
    answer = httpx.get(f"{locked.url}/placement", headers={"Authorization": f"{scheme} {key}"})
    assert answer.status_code == 200


def test_an_address_that_only_looks_like_a_probe_asks_for_the_key(locked: RunningServer) -> None:
    with Connection(locked.url) as connection:
        for path in ("/hc/", "/hc%0a", "//hc", "/HC", "/ready/../placement", "/hc;x", "/health%00"):
            assert connection.request(f"GET {path}").status == 401, path


# Idempotency keys


def keyed(server: RunningServer, key: str, body: Any = BODY, **more: Any) -> httpx.Response:
    return server.generate(body, headers={"Idempotency-Key": key}, **more)


def test_the_same_key_and_body_get_the_same_answer(scripted: RunningServer) -> None:
    first = keyed(scripted, "replayed")
    assert keyed(scripted, "replayed").content == first.content
    assert scripted.generate(BODY).json()["batch_id"] != first.json()["batch_id"]


def test_the_same_key_with_another_body_is_refused(scripted: RunningServer) -> None:
    keyed(scripted, "other-body")
    answer = keyed(scripted, "other-body", {**BODY, "priority": 1})
    assert (answer.status_code, answer.json()["code"]) == (422, "key_reused")


def test_the_same_key_while_the_first_runs_is_a_conflict(scripted: RunningServer) -> None:
    answers: list[httpx.Response] = []
    first = threading.Thread(target=lambda: answers.append(keyed(scripted, "twice", SLOW)))
    first.start()
    wait_until(lambda: any(worker["running"] for worker in scripted.placement()))
    second = httpx.post(f"{scripted.url}/generate", json=SLOW, headers={"Idempotency-Key": "twice"})
    first.join()
    assert (second.status_code, second.json()["code"]) == (409, "key_in_use")
    assert int(second.headers["retry-after"]) > 0
    assert keyed(scripted, "twice", SLOW).content == answers[0].content


def test_a_refused_request_leaves_its_key_free(scripted: RunningServer) -> None:
    wrong = {**BODY, "checkpoint": "missing"}
    assert keyed(scripted, "refused", wrong).status_code == 404
    assert keyed(scripted, "refused").status_code == 200


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_key_of_a_wrong_length_is_refused(scripted: RunningServer, key: str) -> None:
    answer = keyed(scripted, key)
    assert (answer.status_code, answer.json()["field"]) == (422, "Idempotency-Key")


# Request ids


@pytest.mark.parametrize("id", ["a", "A-1._z", "0" * 128])
def test_a_callers_request_id_is_returned(scripted: RunningServer, id: str) -> None:
    answer = scripted.client.get("/nowhere", headers={"X-Request-Id": id})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == id


@pytest.mark.parametrize(
    "id", ["", "a b", "a/b", "0" * 129, "\u00fc", 'a"', "a\tb", "../a", "{}", "a\u2028"]
)
def test_an_ill_formed_request_id_is_replaced(scripted: RunningServer, id: str) -> None:
    headers = [(b"X-Request-Id", id.encode("utf-8"))]
    answer = scripted.client.get("/nowhere", headers=headers)
    given = answer.headers["x-request-id"]
    assert given != id
    assert len(given) == 32
    assert answer.json()["request_id"] == given


def test_the_log_names_the_request(scripted: RunningServer) -> None:
    scripted.client.get("/hc", headers={"X-Request-Id": "find-me"})
    wait_until(lambda: '"request_id":"find-me"' in scripted.log.read_text())


# Wrong addresses and methods


@pytest.mark.parametrize(
    "path",
    ["/", "/nowhere", "/generate/", "/v2/models", "/docs/none", "/%00", "/\u00fc", "/a" * 900],
)
def test_an_unknown_address_is_a_problem(scripted: RunningServer, path: str) -> None:
    answer = scripted.client.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "not_found"
    assert len(answer.json()["detail"]) < 300


@pytest.mark.parametrize("method", ["DELETE", "PUT", "PATCH", "OPTIONS", "TRACE", "NONSENSE"])
def test_another_method_is_a_problem(scripted: RunningServer, method: str) -> None:
    answer = scripted.client.request(method, "/generate")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    assert answer.json()["code"] == "method_not_allowed"


def test_unknown_addresses_of_openais_have_openais_form(scripted: RunningServer) -> None:
    for method, path, status in (("GET", "/v1/chat", 404), ("GET", "/v1/images/edits", 405)):
        answer = scripted.client.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_of_another_type_is_a_problem(scripted: RunningServer) -> None:
    for content_type in ("text/plain", "application/xml", "multipart/form-data", "x" * 500):
        answer = scripted.client.post(
            "/generate", content=b"{}", headers={"Content-Type": content_type}
        )
        assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
