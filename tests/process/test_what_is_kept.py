"""What the supervisor keeps of jobs that were answered."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tools.process_memory import resident_bytes
from tests.tools.server import SCRIPTED, RunningServer, running, wait_until

PICTURE_BYTES = 2_000_000
JOBS = 40


@pytest.fixture(scope="module")
def server(
    scripted_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    data_dir = tmp_path_factory.mktemp("kept")
    with running(data_dir, SCRIPTED, MODEL_DIR=str(scripted_model_dir)) as server:
        yield server


def body(picture_bytes: int = 1000) -> dict[str, Any]:
    prompt = f"fault:slow step_seconds=0.001 picture_bytes={picture_bytes}"
    return {
        "checkpoint": "sd15",
        "parameters": {"prompt": prompt, "num_inference_steps": 1},
    }


def test_pictures_whose_callers_waited_for_them_are_not_kept(server: RunningServer) -> None:
    def answered(count: int) -> None:
        for _ in range(count):
            server.generate(body(PICTURE_BYTES)).raise_for_status()

    answered(5)
    before = resident_bytes(server.process.pid)
    answered(JOBS)
    assert resident_bytes(server.process.pid) - before < 0.25 * JOBS * PICTURE_BYTES


def test_a_job_that_was_answered_to_its_waiting_caller_is_forgotten(server: RunningServer) -> None:
    batch_id = server.generate(body()).raise_for_status().json()["batch_id"]
    shown = server.client.get(f"/jobs/{batch_id}")
    assert (shown.status_code, shown.json()["code"]) == (410, "forgotten")


@pytest.mark.parametrize("headers", [{"Prefer": "respond-async"}, {"Idempotency-Key": "a key"}])
def test_an_answer_that_may_be_asked_for_again_is_kept(
    server: RunningServer, headers: dict[str, str]
) -> None:
    answer = server.generate(body(), headers=headers).raise_for_status().json()
    where = f"/jobs/{answer.get('id') or answer['batch_id']}"
    wait_until(lambda: server.client.get(where).json()["status"] == "finished")
    result = server.client.get(where).json()["result"]
    assert len(result["images"]) == 1
    assert result["inputs"]["parameters"]["num_inference_steps"] == 1
