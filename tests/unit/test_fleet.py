"""The fleet over workers that only listen: what every event leads to."""

import pytest
from msgspec.structs import replace

from ipc import messages as m
from supervisor.jobs import Ended, Job, Queued
from supervisor.observer import Observer
from supervisor.states import JobState, WorkerState
from supervisor.suspects import POISON_SECONDS
from supervisor.worker import Cause, Worker
from supervisor.worker_process import Exit
from tests.tools.fleets import SETTINGS, FakeFleet, code_of, job, model, picture, refused

READY, STARTING, DRAINING = WorkerState.READY, WorkerState.STARTING, WorkerState.DRAINING
STOPPING, KILLING = WorkerState.STOPPING, WorkerState.KILLING
BACKING_OFF, QUARANTINED = WorkerState.BACKING_OFF, WorkerState.QUARANTINED
STOPPED = WorkerState.STOPPED
LAUNCH = m.Load(job="launch", checkpoint=model())


def kinds(sent: list[m.ToWorker]) -> list[str]:
    return [type(message).__name__ for message in sent]


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


# Deaths.


def test_a_job_is_finished_elsewhere_when_its_worker_dies() -> None:
    fake, one = FakeFleet(2), job()
    fake.submit(one)
    fake.receive(picture("job"))
    fake.die(0, -9)
    assert fake.running(1) == ["job"]
    [again] = fake.sent[1]
    assert isinstance(again, m.Generate)
    assert again == replace(one.message, alone=True)  # the same seeds
    fake.finish(one)
    assert (one.state, one.attempts) == (JobState.FINISHED, 2)


def test_queued_jobs_move_unharmed() -> None:
    fake, jobs = FakeFleet(1, capacity=1), [job(f"{index}") for index in range(4)]
    fake.submit(*jobs)
    fake.die()
    fake.revive()
    assert [each.deaths for each in jobs] == [1, 0, 0, 0]
    for one in jobs[1:]:
        fake.fleet.cancel(jobs[0]) if fake.running() == ["0"] else None
        fake.receive(m.Cancelled(job="0"))
        fake.finish(one)
    assert [each.attempts for each in jobs[1:]] == [1, 1, 1]
    assert all(each.state is JobState.FINISHED for each in jobs[1:])


def test_batch_mates_run_again_each_by_itself_and_are_not_blamed() -> None:
    fake, jobs = FakeFleet(1, capacity=3), [job("bad"), job("b"), job("c")]
    fake.submit(*jobs)
    fake.die()
    while not fake.fleet.is_idle:
        if fake.worker().state is not READY:
            fake.revive()
        [id] = fake.running()  # one at a time, though there are three places
        if id == "bad":
            fake.die()
        else:
            fake.finish(next(one for one in jobs if one.id == id))
    assert [code_of(one) for one in jobs] == ["poison", None, None]
    assert [one.attempts for one in jobs] == [3, 2, 2]


def test_poison_is_refused_for_a_while() -> None:
    fake, one = FakeFleet(2), job("one", parameters={"prompt": "bad"})
    fake.submit(one)
    fake.die(0)
    fake.die(1)
    assert code_of(one) == "poison"
    assert one.outcome is not None
    assert "exited with code 1" in str(one.outcome.problem)
    with refused("poison"):
        fake.submit(job("two", parameters={"prompt": "bad"}))
    fake.submit(job("three", parameters={"prompt": "good"}))
    fake.now += POISON_SECONDS
    fake.submit(job("four", parameters={"prompt": "bad"}))


def test_a_job_killed_from_outside_twice_is_lost_and_not_poison() -> None:
    fake, one = FakeFleet(2), job()
    fake.submit(one)
    fake.die(0, -9)
    fake.die(1, -15)
    assert code_of(one) == "worker_lost"
    fake.revive(0)
    fake.submit(job("again", parameters=one.message.parameters))  # type: ignore[union-attr]


def test_a_kill_from_outside_is_no_suspicion() -> None:
    fake, one = FakeFleet(2), job()
    fake.submit(one)
    fake.die(0, -9)
    fake.die(1, 1)
    assert one.state is JobState.QUEUED  # one death of its own


def test_a_segmentation_fault_is_a_suspicion() -> None:
    fake, one = FakeFleet(2), job()
    fake.submit(one)
    fake.die(0, -11)
    fake.die(1, -11)
    assert code_of(one) == "poison"


