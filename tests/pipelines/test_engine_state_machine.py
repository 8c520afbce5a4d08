"""Random jobs, joins, cancels, failures and priorities against an engine with a toy denoiser."""

import gc
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from greenlet import getcurrent
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_worker.batching import Layout
from gpu_worker.engine import Body, Engine, Task
from gpu_worker.forwards import Forwards, run_eagerly
from gpu_worker.interposer import Target, restore
from gpu_worker.limits import Limits
from gpu_worker.turns import PATIENCE

LAYOUT = Layout("sample", scalars=frozenset({"timestep"}))
MEMORY_ROWS = 7


class Denoiser(torch.nn.Module):
    """Each row's step depends on its own entries only. Negative entries are not borne."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.rows: list[int] = []

    def forward(self, sample: torch.Tensor, timestep: Any, bias: float = 0.0) -> Any:
        if sample.shape[0] > MEMORY_ROWS:
            raise torch.OutOfMemoryError("out of memory")
        if (sample < 0).any():
            raise ValueError("cannot bear negative entries")
        self.rows.append(sample.shape[0])
        timesteps = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1)
        return {"sample": sample * self.factor + timesteps + bias}


def denoised(denoiser: Denoiser, seed: int, rows: int, steps: int, bias: float) -> torch.Tensor:
    """What a pipeline does, in small: several calls, something of its own in between."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.rand(rows, 3, generator=generator)
    for step in range(steps):
        sample = denoiser(sample, step, bias=bias)["sample"]
        sample = sample + torch.rand(rows, 3, generator=generator)
    return sample


class Jobs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.denoisers = [Denoiser(0.5), Denoiser(0.25)]
        self.engine = Engine(Forwards(Limits(max_rows=9)), max_running=4)
        self.helpers = ThreadPoolExecutor(2)
        for denoiser in self.denoisers:
            self.engine.adopt(denoiser, "forward", LAYOUT)
        self.ends: dict[int, list[Any]] = {}
        self.expected: dict[int, Any] = {}
        self.alone: set[int] = set()
        self.claims: dict[int, Any] = {}
        self.running: set[int] = set()
        self.cancelled: set[int] = set()

    def submit(self, body: Callable[[], Any], expected: Any, **options: Any) -> None:
        job = len(self.ends)
        ends = self.ends[job] = []
        self.expected[job] = expected
        self.claims[job] = options.get("claims", {}).get("slot")
        if options.get("alone"):
            self.alone.add(job)

        def watched() -> Any:
            self.running.add(job)
            self.check_company(job)
            try:
                return body()
            finally:
                self.running.discard(job)

        self.engine.submit(
            Task(
                job,
                watched,
                finished=ends.append,
                failed=ends.append,
                cancelled=lambda: ends.append("cancelled"),
                **options,
            )
        )

    def check_company(self, job: int) -> None:
        others = self.running - {job}
        assert not others or not ({job} | others) & self.alone
        mine = self.claims[job]
        assert mine is None or all(self.claims[other] in (None, mine) for other in others)

    options = st.fixed_dictionaries(
        {},
        optional={
            "priority": st.integers(-2, 2),
            "deterministic": st.booleans(),
            "alone": st.booleans(),
            "claims": st.sampled_from([{}, {"slot": "fox"}, {"slot": "hare"}]),
        },
    )

    @rule(
        which=st.integers(0, 1),
        rows=st.integers(1, 3),
        steps=st.integers(0, 5),
        bias=st.sampled_from([0.0, 1.0]),
        options=options,
    )
    def join(self, which: int, rows: int, steps: int, bias: float, options: Any) -> None:
        seed = len(self.ends)
        plain = Denoiser(self.denoisers[which].factor)
        expected = denoised(plain, seed, rows, steps, bias)
        denoiser = self.denoisers[which]
        self.submit(lambda: denoised(denoiser, seed, rows, steps, bias), expected, **options)

    @rule(steps=st.integers(0, 3), options=options)
    def join_and_fail(self, steps: int, options: Any) -> None:
        error = RuntimeError("cannot go on")

        def body() -> None:
            denoised(self.denoisers[0], 1, 2, steps, 0.0)
            raise error

        self.submit(body, error, **options)

    @rule(options=options)
    def join_and_fail_in_a_forward(self, options: Any) -> None:
        self.submit(lambda: self.denoisers[0](-torch.ones(2, 3), 0), ValueError, **options)

    @rule(options=options)
    def join_and_wait_for_a_thread(self, options: Any) -> None:
        def body() -> Any:
            made = self.engine.wait_for(self.helpers.submit(torch.ones, 2, 3))
            return self.denoisers[1](made, 1)["sample"]

        self.submit(body, torch.full((2, 3), 1.25), **options)

    @precondition(lambda self: self.ends)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.ends)))
        before = list(self.ends[job])
        self.engine.cancel(job)
        self.engine.round()
        assert self.ends[job] == before or not before
        assert len(self.ends[job]) == 1
        if not before:
            assert self.ends[job] == ["cancelled"]
            self.cancelled.add(job)

    @rule()
    def go_one_round(self) -> None:
        self.engine.round()

    @invariant()
    def nobody_ended_twice_or_wrongly(self) -> None:
        for job, ends in self.ends.items():
            assert len(ends) <= 1
            if ends and job not in self.cancelled:
                assert as_expected(ends[0], self.expected[job])

    def teardown(self) -> None:
        self.engine.run_until_idle()
        assert all(len(ends) == 1 for ends in self.ends.values())
        self.nobody_ended_twice_or_wrongly()
        assert not self.running
        assert not self.engine.round()
        self.engine.close()
        self.helpers.shutdown()


