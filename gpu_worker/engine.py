"""The engine: runs many unmodified pipeline calls at once and batches their modules' calls.

Each task's body runs in a greenlet. Where a pipeline calls an adopted module, the
body is parked; once all bodies are parked or done, the calls whose turn it is run
as one forward and their bodies go on. So tasks join, leave and are cancelled between
steps. All of it happens on one thread; knows nothing of messages or checkpoints.
"""

import itertools
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet

from gpu_worker.batching import Layout
from gpu_worker.forwards import Call, Forwards, Outcome
from gpu_worker.interposer import Target, interpose
from gpu_worker.turns import choose_calls, choose_task

MAX_RUNNING = 16
STALL_MEMORY = 0.95
"""A body's stall of one step counts in the next by so much: behind another's it shows no more."""

Result = TypeVar("Result")


class Withdrawn(BaseException):
    """Raised in a cancelled task's body where it is parked. No pipeline catches it."""


def _nothing(*_: Any) -> None:
    pass


@dataclass(eq=False)
class Task:
    """One picture: a body that is called once, and exactly one of three callbacks at its end.

    `deterministic` shares no forward with others; `alone` shares no time with others
    either. Tasks that claim one resource in different states never run together.
    """

    job: Hashable
    body: Callable[[], Any]
    finished: Callable[[Any], None] = _nothing
    failed: Callable[[Exception], None] = _nothing
    cancelled: Callable[[], None] = _nothing
    priority: int = 0
    deterministic: bool = False
    alone: bool = False
    claims: Mapping[Hashable, Hashable] = field(default_factory=dict)
    memory_fallback: str | None = None
    """Set by the engine: the rung of the out-of-memory ladder that was needed last."""
    forwards: int = 0
    company: int = 0
    """Set by the engine: its denoiser's forwards, and the pictures that shared them in all."""
    order: int = 0
    passed_over: int = 0


class Body(greenlet):
    """A task that has begun. While it waits it holds either a call or a future."""

    def __init__(self, task: Task) -> None:
        self._engine = getcurrent()
        super().__init__(parent=self._engine)
        self.task = task
        self.call: Call | None = None
        self.future: Future[Any] | None = None
        self.failure: Exception | None = None
        self.withdrawn = False
        self.order = 0
        self.passed_over = 0
        self.stall_seconds = 0.0
        """How long it kept the thread when it went on, at worst and lately."""

    def run(self) -> Any:
        # An exception that left a greenlet would rise in whoever resumed it.
        try:
            return self.task.body()
        except Withdrawn:
            return None
        except Exception as error:
            self.failure = error
            return None

    def park(self) -> Any:
        """Gives the thread back to the engine until the body's wish is fulfilled."""
        return self._engine.switch()

    @property
    def priority(self) -> int:
        return self.task.priority

    @property
    def key(self) -> Hashable:
        return self if self.task.deterministic or self.call is None else self.call.key

    @property
    def rows(self) -> int:
        return 0 if self.call is None else self.call.rows

    @property
    def leads(self) -> bool:
        layout = None if self.call is None else self.call.target.layout
        return layout is not None and layout.leads


