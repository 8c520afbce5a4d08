"""What a fleet tells those who watch it."""

import pytest

from supervisor.jobs import Job
from supervisor.observer import Observer
from supervisor.worker import Worker
from supervisor.worker_process import Exit
from tests.tools.fleets import Diary, FakeFleet, job, refused


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
