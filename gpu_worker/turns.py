"""Whose turn it is: which job begins next and which parked calls run next. Pure decisions.

Higher priority goes first, then whoever has waited longest. Being passed over is
counted, and past PATIENCE it outranks every priority, so nobody waits for ever.

Calls that lead up to a denoiser's, such as a ControlNet's, go before other calls of
their priority: so their jobs come into the denoiser's next batch, where jobs that are
out of step would otherwise never meet.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol, TypeVar

PATIENCE = 32


class Waiting(Protocol):
    """`order` counts up; `passed_over` counts how often others went first."""

    @property
    def priority(self) -> int: ...
    @property
    def order(self) -> int: ...
    @property
    def passed_over(self) -> int: ...


class WaitingCall(Waiting, Protocol):
    @property
    def key(self) -> Hashable: ...
    @property
    def rows(self) -> int: ...
    @property
    def leads(self) -> bool: ...


class WaitingTask(Waiting, Protocol):
    @property
    def alone(self) -> bool: ...
    @property
    def claims(self) -> Mapping[Hashable, Hashable]: ...


CallType = TypeVar("CallType", bound=WaitingCall)
TaskType = TypeVar("TaskType", bound=WaitingTask)


def rank(waiting: Waiting) -> tuple[int, int]:
    """Sorts who goes first to the front."""
    overdue = waiting.passed_over >= PATIENCE
    return (-(2**31) if overdue else -waiting.priority, waiting.order)


def rank_of_call(call: WaitingCall) -> tuple[int, bool, int]:
    level, order = rank(call)
    return (level, call.passed_over < PATIENCE and not call.leads, order)


def choose_calls(parked: Sequence[CallType], max_rows: Callable[[CallType], int]) -> list[CallType]:
    """The call whose turn it is and the calls that can merge with it, best first.

    Their rows stay within `max_rows` of the first call, which runs whatever its size.
    """
    if not parked:
        return []
    first = min(parked, key=rank_of_call)
    room = max_rows(first) - first.rows
    chosen = [first]
    for call in sorted((call for call in parked if call.key == first.key), key=rank_of_call):
        if call is not first and call.rows <= room:
            chosen.append(call)
            room -= call.rows
    return chosen


def choose_task(
    waiting: Sequence[TaskType], running: Sequence[TaskType], max_running: int
) -> TaskType | None:
    """The task that begins next, or None while all must wait.

    A task that conflicts with a running one may be overtaken by those behind it,
    until it is overdue. Running tasks of lower priority take no place away.
    """
    for task in sorted(waiting, key=rank):
        level = [other for other in running if other.priority >= task.priority]
        if running and len(level) >= max_running:
            return None
        if not any(conflict(task, other) for other in running):
            return task
        if task.passed_over >= PATIENCE:
            return None
    return None


def conflict(one: WaitingTask, other: WaitingTask) -> bool:
    """Whether two tasks cannot run at the same time: one runs alone, or both
    claim a resource in different states, such as a slot with different weights."""
    if one.alone or other.alone:
        return True
    return any(other.claims.get(name, state) != state for name, state in one.claims.items())