class Engine:
    """All methods are called on one thread. `wake` is called on any thread when there
    is something to do again after a round that did nothing; bodies begin and go on within
    `around`, those that are thrown into unwind without."""

    def __init__(
        self,
        forwards: Forwards | None = None,
        max_running: int = MAX_RUNNING,
        wake: Callable[[], None] = _nothing,
        around: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._forwards = forwards or Forwards()
        self._max_running = max_running
        self._wake = wake
        self._around = around or nullcontext()
        self._orders = itertools.count()
        self._waiting: list[Task] = []
        self._bodies: list[Body] = []
        self._cancelled: set[Hashable] = set()

    def adopt(self, module: torch.nn.Module, method: str, layout: Layout | None = None) -> None:
        """From now on the method's calls in bodies are batched. Asked again, does nothing."""
        interpose(module, method, self._receive, layout)

    def submit(self, task: Task) -> None:
        task.order = next(self._orders)
        self._waiting.append(task)

    def cancel(self, job: Hashable) -> None:
        """The job's tasks end in the next round, wherever they are."""
        self._cancelled.add(job)

    @property
    def busy(self) -> bool:
        """Whether any task has not ended."""
        return bool(self._waiting or self._bodies)

    def round(self) -> bool:
        """Ends what is cancelled, begins what may begin, runs one forward.

        False if there was nothing to do, for now or at all.
        """
        # Gradients are off around the whole round: greenlets interleave the pipelines'
        # own no_grad blocks, whose saved state is thread-wide.
        with torch.no_grad():
            return any([self._sweep(), self._begin(), self._go_on(), self._step()])

    def run_until_idle(self) -> None:
        """Returns when every task has ended."""
        while self.busy:
            futures = [body.future for body in self._bodies if body.future is not None]
            if not self.round() and futures:
                wait(futures, return_when=FIRST_COMPLETED)

    def wait_for(self, future: Future[Result]) -> Result:
        """Called in a body: the future's result, while other bodies go on.

        A cancelled task does not wait for it. Outside of a body, just waits.
        """
        body = getcurrent()
        if not isinstance(body, Body):
            return future.result()
        body.future = future
        future.add_done_callback(lambda _: self._wake())
        body.park()
        body.future = None
        return future.result()

    def close(self) -> None:
        """Cancels everything."""
        for job in {task.job for task in self._tasks()}:
            self.cancel(job)
        with torch.no_grad():
            self._sweep()

    def _tasks(self) -> list[Task]:
        return [*self._waiting, *(body.task for body in self._bodies)]

    def _receive(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an adopted method does: inside a body it parks, elsewhere it just runs."""
        body = getcurrent()
        if not isinstance(body, Body):
            return target.run(*args, **kwargs)
        body.call = Call.of(target, args, kwargs, plain=body.task.deterministic)
        body.order, body.passed_over = next(self._orders), 0
        return body.park()

    def _sweep(self) -> bool:
        gone, self._cancelled = self._cancelled, set()
        if not gone:
            return False
        waiting = [task for task in self._waiting if task.job in gone]
        self._waiting = [task for task in self._waiting if task.job not in gone]
        for task in waiting:
            task.cancelled()
        bodies = [body for body in self._bodies if body.task.job in gone]
        for body in bodies:
            self._withdraw(body)
        return bool(waiting or bodies)

    def _withdraw(self, body: Body) -> None:
        body.withdrawn = True
        # A body may call its modules while it unwinds; it is not let.
        while not body.dead:
            body.call = body.future = None
            body.throw(Withdrawn())
        self._settle(body, None)

    def _begin(self) -> bool:
        begun = False
        while task := self._next_task():
            self._waiting.remove(task)
            for other in self._waiting:
                other.passed_over += other.order < task.order
            body = Body(task)
            self._bodies.append(body)
            self._run(body)
            begun = True
        return begun

    def _next_task(self) -> Task | None:
        running = [body.task for body in self._bodies]
        return choose_task(self._waiting, running, self._max_running)

    def _go_on(self) -> bool:
        """Resumes the bodies whose future is done."""
        ready = [b for b in self._bodies if b.future is not None and b.future.done()]
        for body in ready:
            self._run(body)
        return bool(ready)

    def _step(self) -> bool:
        """Runs the forward whose turn it is and resumes its bodies."""
        parked = [body for body in self._bodies if body.call is not None]
        chosen = choose_calls(parked, self._max_rows)
        for body in parked:
            body.passed_over += body not in chosen
        calls = [body.call for body in chosen if body.call is not None]
        outcomes = self._forwards.run(calls) if calls else []
        # Some bodies wait for the device (UniPC's step solves equations there and looks whether
        # it could). They go on last: the others' work is done while the forward still runs.
        pairs = sorted(zip(chosen, outcomes, strict=True), key=lambda pair: pair[0].stall_seconds)
        for body, outcome in pairs:
            self._count(body, len(calls))
            began = time.perf_counter()
            self._resume(body, outcome)
            stalled = time.perf_counter() - began
            body.stall_seconds = max(stalled, STALL_MEMORY * body.stall_seconds)
        return bool(chosen)

    def _max_rows(self, body: Body) -> int:
        return 0 if body.call is None else self._forwards.max_rows(body.call)

    def _count(self, body: Body, company: int) -> None:
        if body.call is not None and body.call.target.is_denoiser:
            body.task.forwards += 1
            body.task.company += company

    def _resume(self, body: Body, outcome: Outcome) -> None:
        body.call = None
        body.task.memory_fallback = outcome.memory_fallback or body.task.memory_fallback
        if outcome.error is not None:
            self._settle(body, body.throw(outcome.error))
        else:
            self._run(body, outcome.value)

    def _run(self, body: Body, *value: Any) -> None:
        """Has a body begin, or go on with what it waited for, until it parks or ends."""
        with self._around:
            result = body.switch(*value)
        self._settle(body, result)

    def _settle(self, body: Body, result: Any) -> None:
        """After a body gave the thread back: does nothing if it is parked, else ends its task."""
        if not body.dead:
            return
        self._bodies.remove(body)
        if not self._bodies:
            self._forwards.limits.forget_refusals()
        # The error's frames hold the body: one reference less, and no cycle keeps its tensors.
        failure, body.failure = body.failure, None
        if body.withdrawn:
            body.task.cancelled()
        elif failure is not None:
            body.task.failed(failure)
        else:
            body.task.finished(result)
