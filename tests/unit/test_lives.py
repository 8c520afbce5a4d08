"""Lives of processes that never come to be, and what a process may see of the environment."""

from collections.abc import Sequence

import anyio
import pytest

from ipc import messages as m
from supervisor import placement, server
from supervisor.fleet import Fleet
from supervisor.lives import Lives, environment
from supervisor.states import WorkerState
from supervisor.worker import Worker
from tests.tools.fleets import SETTINGS


def begin(worker: Worker) -> m.Start:
    return m.Start(protocol=m.PROTOCOL_VERSION, device="cpu")


def lives(fleet: Fleet, command: Sequence[str] = ("/no/such/program",)) -> Lives:
    return Lives(fleet, begin, command, {})


def test_a_worker_that_is_stopped_before_it_has_a_process_does_not_hold_up_the_end() -> None:
    fleet = Fleet(SETTINGS, ["cpu"])
    fleet.stop()
    assert fleet.workers[0].state is WorkerState.STOPPING

    async def run() -> None:
        with anyio.fail_after(5):
            await lives(fleet).run()

    anyio.run(run)
    assert fleet.workers[0].state is WorkerState.STOPPED
    assert fleet.workers[0].last_exit is None


def test_a_program_that_cannot_be_started_is_tried_again_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "FIRST_RESTART_SECONDS", 0.01)
    fleet = Fleet(SETTINGS, ["cpu"], draw=lambda: 0.0)
    worker = fleet.workers[0]

    async def run() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(lives(fleet).run)
            with anyio.fail_after(10):
                while worker.failed_starts < 2:  # noqa: ASYNC110 - nothing tells of it
                    await anyio.sleep(0.01)
            fleet.stop()

    anyio.run(run)
    assert worker.last_exit == "could not be started: No such file or directory"


def test_a_task_of_the_server_that_a_defect_ends_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "TASK_PAUSE_SECONDS", 0.0)
    runs = []

    async def task() -> None:
        runs.append(len(runs))
        if len(runs) < 3:
            raise RuntimeError("a defect")

    anyio.run(server.tended, task)
    assert runs == [0, 1, 2]


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cpu", None, ""),
        ("cuda:1", None, "1"),
        ("cuda:1", "", "1"),
        ("cuda:1", "4, 6", "6"),
        ("cuda:0", "GPU-abc,GPU-def", "GPU-abc"),
        ("cuda:2", "4,6", "2"),
    ],
)
def test_a_worker_sees_its_own_device_only(device: str, visible: str | None, expected: str) -> None:
    given = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    seen = environment(device, given, threads=2)
    assert seen["CUDA_VISIBLE_DEVICES"] == expected
    assert seen["HF_HUB_OFFLINE"] == "1"


def test_workers_on_the_processor_share_it() -> None:
    assert environment("cpu", {}, threads=2)["OMP_NUM_THREADS"] == "2"
    assert environment("cpu", {"OMP_NUM_THREADS": "7"}, threads=2)["OMP_NUM_THREADS"] == "7"
    assert "OMP_NUM_THREADS" not in environment("cuda:0", {}, threads=2)


@pytest.mark.parametrize("name", ["API_KEY", "HF_TOKEN", "WEBHOOK_SECRET", "WEBHOOK_AUTH_VALUE"])
def test_a_worker_sees_no_secret(name: str) -> None:
    assert name not in environment("cpu", {name: "secret"}, threads=1)
