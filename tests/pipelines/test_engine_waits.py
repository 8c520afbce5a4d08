"""Jobs that wait, are cancelled or end, and what an engine leaves behind."""

import gc
import threading
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from greenlet import getcurrent

from gpu_worker.batching import Layout
from gpu_worker.claims import wait_for_room
from gpu_worker.engine import Body, Engine, Task
from gpu_worker.forwards import Forwards, run_eagerly
from gpu_worker.interposer import Target, restore
from gpu_worker.turns import PATIENCE, conflict
from tests.tools.engines import LAYOUT, Denoiser, denoised, engine_of, step_task


@pytest.fixture
def denoiser() -> Denoiser:
    return Denoiser(0.5)


def test_other_jobs_go_on_while_one_waits(denoiser: Denoiser) -> None:
    engine = engine_of(denoiser)
    future: Future[int] = Future()
    ends: list[Any] = []
    engine.submit(Task("slow", lambda: engine.wait_for(future), finished=ends.append))
    engine.submit(step_task(denoiser, "fast", 3, finished=lambda _: ends.append("fast")))
    while engine.round():
        pass
    assert ends == ["fast"]
    future.set_result(5)
    engine.run_until_idle()
    assert ends == ["fast", 5]


def test_a_job_is_cancelled_though_what_it_waits_for_goes_on() -> None:
    engine = Engine()
    ends: list[Any] = []
    task = Task("slow", lambda: engine.wait_for(Future()), cancelled=lambda: ends.append(1))
    engine.submit(task)
    engine.round()
    engine.cancel("slow")
    engine.round()
    assert ends == [1]
    assert not engine.busy


def test_the_end_of_a_wait_wakes_whoever_waits_for_work() -> None:
    woken = threading.Event()
    engine = Engine(wake=woken.set)
    future: Future[int] = Future()
    engine.submit(Task(1, lambda: engine.wait_for(future)))
    engine.round()
    assert not woken.is_set()
    future.set_result(5)
    assert woken.is_set()


def test_an_error_that_was_waited_for_is_raised_in_the_body() -> None:
    engine = Engine()
    future: Future[int] = Future()
    errors: list[Exception] = []
    engine.submit(Task(1, lambda: engine.wait_for(future), failed=errors.append))
    engine.round()
    future.set_exception(ZeroDivisionError())
    engine.run_until_idle()
    assert isinstance(errors[0], ZeroDivisionError)


def test_a_body_that_calls_its_modules_while_it_is_cancelled_still_ends(denoiser: Denoiser) -> None:
    engine = engine_of(denoiser)
    ends: list[Any] = []

    def stubborn() -> None:
        try:
            denoised(denoiser, 0, 1, 3, 0.0)
        finally:
            denoised(denoiser, 0, 1, 3, 0.0)

    engine.submit(Task(1, stubborn, cancelled=lambda: ends.append("cancelled")))
    engine.round()
    engine.cancel(1)
    engine.round()
    assert ends == ["cancelled"]
    assert not engine.busy


def test_a_closed_engine_has_cancelled_everything(denoiser: Denoiser) -> None:
    engine = engine_of(denoiser, max_running=1)
    ends: list[Any] = []
    for job in range(3):
        engine.submit(step_task(denoiser, job, 3, cancelled=lambda: ends.append("cancelled")))
    engine.round()
    engine.close()
    assert ends == ["cancelled"] * 3


def test_outside_of_a_body_a_module_and_a_wait_work_as_ever(denoiser: Denoiser) -> None:
    engine = engine_of(denoiser)
    assert not isinstance(getcurrent(), Body)
    assert torch.equal(denoiser(torch.ones(1, 3), 1)["sample"], torch.full((1, 3), 1.5))
    done: Future[int] = Future()
    done.set_result(5)
    assert engine.wait_for(done) == 5


def test_an_output_without_rows_makes_an_architecture_unbatched() -> None:
    class Summing(torch.nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return sample.sum()

    module, ends = Summing(), []
    engine = Engine()
    engine.adopt(module, "forward", Layout("sample"))
    for size in (1.0, 2.0):
        body = lambda size=size: float(module(torch.full((1, 2), size)))  # noqa: E731
        engine.submit(Task(size, body, finished=ends.append))
    engine.run_until_idle()
    assert ends == [2.0, 4.0]


def test_gradients_are_off_in_bodies_and_as_before_outside(denoiser: Denoiser) -> None:
    engine = engine_of(denoiser)
    seen: list[bool] = []

    @torch.no_grad()
    def body() -> None:
        denoiser(torch.ones(1, 3), 1)
        seen.append(torch.is_grad_enabled())

    for job in range(3):
        engine.submit(Task(job, body))
    engine.run_until_idle()
    assert seen == [False] * 3
    assert torch.is_grad_enabled()


def test_a_module_given_back_is_as_it_was(denoiser: Denoiser) -> None:
    before = dict(denoiser.__dict__)
    engine = engine_of(denoiser)
    engine.adopt(denoiser, "forward", LAYOUT)
    restore(denoiser)
    assert denoiser.__dict__ == before


def test_five_hundred_jobs_leave_nothing_behind(denoiser: Denoiser) -> None:
    engine = engine_of(denoiser)

    def failing() -> None:
        denoised(denoiser, 0, 1, 2, 0.0)
        raise RuntimeError("cannot go on")

    def held(jobs: int) -> int:
        """What is alive after so many more jobs: bodies, tasks, tensors, errors."""
        for job in range(jobs):
            engine.submit(step_task(denoiser, job, 3, deterministic=job % 3 == 0))
            engine.submit(Task(-job, failing))
            engine.submit(step_task(denoiser, "gone", 3))
            engine.round()
            engine.cancel("gone")
        engine.run_until_idle()
        kinds = (Body, Task, torch.Tensor, RuntimeError)
        return sum(issubclass(type(each), kinds) for each in gc.get_objects())

    gc.collect()
    before = held(2)
    assert held(500) <= before


def test_the_executor_is_given_the_target_of_each_forward(denoiser: Denoiser) -> None:
    seen = []

    def execute(target: Target, args: Any, kwargs: Any) -> Any:
        seen.append((target.module, target.method))
        return run_eagerly(target, args, kwargs)

    engine = engine_of(denoiser, forwards=Forwards(execute=execute))
    engine.submit(step_task(denoiser, 1, 1))
    engine.run_until_idle()
    assert seen == [(denoiser, "forward")]


@pytest.mark.parametrize(
    ("told", "alone", "held_up"),
    [
        ([("old",)], False, {"old"}),
        ([("old", "other")], False, {"old", "other"}),
        ([("old",)] * 2 * PATIENCE, False, {"old"}),
        ([("other",), ("old",)], False, {"old"}),
        ([("other",), ("old",)] * PATIENCE, True, {"old"}),
        ([()], True, set()),
    ],
)
def test_a_task_that_waits_for_room_keeps_others_from_beginning(
    told: list[tuple[str, ...]], alone: bool, held_up: set[str]
) -> None:
    task = Task("waiting", lambda: None, claims={"own": ()})
    claims, before = task.claims, list[tuple[str, ...]]()
    for in_the_way in told:
        wait_for_room(task, claims, before, in_the_way)
    assert task.alone is alone
    others = {path: Task(path, lambda: None, claims={path: ()}) for path in ("old", "other", "new")}
    expected = set(others) if alone else held_up
    assert {path for path, other in others.items() if conflict(task, other)} == expected
