"""A job's progress as server-sent events: every step, and what becomes of it when they leave."""

import json
import time
from typing import Any

import httpx

from tests.tools.server import RunningServer, wait_until

EVENTS = {"Accept": "text/event-stream"}
STEPS = 12


def body(**changes: Any) -> dict[str, Any]:
    parameters = {"prompt": "fault:slow step_seconds=0.05", "num_inference_steps": STEPS}
    return {"checkpoint": "sd15", "parameters": parameters} | changes


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
            for name, data in blocks]  # fmt: skip


def steps(told: list[tuple[str, dict[str, Any]]]) -> list[int]:
    """In order, each once: a change of phase tells the step again."""
    return list(dict.fromkeys(data["step"] for name, data in told if name == "progress"))


def test_a_stream_tells_every_step_and_ends_with_the_answer(scripted: RunningServer) -> None:
    told = events(scripted.generate(body(previews=2), headers=EVENTS).text)
    assert steps(told) == list(range(STEPS + 1))
    assert sum(name == "preview" for name, _ in told) == 2
    name, answer = told[-1]
    assert (name, len(answer["images"])) == ("finished", 1)
    fractions = [data["fraction"] for name, data in told if name == "progress"]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_whoever_looks_on_at_a_job_that_was_accepted_is_told_every_step(
    scripted: RunningServer,
) -> None:
    job = scripted.generate(body(), headers={"Prefer": "respond-async"}).json()
    told = events(scripted.client.get(f"{job['poll_url']}/events").text)
    seen = steps(told)
    assert seen == list(range(seen[0], STEPS + 1))
    assert told[-1][0] == "finished"


def running_jobs(server: RunningServer) -> int:
    return sum(worker["running"] for worker in server.placement())


def leave_at_a_step(server: RunningServer, method: str, url: str, **request: Any) -> None:
    with (
        httpx.Client(base_url=server.url) as caller,
        caller.stream(method, url, **request) as answer,
    ):
        assert "event: progress" in answer.iter_lines()  # reads no further


ENDLESS = {"prompt": "fault:slow step_seconds=0.05", "num_inference_steps": 900}


def test_a_job_ends_a_step_after_its_stream_is_left(scripted: RunningServer) -> None:
    request = {"json": body(parameters=ENDLESS), "headers": EVENTS}
    leave_at_a_step(scripted, "POST", "/generate", **request)
    left = time.monotonic()
    wait_until(lambda: running_jobs(scripted) == 0)
    assert time.monotonic() - left < 1


def test_a_job_goes_on_when_an_onlooker_leaves(scripted: RunningServer) -> None:
    headers = {"Prefer": "respond-async"}
    poll = scripted.generate(body(parameters=ENDLESS), headers=headers).json()["poll_url"]
    leave_at_a_step(scripted, "GET", f"{poll}/events")
    step = scripted.client.get(poll).json()["step"]
    wait_until(lambda: scripted.client.get(poll).json()["step"] > step)
    assert scripted.client.delete(poll).status_code == 202
    wait_until(lambda: running_jobs(scripted) == 0)
