"""What a worker's death leads to: jobs run again, restarts, poison, quarantine."""

from msgspec.structs import replace

from ipc import messages as m
from supervisor.states import JobState, WorkerState
from supervisor.suspects import POISON_SECONDS
from tests.tools.fleets import FakeFleet, code_of, crash_before_ready, job, picture, refused

READY, STARTING, BACKING_OFF = WorkerState.READY, WorkerState.STARTING, WorkerState.BACKING_OFF
QUARANTINED = WorkerState.QUARANTINED


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
    fake, bad = FakeFleet(2), {"parameters": {"prompt": "bad"}, "images": {"image": [b"bad"]}}
    for id in ("one", "two"):
        one = job(id, **bad)
        fake.submit(one)
        assert one.worker is not None
        fake.fleet.cancel(one)
        one.let_go()
        fake.die(one.worker)
    with refused("poison"):
        fake.submit(job("three", **bad))


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
