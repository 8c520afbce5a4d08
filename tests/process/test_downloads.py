"""Requests whose models must be downloaded first: their callers see how far that is."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.tools import local_hub, weights
from tests.tools.local_hub import LocalHub
from tests.tools.server import SCRIPTED, RunningServer, running, wait_until

STREAM = {"Accept": "text/event-stream"}
LATER = {"Prefer": "respond-async"}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
Event = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def hub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with local_hub.running() as server:
        server.gated_ending = ".safetensors"
        yield server


@pytest.fixture(scope="module")
def whole_server(
    tmp_path_factory: pytest.TempPathFactory, hub_server: LocalHub
) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("server")
    with running(folder, SCRIPTED, HF_ENDPOINT=hub_server.endpoint) as server:
        yield server


@pytest.fixture
def server(whole_server: RunningServer, hub_server: LocalHub) -> Iterator[RunningServer]:
    hub_server.gate.clear()
    yield whole_server
    hub_server.gate.set()


@pytest.fixture
def name(hub_server: LocalHub, tmp_path: Path) -> str:
    """A repository that nobody has downloaded yet."""
    name = f"org/model-{len(hub_server.repos)}"
    hub_server.repos[name] = weights.files(tmp_path / "repo", weights.checkpoint_files("sd15"))
    return name


def body(name: str, **changes: Any) -> dict[str, Any]:
    return {"checkpoint": name, "parameters": {"prompt": "a cat"}} | changes


def events(response: httpx.Response) -> Iterator[Event]:
    name = ""
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def test_a_stream_tells_how_far_a_download_is_and_then_goes_on_as_ever(
    server: RunningServer, hub_server: LocalHub, name: str
) -> None:
    with server.client.stream("POST", "/generate", json=body(name), headers=STREAM) as response:
        told = events(response)
        assert next(told) == ("queued", {"position": 0})
        event, first = next(told)
        assert (event, first["model"]) == ("loading", name)
        assert first["fraction"] < 1  # the weights are held back
        hub_server.gate.set()
        rest = list(told)
    assert all(data["fraction"] <= 1 for event, data in rest if event == "loading")
    assert rest[-1][0] == "finished"
    assert rest[-1][1]["inputs"]["checkpoint"] == name


def test_all_who_wait_for_one_download_are_told(
    server: RunningServer, hub_server: LocalHub, name: str
) -> None:
    first = server.client.post("/generate", json=body(name), headers=LATER).json()
    with server.client.stream("POST", "/generate", json=body(name), headers=STREAM) as response:
        told = events(response)
        assert [next(told)[0] for _ in range(2)] == ["queued", "loading"]
        hub_server.gate.set()
        assert list(told)[-1][0] == "finished"
    with server.client.stream("GET", f"{first['poll_url']}/events") as response:
        assert list(events(response))[-1][0] == "finished"


def test_a_job_waits_in_the_queue_for_its_download_and_can_be_cancelled(
    server: RunningServer, hub_server: LocalHub, name: str
) -> None:
    asked = body(name, batch_id="kept", store_images=True)
    answer = server.client.post("/generate", json=asked, headers=LATER)
    assert answer.status_code == 202
    where = answer.json()["poll_url"]
    job = server.client.get(where).json()
    assert (job["status"], job["step"], job["steps"], job["error"]) == ("queued", 0, 0, None)
    assert server.generate(asked).json()["code"] == "batch_id_exists"
    assert server.client.delete(where).status_code == 202
    wait_until(lambda: server.client.get(where).json()["error"])
    assert server.client.get(where).json()["status"] == "cancelled"
    hub_server.gate.set()
    assert server.generate(asked).status_code == 200  # the batch id is free, the files are there


def test_what_is_wrong_with_a_download_ends_its_job(
    server: RunningServer, hub_server: LocalHub, name: str
) -> None:
    (hub_server.repos[name] / WEIGHTS).write_bytes(b"no safetensors at all")
    with server.client.stream("POST", "/generate", json=body(name), headers=STREAM) as response:
        told = events(response)
        assert [next(told)[0] for _ in range(2)] == ["queued", "loading"]
        hub_server.gate.set()
        event, problem = list(told)[-1]
    assert (event, problem["code"], problem["status"]) == ("failed", "invalid_model", 422)
    assert server.generate(body(name)).json()["code"] == "invalid_model"


def test_what_is_refused_before_a_download_is_an_ordinary_answer(server: RunningServer) -> None:
    answer = server.client.post("/generate", json=body("org/missing"), headers=STREAM)
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_model")


def test_a_download_counts_for_the_jobs_time_limit(
    server: RunningServer, hub_server: LocalHub, name: str
) -> None:
    asked = body(name, timeout_seconds=1)
    with server.client.stream("POST", "/generate", json=asked, headers=STREAM) as response:
        event, problem = list(events(response))[-1]
    assert (event, problem["code"]) == ("expired", "deadline_exceeded")
    hub_server.gate.set()
    assert server.generate(body(name)).status_code == 200


def test_a_server_that_stops_answers_those_who_wait_for_a_download(
    tmp_path: Path, hub_server: LocalHub, name: str
) -> None:
    hub_server.gate.clear()
    settings = {"HF_ENDPOINT": hub_server.endpoint, "DRAIN_SECONDS": "0.5"}
    with running(tmp_path, SCRIPTED, **settings) as server, ThreadPoolExecutor(1) as pool:
        with server.client.stream("POST", "/generate", json=body(name), headers=STREAM) as response:
            told = events(response)
            assert [next(told)[0] for _ in range(2)] == ["queued", "loading"]
            stopped = pool.submit(server.stop)
            event, problem = list(told)[-1]
            assert (event, problem["code"]) == ("failed", "draining")
        assert stopped.result() == 0  # though the hub still does not answer
        hub_server.gate.set()


def test_a_job_that_waits_for_a_download_is_finished_by_a_server_that_drains(
    tmp_path: Path, hub_server: LocalHub, name: str
) -> None:
    hub_server.gate.clear()
    settings = {"HF_ENDPOINT": hub_server.endpoint, "DRAIN_SECONDS": "30", "MAX_QUEUE": "1"}
    with running(tmp_path, SCRIPTED, **settings) as server, ThreadPoolExecutor(1) as pool:
        with server.client.stream("POST", "/generate", json=body(name), headers=STREAM) as response:
            told = events(response)
            assert [next(told)[0] for _ in range(2)] == ["queued", "loading"]
            stopped = pool.submit(server.stop)
            wait_until(lambda: server.client.get("/ready").status_code == 503)
            late = server.generate(body("org/another"), headers=LATER)
            assert (late.status_code, late.json()["code"]) == (503, "draining")
            assert late.headers["retry-after"] == settings["DRAIN_SECONDS"]
            hub_server.gate.set()
            assert list(told)[-1][0] == "finished"
        assert stopped.result() == 0


def test_a_refused_request_lets_go_of_no_other_jobs_batch_id(
    server: RunningServer, hub_server: LocalHub, name: str
) -> None:
    asked = body(name, batch_id="shared", store_images=True)
    accepted = server.generate(asked, headers=LATER)
    assert accepted.status_code == 202
    assert server.generate(body("nope", batch_id="shared")).status_code == 404
    assert server.generate(asked).json()["code"] == "batch_id_exists"
    server.client.delete(f"/jobs/{accepted.json()['id']}").raise_for_status()
