"""The fleet over workers that only listen: what every event leads to."""

import pytest
from msgspec.structs import replace

from ipc import messages as m
from supervisor.jobs import Ended, Queued
from supervisor.states import JobState, WorkerState
from tests.tools.fleets import SETTINGS, FakeFleet, code_of, job, kinds, refused

READY = WorkerState.READY


# Jobs that go well.


def test_a_job_goes_to_a_worker_and_ends_with_its_pictures() -> None:
    fake, one = FakeFleet(), job(calls=2)
    fake.submit(one)
    assert fake.running() == ["job"]
    assert fake.sent[0] == [one.message]
    fake.finish(one, step_seconds=0.5)
    assert one.state is JobState.FINISHED
    assert one.outcome is not None
    assert len(one.outcome.pictures) == 2
    assert fake.fleet.is_idle
    assert fake.worker().step_seconds == 0.5


def test_a_job_waits_until_a_worker_is_ready() -> None:
    fake, one = FakeFleet(1, ready=False), job()
    fake.submit(one)
    assert one.state is JobState.QUEUED
    fake.report_ready(fake.worker())
    assert fake.running() == ["job"]


def test_a_place_that_is_free_again_is_used_at_once() -> None:
    fake, first, second = FakeFleet(1), job("first"), job("second")
    fake.submit(first, second)
    assert fake.running() == ["first"]
    fake.finish(first)
    assert fake.running() == ["second"]


def test_queued_jobs_are_told_where_they_stand() -> None:
    fake, told = FakeFleet(1), []  # type: ignore[var-annotated]
    jobs = [job("a"), job("b"), job("c")]
    jobs[2].watchers.append(told.append)
    fake.submit(*jobs)
    fake.finish(jobs[0])
    fake.fleet.cancel(jobs[2])
    assert told == [Queued(2), Queued(1), Ended()]


def test_the_plan_says_where_queued_jobs_would_run() -> None:
    fake = FakeFleet(1)
    fake.submit(job("a"), job("b"))
    assert fake.fleet.planned() == {"b": 0}


def test_a_worker_that_batches_takes_several_jobs() -> None:
    fake = FakeFleet(1, capacity=2)
    fake.submit(job("a"), job("b"), job("c"))
    assert fake.running() == ["a", "b"]


# Jobs that end otherwise.


def test_a_cancelled_job_ends_at_once_and_its_worker_is_told() -> None:
    fake, one, other = FakeFleet(1), job("one"), job("other")
    fake.submit(one, other)
    fake.fleet.cancel(one)
    assert (one.state, code_of(one)) == (JobState.CANCELLED, "cancelled")
    assert fake.sent[0][-1] == m.Cancel(job="one")
    assert fake.running() == ["one"]  # until the worker has let go of it
    fake.receive(m.Cancelled(job="one"))
    assert fake.running() == ["other"]
    fake.fleet.cancel(one)
    assert one.state is JobState.CANCELLED


def test_a_cancelled_job_that_waits_costs_its_worker_nothing() -> None:
    fake, one = FakeFleet(1), job("one")
    fake.submit(job("other"), one)
    fake.fleet.cancel(one)
    assert kinds(fake.sent[0]) == ["Generate"]


def test_a_job_that_was_cancelled_too_late_stays_cancelled() -> None:
    fake, one = FakeFleet(1), job()
    fake.submit(one)
    fake.fleet.cancel(one)
    fake.finish(one)
    assert one.state is JobState.CANCELLED
    assert fake.fleet.is_idle


def test_a_job_past_its_deadline_expires_wherever_it_is() -> None:
    fake, running, waiting = FakeFleet(1), job("a", deadline=5), job("b", deadline=5)
    fake.submit(running, waiting)
    fake.pass_time(4)
    assert not running.has_ended
    fake.pass_time(1)
    assert [code_of(each) for each in (running, waiting)] == ["deadline_exceeded"] * 2
    assert fake.sent[0][-1] == m.Cancel(job="a")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (m.Rejected(job="job", code="invalid_request", detail="d", field="f"), "invalid_request"),
        (m.Failed(job="job", code="out_of_memory", detail="d"), "out_of_memory"),
        (m.Failed(job="job", code="no such code", detail="d"), "internal_error"),
    ],
)
def test_a_job_that_fails_leaves_its_worker_be(answer: m.Rejected | m.Failed, code: str) -> None:
    fake, one = FakeFleet(1), job()
    fake.submit(one)
    fake.receive(answer)
    assert code_of(one) == code
    assert fake.states() == [READY]


