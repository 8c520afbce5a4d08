"""What a worker is seen to do, when it is stalled, and which deadlines of a stop have come."""

import pytest
from msgspec.structs import replace

from ipc import messages as m
from supervisor.estimates import Estimates
from supervisor.jobs import Job
from supervisor.states import WorkerEvent, WorkerState
from supervisor.worker import Worker
from tests.tools.fleets import MEMORY, SETTINGS, FakeProcess, job, model, resident


def worker(state: WorkerState = WorkerState.READY, **phases: m.Phase | None) -> Worker:
    """One that runs a job in each of the phases, all of them sent and heard of at 0."""
    one = Worker(0, "cpu", state, process=FakeProcess(1), capacity=4)
    for id, phase in phases.items():
        running = job(id)
        running.dispatched(0, 0.0, swaps=False)
        running.phase = phase
        one.running[id] = running
    return one


@pytest.mark.parametrize(
    ("phases", "limit"),
    [
        ({"a": "loading"}, 600),
        ({"a": "encoding"}, 60),
        ({"a": "denoising"}, 60),
        ({"a": "decoding"}, 60),
        ({"a": None}, 60),
        ({"a": "denoising", "b": None}, 60),
        ({"a": "denoising", "b": "loading"}, 600),
    ],
)
def test_a_silent_worker_is_stalled_after_its_phases_time(
    phases: dict[str, m.Phase | None], limit: float
) -> None:
    one = worker(**phases)
    assert one.stalled(SETTINGS, False, limit) is None
    assert "made no progress" in str(one.stalled(SETTINGS, False, limit + 1))


def test_a_stalled_worker_is_told_by_what_it_was_at() -> None:
    one = worker(a="denoising", b="decoding")
    words = "made no progress for 60 s while decoding and denoising"
    assert one.stalled(SETTINGS, False, 61) == words
    assert worker(a=None).stalled(SETTINGS, False, 61) == "made no progress for 60 s while waiting"


def test_a_job_that_hangs_beside_others_that_do_not_is_noticed() -> None:
    one = worker(a="denoising", b="decoding")
    one.moved_at = one.running["a"].moved_at = 100
    assert one.stalled(SETTINGS, False, 120) is None
    words = "made no progress with one of its 2 jobs while decoding"
    assert one.stalled(SETTINGS, False, 121) == words


def test_a_job_that_waits_in_a_worker_for_others_may_wait() -> None:
    one = worker(a="denoising", b=None)
    one.moved_at = one.running["a"].moved_at = 1000
    assert one.stalled(SETTINGS, False, 1001) is None


def test_a_first_step_may_take_as_long_as_a_compiler() -> None:
    one, settings = worker(a="denoising"), replace(SETTINGS, compile_backend="stable-fast")
    assert one.stalled(settings, False, 600) is None
    assert one.stalled(settings, False, 601)
    one.running["a"].step = 1
    assert one.stalled(settings, False, 61)


def test_a_start_has_its_own_time_and_a_launch_checkpoint_more() -> None:
    one = worker(WorkerState.STARTING)
    assert one.stalled(SETTINGS, False, 300) is None
    assert one.stalled(SETTINGS, False, 301) == "was not ready within 300 s"
    assert one.stalled(SETTINGS, True, 900) is None
    assert one.stalled(SETTINGS, True, 901) == "was not ready within 900 s"


def test_what_is_on_the_device_or_comes_there_needs_no_swap() -> None:
    one = worker()
    one.models = [resident("cat"), resident("cow"), resident("dog", tier="host")]
    one.running["loads"] = job("loads", checkpoint="bird")
    one.running["unloads"] = Job("unloads", m.Unload(job="unloads", checkpoint=model("cow")), 0, 9)
    assert one.resident == {"/models/cat", "/models/bird"}
    assert one.holds("/models/dog")


def test_a_start_without_a_process_is_no_stall() -> None:
    one = worker(WorkerState.STARTING)
    one.process = None
    assert one.stalled(SETTINGS, False, 1e6) is None


