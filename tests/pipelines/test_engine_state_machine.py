"""Random jobs, joins, cancels, failures and priorities against an engine with a toy denoiser."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gpu_worker.engine import Engine, Task
from gpu_worker.forwards import Forwards
from gpu_worker.limits import Limits
from tests.tools.engines import LAYOUT, Denoiser, denoised


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
