"""A job's progress as server-sent events: every step for those who look on, and only for them."""

import json
from typing import Any

from tests.tools.server import RunningServer

EVENTS = {"Accept": "text/event-stream"}
STEPS = 12


def body(**changes: Any) -> dict[str, Any]:
    parameters = {"prompt": "fault:slow step_seconds=0.01", "num_inference_steps": STEPS}
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