@pytest.mark.parametrize("state", [WorkerState.READY, WorkerState.DRAINING])
def test_an_idle_worker_is_never_stalled(state: WorkerState) -> None:
    assert worker(state).stalled(SETTINGS, False, 1e6) is None


def test_a_worker_that_is_being_stopped_is_not_stalled_as_well() -> None:
    assert worker(WorkerState.STOPPING, a="denoising").stalled(SETTINGS, False, 1e6) is None


@pytest.mark.parametrize(
    ("state", "seconds", "term", "kill"),
    [
        (WorkerState.STOPPING, 2, False, False),
        (WorkerState.STOPPING, 3, True, False),
        (WorkerState.STOPPING, 6, True, True),
        (WorkerState.KILLING, 6, False, True),
        (WorkerState.READY, 6, False, False),
    ],
)
def test_a_stop_goes_from_words_to_signals(
    state: WorkerState, seconds: float, term: bool, kill: bool
) -> None:
    one = worker(state)
    assert (one.term_is_due(seconds), one.stop_is_overdue(seconds)) == (term, kill)


def test_a_worker_that_stayed_up_is_forgiven() -> None:
    assert not worker().has_stayed_up(10)
    assert worker().has_stayed_up(11)
    assert not worker(WorkerState.STARTING).has_stayed_up(11)


def test_a_state_lasts_from_when_it_was_entered() -> None:
    one = worker()
    one.happened(WorkerEvent.RESTART_REQUESTED, 5)
    assert (one.state, one.state_since) == (WorkerState.DRAINING, 5)
    one.happened(WorkerEvent.RESTART_REQUESTED, 9)
    assert one.state_since == 5


def test_of_a_process_that_is_gone_nothing_is_kept() -> None:
    one = worker(a="denoising")
    one.models = [resident()]
    assert [each.id for each in one.gone()] == ["a"]
    assert (one.process, one.memory, one.models, one.running) == (None, None, [], {})
    one.post(m.Shutdown())  # falls into nowhere


def test_a_jobs_steps_begin_when_its_model_is_on_the_device() -> None:
    one = worker(a=None)

    def left(now: float) -> tuple[float, ...]:
        return one.view(Estimates(), now).running_seconds

    one.told(m.Residency(models=[resident("cat", "host"), resident("dog")], memory=MEMORY), 1.0)
    assert left(1.5) == (1.0,)
    one.told(m.Residency(models=[resident("cat")], memory=MEMORY), 2.0)
    assert left(2.5) == (0.5,)
    one.told(m.Residency(models=[resident("cat"), resident("dog")], memory=MEMORY), 2.5)
    assert left(2.75) == (0.25,)


def test_deaths_before_ready_are_counted_apart() -> None:
    one = worker(WorkerState.STARTING)
    one.died("exited with code 1")
    one.died("exited with code 2")
    assert (one.failures, one.failed_starts, one.last_exit) == (2, 2, "exited with code 2")
    one.happened(WorkerEvent.READY_REPORTED, 1)
    one.died("exited with code 3")
    assert (one.failures, one.failed_starts) == (3, 0)
    one.began(FakeProcess(2), print, 2)
    one.died("exited with code 4")
    assert (one.failures, one.failed_starts) == (4, 1)


def test_placement_sees_what_runs_and_what_is_resident() -> None:
    one = worker(a="denoising")
    one.models = [resident("cat"), resident("dog")]
    view = one.view(Estimates(), now=0.0)
    assert (view.capacity, view.running_seconds, view.exclusive) == (4, (1.0,), False)
    assert view.resident == {"/models/cat", "/models/dog"}
    assert one.view(Estimates(), now=0.5).running_seconds == (0.5,)
    assert one.holds("/models/cat")
    assert not one.holds("/models/cow")
    one.running["a"].alone = True
    assert one.view(Estimates(), now=0.0).exclusive
