"""Who shares a forward, who comes first, and what happens when the memory is exhausted."""

from typing import Any

import pytest
import torch

from gpu_worker.batching import Layout
from gpu_worker.engine import Engine, Task
from gpu_worker.forwards import Forwards
from gpu_worker.interposer import Target
from gpu_worker.limits import Limits
from gpu_worker.turns import PATIENCE
from tests.tools.engines import Denoiser, denoised, engine_of, step_task


@pytest.fixture
def denoiser() -> Denoiser:
    return Denoiser(0.5)


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


def test_bodies_alone_run_within_what_is_given_and_each_step_is_paced(
    denoiser: Denoiser,
) -> None:
    inside, happened = [False], list[tuple[str, bool]]()

    class Around:
        def __enter__(self) -> None:
            inside[0] = True

        def __exit__(self, *_: object) -> None:
            inside[0] = False

    def body() -> None:
        for _ in range(2):
            happened.append(("body", inside[0]))
            denoiser(torch.zeros(1, 2), 0)
        happened.append(("body", inside[0]))

    def execute(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        happened.append(("forward", inside[0]))
        return target.run(*args, **kwargs)

    forwards = Forwards(execute=execute, pace=lambda: happened.append(("pace", inside[0])))
    engine = engine_of(denoiser, forwards=forwards, around=Around())
    engine.submit(Task(1, body))
    engine.run_until_idle()
    step = [("body", True), ("forward", False), ("pace", False)]
    assert happened == [*step, *step, ("body", True)]


def test_what_leads_to_a_step_and_what_decodes_is_neither_paced_nor_counted() -> None:
    class Everything(torch.nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return sample

        def encode(self, sample: torch.Tensor) -> torch.Tensor:
            return sample

        def decode(self, sample: torch.Tensor) -> torch.Tensor:
            return sample

    module, happened = Everything(), list[str]()

    def execute(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        happened.append(target.method)
        return target.run(*args, **kwargs)

    def body() -> None:
        for call in (module.encode, module, module, module.decode):
            call(torch.zeros(1, 2))

    engine = Engine(Forwards(execute=execute, pace=lambda: happened.append("pace")))
    engine.adopt(module, "encode", Layout("sample", leads=True))
    engine.adopt(module, "forward", Layout("sample"))
    engine.adopt(module, "decode", Layout("sample"))
    task = Task(1, body)
    engine.submit(task)
    engine.run_until_idle()
    assert happened == ["encode", *["forward", "pace"] * 2, "decode"]
    assert (task.forwards, task.company) == (2, 2)


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