def test_a_request_that_is_cancelled_before_it_kills_is_found_out_all_the_same() -> None:
    fake = FakeFleet(2)
    for id in ("one", "two"):
        one = job(id, parameters={"prompt": "bad"})
        fake.submit(one)
        assert one.worker is not None
        fake.fleet.cancel(one)
        fake.die(one.worker)
    with refused("poison"):
        fake.submit(job("three", parameters={"prompt": "bad"}))


def test_a_success_takes_the_suspicion_back() -> None:
    fake = FakeFleet(2)
    for index in range(3):
        one = job(f"{index}", parameters={"prompt": "same"})
        fake.submit(one)
        assert one.worker is not None
        fake.die(one.worker)
        fake.finish(one)
        for id in (0, 1):
            if fake.worker(id).state is not READY:
                fake.revive(id)


def test_a_worker_that_dies_idle_comes_back() -> None:
    fake = FakeFleet(1)
    fake.die()
    worker = fake.worker()
    assert (worker.state, worker.last_exit) == (BACKING_OFF, "exited with code 1")
    fake.pass_time(0.2)
    assert worker.state is BACKING_OFF
    fake.pass_time(0.1)
    assert (worker.state, worker.restarts) == (STARTING, 1)


def test_a_worker_that_stays_up_is_forgiven_its_deaths() -> None:
    fake = FakeFleet(1)
    fake.die()
    fake.revive()
    assert fake.worker().failures == 1
    fake.pass_time(11)
    assert fake.worker().failures == 0


def test_a_worker_that_finishes_a_job_is_forgiven_its_deaths() -> None:
    fake, one = FakeFleet(1), job()
    fake.die()
    fake.revive()
    fake.submit(one)
    fake.finish(one)
    assert fake.worker().failures == 0


def crash_before_ready(fake: FakeFleet, id: int, times: int = 5) -> None:
    worker = fake.worker(id)
    for _ in range(times):
        if worker.state is BACKING_OFF:
            while worker.state is BACKING_OFF:
                fake.pass_time(1)
            fake.spawn(worker)
        fake.die(id, 7)


def test_a_worker_that_never_gets_ready_is_quarantined_and_the_rest_serve_on() -> None:
    fake = FakeFleet(2, ready=False)
    fake.report_ready(fake.worker(1))
    crash_before_ready(fake, 0)
    assert fake.states() == [QUARANTINED, READY]
    assert fake.worker().last_exit == "exited with code 7"
    fake.submit(job())
    assert fake.running(1) == ["job"]


def test_with_the_last_worker_given_up_jobs_are_answered() -> None:
    fake, waiting = FakeFleet(1, ready=False), job("waiting")
    fake.submit(waiting)
    crash_before_ready(fake, 0)
    assert code_of(waiting) == "unavailable"
    with refused("unavailable"):
        fake.submit(job())


def test_a_job_pinned_to_a_worker_that_is_given_up_is_answered() -> None:
    fake, pinned, free = FakeFleet(2, ready=False), job("pinned", pinned_worker=0), job("free")
    fake.submit(pinned, free)
    crash_before_ready(fake, 0)
    assert code_of(pinned) == "unavailable"
    assert not free.has_ended


def test_a_job_pinned_to_a_worker_that_died_waits_for_it() -> None:
    fake, pinned = FakeFleet(2), job("pinned", pinned_worker=1)
    fake.submit(pinned)
    fake.die(1)
    assert pinned.state is JobState.QUEUED
    fake.revive(1)
    assert fake.running(1) == ["pinned"]


def test_a_process_that_cannot_be_started_counts_as_dead() -> None:
    fake = FakeFleet(1, ready=False)
    fake.fleet.spawn_failed(fake.worker(), "no memory")
    assert fake.states() == [BACKING_OFF]
    assert fake.worker().last_exit == "could not be started: no memory"


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


WORN = m.Worn(reason="memory", detail="cannot get 1.50 GB back")