def test_what_is_said_of_unknown_jobs_is_not_heard() -> None:
    fake = FakeFleet(1)
    fake.receive(m.Progress(job="who", phase="denoising"))
    fake.receive(m.Finished(job="who"))
    assert fake.states() == [READY]


# Admission.


def test_a_full_queue_refuses() -> None:
    fake = FakeFleet(1)
    fake.submit(*(job(f"{index}") for index in range(4)))
    with refused("queue_full") as problem:
        fake.submit(job("one too many"))
    assert (problem().retry_after or 0) >= 1
    assert "3 of 3" in problem().detail


def test_a_full_queue_without_a_ready_worker_refuses_too() -> None:
    fake = FakeFleet(1, ready=False)
    fake.submit(*(job(f"{index}") for index in range(3)))
    with refused("queue_full") as problem:
        fake.submit(job("one too many"))
    assert problem().retry_after == 1


def known(fake: FakeFleet, step_seconds: float = 1.0) -> None:
    """A first job has shown what steps cost."""
    first = job("first")
    fake.submit(first)
    fake.finish(first, step_seconds=step_seconds)


@pytest.mark.parametrize(("step_seconds", "retry_after"), [(1.0, 20), (0.25, 5)])
def test_when_to_come_back_to_a_full_queue_follows_from_measured_steps(
    step_seconds: float, retry_after: int
) -> None:
    """Jobs take ten steps; one runs, and the one behind it has to be done."""
    fake = FakeFleet(1)
    known(fake, step_seconds)
    fake.hold(0, "cat")
    fake.submit(*(job(f"{index}") for index in range(4)))
    with refused("queue_full") as problem:
        fake.submit(job("one too many"))
    assert problem().retry_after == retry_after
    fake.receive(m.Progress(job="0", phase="denoising", step=8, steps=10))
    with refused("queue_full") as problem:
        fake.submit(job("later"))
    assert (problem().retry_after or 0) < retry_after


def test_a_job_that_cannot_be_done_in_time_is_refused() -> None:
    fake = FakeFleet(1)
    known(fake)
    fake.hold(0, "cat")
    fake.submit(job("ahead"))
    with refused("too_late") as problem:
        fake.submit(job("late", deadline=15))
    assert problem().retry_after == 5
    fake.submit(job("in time", deadline=25))


def test_a_job_behind_many_is_still_taken_when_several_workers_share_them() -> None:
    fake = FakeFleet(2, settings=replace(SETTINGS, max_queue=64))
    known(fake)
    fake.hold(0, "cat")
    fake.hold(1, "cat")
    fake.submit(*(job(f"{index}") for index in range(4)))
    fake.submit(job("fits", deadline=35))  # 50 s in all, 25 s on each


def test_a_job_goes_where_its_model_is_on_the_device_or_will_be() -> None:
    fake = FakeFleet(3, capacity=2)
    fake.hold(1, "dog", tier="host")
    fake.hold(2, "dog")
    one, two, behind = job("one", checkpoint="dog"), job("two"), job("behind")
    fake.submit(one, two, behind)
    assert fake.running(2) == ["one"]
    assert fake.running(0) == ["two", "behind"]
    assert [each.swaps for each in (one, two, behind)] == [False, True, False]


def test_a_guess_refuses_nobody() -> None:
    fake = FakeFleet(1)
    fake.submit(job("hopeless", deadline=0.001))


def test_a_pinned_job_is_not_refused_while_its_worker_is_away() -> None:
    fake = FakeFleet(2)
    known(fake)
    fake.die(1)
    fake.submit(job("pinned", deadline=1, pinned_worker=1))
    assert fake.fleet.queued


def test_a_draining_fleet_refuses_and_goes_on() -> None:
    fake, one, waiting = FakeFleet(1), job("one"), job("waiting")
    fake.submit(one, waiting)
    fake.fleet.drain()
    with refused("draining") as problem:
        fake.submit(job("late"))
    assert problem().retry_after == 30
    fake.finish(one)
    fake.finish(waiting)
    assert fake.fleet.is_idle
