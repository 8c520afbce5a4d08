"""A worker that asks to be replaced, seen from the fleet."""

from ipc import messages as m
from supervisor.states import JobState, WorkerState
from tests.tools.fleets import Diary, FakeFleet, job, kinds

READY, DRAINING = WorkerState.READY, WorkerState.DRAINING
STOPPING, KILLING = WorkerState.STOPPING, WorkerState.KILLING
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
