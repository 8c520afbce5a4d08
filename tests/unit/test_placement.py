"""Which worker a job goes to, and what becomes of it and its worker after a death."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.placement import (
    MARGINAL_ROW,
    SLOWEST_RESTART_SECONDS,
    JobView,
    Verdict,
    WorkerView,
    after_death,
    dispatches,
    is_hopeless,
    plan,
    restart_delay_seconds,
    slowdown,
)


def worker(id: int, *running: float, holds: str = "", capacity: int = 1,
           exclusive: bool = False) -> WorkerView:  # fmt: skip
    return WorkerView(id=id, capacity=capacity, running_seconds=running, exclusive=exclusive,
                      resident=frozenset(holds.split()))  # fmt: skip


def jobs(models: str, work_seconds: float = 1.0, swap_seconds: float = 2.0) -> list[JobView]:
    return [
        JobView(id=f"{index}", model=model, work_seconds=work_seconds, swap_seconds=swap_seconds)
        for index, model in enumerate(models.split())
    ]


def workers_of(placed: list[JobView], workers: list[WorkerView]) -> list[int]:
    return [each.worker for each in plan(placed, workers)]


@pytest.mark.parametrize(
    ("models", "workers", "expected"),
    [
        pytest.param("a", [worker(0), worker(1, holds="a")], [1], id="the idle holder"),
        pytest.param("a", [worker(0), worker(1, 1.0, holds="a")], [1],
                     id="the holder while what is ahead is less than a swap"),
        pytest.param("a", [worker(0), worker(1, 3.0, holds="a")], [0],
                     id="a second home once what is ahead is more than a swap"),
        pytest.param("a", [worker(0, holds="b"), worker(1)], [1], id="the emptier of two"),
        pytest.param("a", [worker(0), worker(1)], [0], id="the first of equals"),
        pytest.param("a b", [worker(0), worker(1)], [0, 1], id="two models spread out"),
        pytest.param("a a", [worker(0), worker(1)], [0, 1],
                     id="two of one model: a swap each is sooner done than one behind the other"),
        pytest.param("a a a a", [worker(0, holds="a"), worker(1)], [0, 0, 0, 0],
                     id="in a crowd a swap must be worth it to everybody"),
        pytest.param("a", [worker(0, 1.9, holds="a"), worker(1)], [0],
                     id="a little ahead is no reason to swap"),
        pytest.param("a", [worker(0, 2.1, holds="a"), worker(1)], [1],
                     id="a job that is by itself owes nobody"),
        pytest.param("a b a b", [worker(0, holds="a"), worker(1, holds="b")], [0, 1, 0, 1],
                     id="each to its holder: no flapping"),
        pytest.param("a", [], [], id="nobody is ready"),
    ],
)  # fmt: skip
def test_the_least_expected_completion_wins(
    models: str, workers: list[WorkerView], expected: list[int]
) -> None:
    assert workers_of(jobs(models), workers) == expected


def test_a_job_waits_for_its_holder_rather_than_swap_elsewhere() -> None:
    workers = [worker(0), worker(1, 1.0, holds="a")]
    assert dispatches(jobs("a"), workers) == []


def test_a_later_job_does_not_wait_behind_one_that_waits_elsewhere() -> None:
    workers = [worker(0, holds="b"), worker(1, 1.0, holds="a")]
    assert dispatches(jobs("a b"), workers) == [("1", 0)]


def test_jobs_that_share_a_device_slow_each_other_down() -> None:
    [placed] = plan(jobs("a"), [worker(0, 0.5, 9.0, holds="a", capacity=4)])
    assert placed.goes_now
    assert placed.completion_seconds == pytest.approx(1 + MARGINAL_ROW * (0.5 + 1))


def test_a_job_that_must_wait_is_done_after_what_is_ahead() -> None:
    [placed] = plan(jobs("a"), [worker(0, 3.0, holds="a")])
    assert (placed.goes_now, placed.completion_seconds) == (False, 4.0)


def test_waiting_for_a_batch_is_shorter_than_one_after_the_other() -> None:
    [placed] = plan(jobs("a"), [worker(0, 3.0, 3.0, holds="a", capacity=2)])
    assert not placed.goes_now
    assert placed.completion_seconds == pytest.approx(7 * slowdown(2) / 2)


def test_as_many_jobs_go_at_once_as_there_are_places() -> None:
    going = dispatches(jobs("a a a"), [worker(0, holds="a", capacity=2)])
    assert going == [("0", 0), ("1", 0)]


def test_a_full_fleet_takes_nothing() -> None:
    assert dispatches(jobs("a"), [worker(0, 1.0), worker(1, 1.0)]) == []


def alone(id: str, model: str = "a", avoids: int | None = None) -> JobView:
    return JobView(id=id, model=model, alone=True, avoids=avoids)


def test_a_job_that_runs_alone_waits_until_its_worker_is_empty() -> None:
    busy = worker(0, 1.0, holds="a", capacity=4)
    assert dispatches([alone("0")], [busy]) == []
    assert dispatches([alone("0")], [worker(0, capacity=4)]) == [("0", 0)]


def test_nothing_joins_a_job_that_runs_alone() -> None:
    assert dispatches(jobs("a"), [worker(0, 1.0, capacity=4, exclusive=True)]) == []
    assert dispatches([alone("x"), *jobs("a")], [worker(0, capacity=4)]) == [("x", 0)]


def test_a_job_that_runs_alone_is_not_overtaken_for_ever() -> None:
    busy = worker(0, 1.0, holds="a", capacity=4)
    assert dispatches([alone("x"), *jobs("a")], [busy]) == []


def test_the_worker_that_died_under_a_job_is_avoided() -> None:
    workers = [worker(0, holds="a"), worker(1, 5.0)]
    assert workers_of([alone("x", avoids=0)], workers) == [1]
    assert workers_of([alone("x", avoids=0)], [worker(0)]) == [0]


def test_a_pinned_job_goes_nowhere_else() -> None:
    pinned = JobView(id="x", model="a", worker=1)
    assert workers_of([pinned], [worker(0, holds="a"), worker(1, 9.0)]) == [1]
    assert plan([pinned], [worker(0)]) == []


views = st.builds(
    WorkerView,
    id=st.integers(0, 3),
    capacity=st.integers(1, 3),
    running_seconds=st.lists(st.floats(0, 10), max_size=3).map(tuple),
    resident=st.frozensets(st.sampled_from("abc")),
)
some_workers = st.lists(views, max_size=4, unique_by=lambda view: view.id)
some_jobs = st.lists(
    st.builds(
        JobView,
        id=st.uuids().map(str),
        model=st.sampled_from("abc"),
        work_seconds=st.floats(0, 10),
        alone=st.booleans(),
        worker=st.none() | st.integers(0, 3),
    ),
    max_size=8,
)


@given(some_jobs, some_workers)
def test_no_worker_is_given_more_than_it_takes(
    placed: list[JobView], workers: list[WorkerView]
) -> None:
    going = dispatches(placed, workers)
    assert going == [(each.job, each.worker) for each in plan(placed, workers) if each.goes_now]
    by_id = {job.id: job for job in placed}
    for view in workers:
        here = [by_id[id] for id, to in going if to == view.id]
        assert not here or len(view.running_seconds) + len(here) <= view.capacity
        assert not any(job.alone for job in here) or len(here) + len(view.running_seconds) == 1
        assert all(job.worker in (None, view.id) for job in here)


@given(some_jobs, some_workers)
def test_every_job_that_some_worker_may_take_has_a_place(
    placed: list[JobView], workers: list[WorkerView]
) -> None:
    able = [j.id for j in placed if any(j.worker in (None, view.id) for view in workers)]
    assert [each.job for each in plan(placed, workers)] == able


@pytest.mark.parametrize(
    ("deaths", "killed", "suspicions", "verdict"),
    [
        (1, 0, 0, Verdict.AGAIN),  # with others beside it
        (1, 0, 1, Verdict.AGAIN),
        (1, 1, 0, Verdict.AGAIN),
        (2, 0, 1, Verdict.AGAIN),
        (2, 1, 1, Verdict.AGAIN),
        (2, 0, 2, Verdict.POISON),
        (3, 0, 2, Verdict.POISON),
        (2, 2, 0, Verdict.WORKER_LOST),
        (3, 1, 1, Verdict.WORKER_LOST),
        (1, 0, 2, Verdict.POISON),  # the same request came before, as another job
    ],
)
def test_only_what_ran_alone_is_ever_poison(
    deaths: int, killed: int, suspicions: int, verdict: Verdict
) -> None:
    assert after_death(deaths, killed, suspicions) is verdict


def test_restarts_back_off_up_to_a_limit_and_are_spread() -> None:
    delays = [restart_delay_seconds(failures, 0.0) for failures in range(12)]
    assert delays[:5] == [0.0, 0.25, 0.5, 1.0, 2.0]
    assert delays[-1] == SLOWEST_RESTART_SECONDS
    assert restart_delay_seconds(1, 0.9) == pytest.approx(0.25 * 1.225)
    assert restart_delay_seconds(10**6, 0.0) == SLOWEST_RESTART_SECONDS


def test_a_worker_that_never_gets_ready_is_given_up() -> None:
    assert [is_hopeless(starts) for starts in range(7)] == [False] * 5 + [True] * 2


def test_a_step_of_one_row_is_the_unit() -> None:
    assert slowdown(1) == slowdown(0) == 1
    assert slowdown(8) == 1 + 7 * MARGINAL_ROW
