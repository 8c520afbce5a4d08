"""Workers that are replaced, launched, restarted and stopped, seen from the fleet."""

import pytest
from msgspec.structs import replace

from ipc import messages as m
from supervisor.states import WorkerState
from tests.tools.fleets import (
    SETTINGS,
    FakeFleet,
    code_of,
    crash_before_ready,
    job,
    kinds,
    model,
    picture,
)

READY, STARTING, DRAINING = WorkerState.READY, WorkerState.STARTING, WorkerState.DRAINING
STOPPING, KILLING, BACKING_OFF = WorkerState.STOPPING, WorkerState.KILLING, WorkerState.BACKING_OFF
QUARANTINED, STOPPED = WorkerState.QUARANTINED, WorkerState.STOPPED
LAUNCH = m.Load(job="launch", checkpoint=model())


# Workers that must be replaced.


def test_a_worker_that_gives_up_is_replaced_and_says_why() -> None:
    fake, one = FakeFleet(2), job()
    fake.submit(one)
    fake.receive(m.Fatal(reason="device", detail="cannot go on: a CUDA error"))
    assert fake.states() == [STOPPING, READY]
    fake.die(0, 70)
    words = "gave up (device): cannot go on: a CUDA error (exited with code 70)"
    assert fake.worker().last_exit == words
    assert fake.running(1) == ["job"]


def test_a_stalled_worker_is_killed_and_its_job_runs_elsewhere() -> None:
    fake, one = FakeFleet(2), job()
    fake.submit(one)
    fake.receive(m.Progress(job="job", phase="denoising", step=1, steps=10))
    fake.pass_time(60)
    assert fake.states() == [READY, READY]
    fake.pass_time(1)
    assert fake.states() == [KILLING, READY]
    assert fake.processes[0].signals == ["kill"]
    fake.die(0, -9)
    words = "made no progress for 60 s while denoising (was ended by SIGKILL)"
    assert fake.worker().last_exit == words
    assert (one.deaths, one.killed_from_outside) == (1, 0)
    assert fake.running(1) == ["job"]


def test_a_job_that_moves_keeps_its_worker() -> None:
    fake, one = FakeFleet(1), job()
    fake.submit(one)
    for step in range(5):
        fake.pass_time(59)
        fake.receive(m.Progress(job="job", phase="denoising", step=step, steps=10))
    assert fake.states() == [READY]


@pytest.mark.parametrize(("timeout_seconds", "pace_seconds"), [(60, 4.0), (0.4, 0.1)])
def test_a_worker_tells_of_its_steps_often_enough_not_to_count_as_hanging(
    timeout_seconds: float, pace_seconds: float
) -> None:
    fake, one = (
        FakeFleet(1, settings=replace(SETTINGS, step_timeout_seconds=timeout_seconds)),
        job(),
    )
    one.followed = False
    fake.submit(one)
    [sent] = fake.sent[0]
    assert isinstance(sent, m.Generate)
    assert sent.progress_seconds == pace_seconds


def test_a_worker_that_talks_nonsense_is_killed() -> None:
    fake = FakeFleet(1)
    fake.fleet.protocol_broken(fake.worker(), "broke the protocol: garbage")
    assert fake.states() == [KILLING]
    fake.die(0, -9)
    assert fake.worker().last_exit == "broke the protocol: garbage (was ended by SIGKILL)"


def test_a_worker_of_another_protocol_is_not_used() -> None:
    fake = FakeFleet(1, ready=False)
    fake.report_ready(fake.worker(), protocol=99)
    assert fake.states() == [KILLING]


@pytest.mark.parametrize("index", [-1, 1])
def test_a_worker_that_sends_a_picture_too_many_is_killed(index: int) -> None:
    fake = FakeFleet(1)
    fake.submit(job())
    fake.receive(picture("job", index))
    assert fake.states() == [KILLING]


def test_a_worker_that_is_ready_twice_is_killed() -> None:
    fake = FakeFleet(1)
    fake.report_ready(fake.worker())
    assert fake.states() == [KILLING]


def test_the_first_reason_is_the_one_that_is_told() -> None:
    fake = FakeFleet(1)
    fake.receive(m.Fatal(reason="device", detail="cannot go on"))
    fake.fleet.protocol_broken(fake.worker(), "closed its pipe and lived on")
    fake.die(0, -9)
    assert str(fake.worker().last_exit).startswith("gave up (device)")


def test_a_start_that_takes_too_long_is_ended() -> None:
    fake = FakeFleet(1, ready=False)
    fake.pass_time(301)
    assert fake.states() == [KILLING]
    fake.die(0, -9)
    assert fake.worker().failed_starts == 1


# LAUNCH_CHECKPOINT.


def test_a_worker_is_ready_once_the_launch_checkpoint_is_loaded() -> None:
    fake = FakeFleet(1, launch=LAUNCH)
    assert (fake.states(), kinds(fake.sent[0])) == ([STARTING], ["Load"])
    fake.receive(m.Progress(job="launch", phase="loading"))
    fake.receive(m.Finished(job="launch"))
    assert fake.states() == [READY]


@pytest.mark.parametrize(
    "answer",
    [
        m.Failed(job="launch", code="invalid_model", detail="it is broken"),
        m.Rejected(job="launch", code="invalid_model", detail="it is broken"),
    ],
)
def test_a_worker_without_its_launch_checkpoint_is_of_no_use(answer: m.FromWorker) -> None:
    fake = FakeFleet(1, launch=LAUNCH)
    fake.receive(answer)
    assert fake.states() == [KILLING]
    fake.die(0, -9)
    words = "could not load LAUNCH_CHECKPOINT: it is broken (was ended by SIGKILL)"
    assert fake.worker().last_exit == words