def as_expected(end: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return isinstance(end, torch.Tensor) and torch.equal(end, expected)
    return end is expected or isinstance(end, expected)


TestJobs = Jobs.TestCase
TestJobs.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.fixture
def denoiser() -> Denoiser:
    return Denoiser(0.5)


def engine_of(*denoisers: Denoiser, **options: Any) -> Engine:
    engine = Engine(**options)
    for denoiser in denoisers:
        engine.adopt(denoiser, "forward", LAYOUT)
    return engine


def step_task(denoiser: Denoiser, job: Any, steps: int, **options: Any) -> Task:
    return Task(job, lambda: denoised(denoiser, 0, 1, steps, 0.0), **options)


def test_jobs_share_forwards_and_one_that_joins_later_shares_the_rest(denoiser: Denoiser) -> None:
    engine = engine_of(denoiser)
    engine.submit(step_task(denoiser, 1, 4))
    engine.submit(step_task(denoiser, 2, 4))
    engine.round()
    engine.submit(step_task(denoiser, 3, 2))
    engine.run_until_idle()
    assert denoiser.rows == [2, 3, 3, 2]


def test_a_job_that_keeps_the_thread_waiting_goes_on_last(
    denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, turns = [0.0], list[str]()
    monkeypatch.setattr("gpu_worker.engine.time.perf_counter", lambda: clock[0])

    def body(name: str, stall_seconds: float) -> None:
        for _ in range(3):
            denoiser(torch.zeros(1, 2), 0)
            turns.append(name)
            clock[0] += stall_seconds

    engine = engine_of(denoiser)
    engine.submit(Task(1, lambda: body("stalls", 0.03)))
    engine.submit(Task(2, lambda: body("quick", 0.001)))
    engine.run_until_idle()
    assert turns == ["stalls", "quick", "quick", "stalls", "quick", "stalls"]
    assert denoiser.rows == [2, 2, 2]


def test_a_task_knows_how_many_pictures_shared_its_forwards(denoiser: Denoiser) -> None:
    engine = engine_of(denoiser)
    tasks = [step_task(denoiser, 1, 4), step_task(denoiser, 2, 2)]
    for task in tasks:
        engine.submit(task)
    engine.run_until_idle()
    assert [(task.forwards, task.company) for task in tasks] == [(4, 2 + 2 + 1 + 1), (2, 2 + 2)]


def test_a_deterministic_job_shares_no_forward(denoiser: Denoiser) -> None:
    engine = engine_of(denoiser)
    for job in range(3):
        engine.submit(step_task(denoiser, job, 2, deterministic=job == 0))
    engine.run_until_idle()
    assert sorted(denoiser.rows) == [1, 1, 2, 2]


def test_forwards_are_padded_to_the_buckets_that_a_compiler_asks_for(denoiser: Denoiser) -> None:
    engine = engine_of(denoiser, forwards=Forwards(Limits(buckets=(1, 2, 4))))
    results: list[Any] = []
    for job in range(3):
        engine.submit(step_task(denoiser, job, 2, finished=results.append))
    engine.run_until_idle()
    assert denoiser.rows == [4, 4]
    expected = denoised(Denoiser(0.5), 0, 1, 2, 0.0)
    assert all(torch.equal(result, expected) for result in results)


def test_an_urgent_job_takes_the_next_forward() -> None:
    slow, fast = Denoiser(0.5), Denoiser(0.25)
    engine = engine_of(slow, fast, max_running=1)
    engine.submit(step_task(slow, 1, 10))
    engine.round()
    engine.submit(step_task(fast, 2, 3, priority=1))
    for _ in range(3):
        engine.round()
    assert (len(slow.rows), len(fast.rows)) == (1, 3)


def test_two_models_take_turns() -> None:
    one, other = Denoiser(0.5), Denoiser(0.25)
    engine = engine_of(one, other)
    for denoiser in (one, one, one, other):
        engine.submit(step_task(denoiser, object(), 6))
    for _ in range(6):
        engine.round()
    assert (len(one.rows), len(other.rows)) == (3, 3)


def test_a_stream_of_urgent_jobs_does_not_starve_a_job_that_runs() -> None:
    one, other = Denoiser(0.5), Denoiser(0.25)
    engine = engine_of(one, other)
    engine.submit(step_task(other, "patient", 3))
    rounds = 0
    while len(other.rows) < 3 and rounds < 500:
        if rounds % 4 == 0:
            engine.submit(step_task(one, rounds, 4, priority=5))
        engine.round()
        rounds += 1
    assert rounds <= 3 * (PATIENCE + 1)


def test_a_stream_of_urgent_jobs_does_not_starve_a_job_that_waits(denoiser: Denoiser) -> None:
    engine = engine_of(denoiser, max_running=1)
    ends: list[Any] = []
    engine.submit(step_task(denoiser, "first", 1, priority=5))
    engine.submit(step_task(denoiser, "patient", 1, finished=ends.append))
    for number in range(2 * PATIENCE):
        engine.submit(step_task(denoiser, number, 1, priority=5))
        engine.round()
    assert ends


def test_an_exhausted_memory_splits_the_batch_and_says_so(denoiser: Denoiser) -> None:
    engine = engine_of(denoiser)
    tasks = [
        Task(job, lambda: denoised(denoiser, 0, 5, 1, 0.0), failed=pytest.fail) for job in range(2)
    ]
    for task in tasks:
        engine.submit(task)
    engine.run_until_idle()
    assert denoiser.rows == [5, 5]
    assert [task.memory_fallback for task in tasks] == ["split_batch", "split_batch"]


def test_a_call_too_large_for_the_memory_is_run_in_parts(denoiser: Denoiser) -> None:
    engine = engine_of(denoiser)
    ends: list[Any] = []
    engine.submit(Task(1, lambda: denoised(denoiser, 0, 12, 1, 0.0), finished=ends.append))
    engine.run_until_idle()
    assert denoiser.rows == [6, 6]
    assert ends[0].shape == (12, 3)


def test_idle_models_are_evicted_before_a_batch_is_split(denoiser: Denoiser) -> None:
    evicted = []

    def evict() -> bool:
        evicted.append(len(denoiser.rows))
        return len(evicted) == 1

    engine = engine_of(denoiser, forwards=Forwards(evict=evict))
    ends: list[Any] = []
    engine.submit(Task(1, lambda: denoised(denoiser, 0, 8, 1, 0.0), finished=ends.append))
    engine.run_until_idle()
    assert len(evicted) == 2
    assert ends


class TilingDecoder(torch.nn.Module):
    """Has not the memory for a whole picture, as a VAE may have not."""

    def __init__(self) -> None:
        super().__init__()
        self.use_tiling = False
        self.tiled: list[bool] = []

    def enable_tiling(self) -> None:
        self.use_tiling = True

    def disable_tiling(self) -> None:
        self.use_tiling = False

    def decode(self, sample: torch.Tensor) -> torch.Tensor:
        self.tiled.append(self.use_tiling)
        if not self.use_tiling:
            raise torch.OutOfMemoryError("out of memory")
        return sample * 2


def test_a_picture_too_large_for_the_memory_is_decoded_in_tiles() -> None:
    decoder, engine, ends = TilingDecoder(), Engine(), []
    engine.adopt(decoder, "decode", Layout("sample"))
    task = Task(1, lambda: decoder.decode(torch.ones(1, 3)), finished=ends.append)
    engine.submit(task)
    engine.run_until_idle()
    assert torch.equal(ends[0], torch.full((1, 3), 2.0))
    assert decoder.tiled == [False, True]
    assert task.memory_fallback == "tiling"
    assert not decoder.use_tiling


def test_a_row_that_finds_no_memory_is_tried_once_more(denoiser: Denoiser) -> None:
    failures = [torch.OutOfMemoryError("out of memory")]

    def execute(target: Any, args: Any, kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return target.run(*args, **kwargs)

    engine = engine_of(denoiser, forwards=Forwards(execute=execute))
    task = step_task(denoiser, 1, 2, failed=pytest.fail)
    engine.submit(task)
    engine.run_until_idle()
    assert denoiser.rows == [1, 1]
    assert task.memory_fallback == "retried"


def test_a_broken_device_is_not_asked_again(denoiser: Denoiser) -> None:
    asked = []

    def broken(target: Target, args: Any, kwargs: Any) -> Any:
        asked.append(target)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine = engine_of(denoiser, forwards=Forwards(execute=broken))
    errors: list[Any] = []
    for job in range(3):
        engine.submit(step_task(denoiser, job, 1, failed=errors.append))
    engine.run_until_idle()
    assert len(asked) == 1
    assert len(errors) == 3


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