def test_a_worn_worker_does_its_jobs_takes_no_more_and_is_replaced() -> None:
    fake, diary, one, other = FakeFleet(2), Diary(), job("one"), job("other")
    fake.fleet.observers.append(diary)
    fake.submit(one)
    fake.receive(WORN)
    fake.receive(WORN)
    fake.pass_time(1)
    assert (fake.states(), fake.running(0)) == ([DRAINING, READY], ["one"])
    fake.submit(other)
    assert fake.running(1) == ["other"]
    fake.finish(one)
    fake.pass_time(1)
    assert (fake.states(), kinds(fake.sent[0])[-1]) == ([STOPPING, READY], "Shutdown")
    fake.receive(WORN)  # on its way when that was decided
    fake.die(0, 0)
    words = "asked to be replaced (memory): cannot get 1.50 GB back (exited with code 0)"
    assert fake.worker().last_exit == words
    assert diary.entries[-1] == f"worn {words}"
    fake.revive(0)
    fake.finish(other)
    assert [(each.state, each.attempts) for each in (one, other)] == [(JobState.FINISHED, 1)] * 2
    fake.fleet.restart()
    fake.pass_time(1)
    fake.die(0, 0)
    assert fake.worker().last_exit == words  # a planned end is not told, nor the old one again


def test_a_worn_worker_that_dies_before_its_jobs_are_done_died_of_that() -> None:
    fake, one = FakeFleet(2), job()
    fake.submit(one)
    fake.receive(WORN)
    fake.die(0, -11)
    assert fake.worker().last_exit == "was ended by SIGSEGV"
    assert (one.deaths, fake.running(1)) == (1, ["job"])


def test_a_worker_cannot_be_worn_before_it_is_ready() -> None:
    fake = FakeFleet(1, ready=False)
    fake.receive(WORN)
    assert fake.states() == [KILLING]


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


@pytest.mark.parametrize(("timeout_seconds", "pace_seconds"), [(60, 0.25), (0.4, 0.1)])
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


# Observers.


class Diary(Observer):
    def __init__(self) -> None:
        self.entries: list[str] = []

    def job_refused(self, code: str) -> None:
        self.entries.append(f"refused {code}")

    def job_dispatched(self, job: Job, worker: Worker) -> None:
        self.entries.append(f"dispatched {job.id}")

    def job_answered(self, job: Job, worker: Worker, finished: m.Finished) -> None:
        self.entries.append(f"answered {job.id}")

    def job_ended(self, job: Job) -> None:
        self.entries.append(f"ended {job.id}")

    def worker_exited(self, worker: Worker, cause: Cause) -> None:
        self.entries.append(f"{cause.kind} {cause.words}")

    def models_changed(
        self, worker: Worker, loaded: list[m.Resident], unloaded: list[m.Resident]
    ) -> None:
        names = [[model.checkpoint for model in models] for models in (loaded, unloaded)]
        self.entries.append(f"models {names}")


class Broken(Observer):
    def job_dispatched(self, job: Job, worker: Worker) -> None:
        raise RuntimeError("a defect")


def test_observers_are_told_of_everything() -> None:
    fake, diary, one = FakeFleet(1), Diary(), job()
    fake.fleet.observers += [Broken(), diary]
    fake.submit(one)
    fake.hold(0, "cat")
    fake.hold(0, "cat")
    fake.hold(0, "dog")
    fake.finish(one)
    fake.die(0, -6)
    fake.fleet.drain()
    with refused("draining"):
        fake.submit(job("late"))
    assert diary.entries == ["dispatched job", "models [['cat'], []]", "models [['dog'], ['cat']]",
                             "answered job", "ended job", "exited was ended by SIGABRT",
                             "refused draining"]  # fmt: skip


def test_observers_and_the_rest_go_on_when_nothing_is_overridden() -> None:
    fake, one = FakeFleet(1), job()
    fake.fleet.observers.append(Observer())
    fake.submit(one)
    fake.hold(0, "cat")
    fake.finish(one)
    fake.die()
    fake.fleet.drain()
    with refused("draining"):
        fake.submit(job("late"))


def test_a_swap_is_measured_only_where_one_was_needed() -> None:
    fake, first, second = FakeFleet(1), job("a"), job("b")
    fake.submit(first)
    fake.finish(first, load_seconds=4.0)
    fake.hold(0, "cat")
    fake.submit(second)
    fake.finish(second, load_seconds=0.001)
    assert fake.fleet.work.estimates.swaps.expected("/models/cat") == 4.0


@pytest.mark.parametrize(
    ("code", "words"),
    [(3, "exited with code 3"), (-6, "was ended by SIGABRT"), (-200, "was ended by signal 200")],
)
def test_an_exit_is_told_in_words(code: int, words: str) -> None:
    assert Exit(code).in_words() == words