def test_a_launch_that_is_given_up_is_a_failure_too() -> None:
    fake = FakeFleet(1, launch=LAUNCH)
    fake.receive(m.Cancelled(job="launch"))
    assert fake.states() == [KILLING]


# Restarts.


def replace_one(fake: FakeFleet, id: int) -> None:
    """The worker whose turn it is: drained, told to stop, gone, back."""
    assert fake.worker(id).state is DRAINING
    fake.pass_time(0.1)
    assert fake.worker(id).state is STOPPING
    assert fake.sent[id][-1] == m.Shutdown()
    fake.die(id, 0)
    fake.revive(id)


def test_workers_are_replaced_one_at_a_time() -> None:
    fake = FakeFleet(2)
    fake.fleet.restart()
    fake.fleet.restart()
    assert fake.states() == [DRAINING, READY]
    assert fake.fleet.ready_workers() == [fake.worker(1)]
    replace_one(fake, 0)
    assert fake.states() == [READY, DRAINING]
    replace_one(fake, 1)
    assert fake.states() == [READY, READY]
    assert [fake.worker(id).last_exit for id in (0, 1)] == [None, None]
    assert [fake.worker(id).failures for id in (0, 1)] == [0, 0]


def test_a_worker_that_is_to_be_replaced_finishes_its_jobs_first() -> None:
    fake, one, other = FakeFleet(1), job("one"), job("other")
    fake.submit(one)
    fake.fleet.restart()
    fake.submit(other)
    fake.pass_time(1)
    assert (fake.states(), fake.running()) == ([DRAINING], ["one"])
    fake.finish(one)
    replace_one(fake, 0)
    assert fake.running() == ["other"]
    assert (one.attempts, other.attempts) == (1, 1)


def test_a_worker_that_dies_while_it_drains_is_replaced_by_that() -> None:
    fake, one = FakeFleet(2), job()
    fake.submit(one)
    fake.fleet.restart()
    fake.die(0)
    assert fake.running(1) == ["job"]
    fake.finish(one)
    fake.revive(0)
    assert fake.states() == [READY, DRAINING]


def test_a_quarantined_worker_gets_another_chance_and_holds_up_nobody() -> None:
    fake = FakeFleet(2, ready=False)
    crash_before_ready(fake, 0)
    fake.report_ready(fake.worker(1))
    fake.fleet.restart()
    assert fake.states() == [BACKING_OFF, READY]
    crash_before_ready(fake, 0)
    assert fake.states() == [QUARANTINED, DRAINING]


def test_a_worker_that_is_backing_off_comes_back_at_once_for_a_restart() -> None:
    fake = FakeFleet(1, ready=False)
    crash_before_ready(fake, 0, times=4)
    fake.fleet.restart()
    fake.pass_time(0)
    assert fake.states() == [STARTING]


def test_a_restart_ends_with_the_server() -> None:
    fake = FakeFleet(2)
    fake.fleet.restart()
    fake.fleet.drain()
    fake.die(0, 0)
    fake.pass_time(1)
    assert fake.states() == [STOPPED, READY]


# The end.


def test_stopping_answers_every_job_and_tells_every_worker() -> None:
    fake, one, waiting = FakeFleet(1), job("one"), job("waiting")
    fake.submit(one, waiting)
    fake.fleet.stop()
    assert [code_of(each) for each in (one, waiting)] == ["draining"] * 2
    assert kinds(fake.sent[0]) == ["Generate", "Cancel", "Shutdown"]
    fake.die(0, 0)
    assert fake.states() == [STOPPED]
    assert fake.worker().last_exit is None


def test_a_worker_that_does_not_stop_is_made_to() -> None:
    fake = FakeFleet(1)
    fake.fleet.stop()
    fake.pass_time(2.5)
    assert fake.processes[0].signals == ["terminate"]
    fake.pass_time(3)
    assert fake.states() == [KILLING]
    assert fake.processes[0].signals == ["terminate", "kill"]
    fake.pass_time(6)
    assert fake.processes[0].signals == ["terminate", "kill", "kill"]
    fake.die(0, -9)
    assert fake.states() == [STOPPED]


@pytest.mark.parametrize("ready", [True, False])
def test_no_worker_comes_back_once_the_fleet_stops(ready: bool) -> None:
    fake = FakeFleet(2, ready=ready)
    fake.fleet.protocol_broken(fake.worker(0), "nonsense")
    fake.fleet.stop()
    fake.die(0, -9)
    fake.pass_time(1)
    fake.die(1, 0)
    assert fake.states() == [STOPPED, STOPPED]


def test_a_worker_that_is_ready_when_it_is_told_to_stop_is_not_used() -> None:
    fake = FakeFleet(1, ready=False)
    fake.fleet.stop()
    fake.report_ready(fake.worker())
    assert fake.states() == [STOPPING]
    fake.die(0, 0)
    assert fake.states() == [STOPPED]


def test_a_worker_that_is_spawned_too_late_is_killed() -> None:
    fake = FakeFleet(1)
    fake.die()
    fake.pass_time(1)
    fake.fleet.stop()
    fake.spawn(fake.worker())
    assert fake.processes[0].signals == ["kill"]
    fake.die(0, -9)
    assert fake.states() == [STOPPED]


def test_a_dead_worker_comes_back_while_the_server_drains_only_for_jobs() -> None:
    fake, one = FakeFleet(2), job()
    fake.submit(one)
    fake.fleet.drain()
    fake.die(0)
    fake.pass_time(1)
    assert fake.states() == [STARTING, READY]
    fake.finish(one)
    fake.die(1)
    fake.pass_time(1)
    assert fake.states() == [STARTING, STOPPED]
