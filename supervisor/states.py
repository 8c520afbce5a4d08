"""The life cycles of a worker and of a job, as transition tables.

An event is named for what has happened. An event that a state has no entry for
raises ImpossibleTransition: it is a defect in the caller, never in a worker.
"""

from enum import StrEnum
from typing import TypeVar


class WorkerState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    KILLING = "killing"
    BACKING_OFF = "backing_off"
    QUARANTINED = "quarantined"
    STOPPED = "stopped"


class WorkerEvent(StrEnum):
    READY_REPORTED = "ready_reported"
    RESTART_REQUESTED = "restart_requested"
    STOP_REQUESTED = "stop_requested"
    DRAINED = "drained"
    WORN_REPORTED = "worn_reported"
    FATAL_REPORTED = "fatal_reported"
    STALLED = "stalled"
    PROTOCOL_BROKEN = "protocol_broken"
    STOP_TIMED_OUT = "stop_timed_out"
    EXITED = "exited"
    BACKOFF_ELAPSED = "backoff_elapsed"
    GAVE_UP = "gave_up"


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class JobEvent(StrEnum):
    DISPATCHED = "dispatched"
    WORKER_LOST = "worker_lost"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class ImpossibleTransition(Exception):
    """An event came in a state that cannot have it."""


_W, _WE = WorkerState, WorkerEvent

# What can happen to a process that lives, whatever it is doing.
_ALIVE = {
    _WE.EXITED: _W.BACKING_OFF,
    _WE.STALLED: _W.KILLING,
    _WE.PROTOCOL_BROKEN: _W.KILLING,
    _WE.FATAL_REPORTED: _W.STOPPING,
    _WE.STOP_REQUESTED: _W.STOPPING,
}

# What may have been on its way when the end of the process was decided.
_LATE = (_WE.READY_REPORTED, _WE.RESTART_REQUESTED, _WE.WORN_REPORTED)

WORKER_TABLE: dict[WorkerState, dict[WorkerEvent, WorkerState]] = {
    _W.STARTING: {
        **_ALIVE,
        _WE.READY_REPORTED: _W.READY,
        _WE.RESTART_REQUESTED: _W.STARTING,
    },
    _W.READY: {
        **_ALIVE,
        _WE.RESTART_REQUESTED: _W.DRAINING,
        _WE.WORN_REPORTED: _W.DRAINING,
    },
    _W.DRAINING: {
        **_ALIVE,
        _WE.RESTART_REQUESTED: _W.DRAINING,
        _WE.WORN_REPORTED: _W.DRAINING,
        _WE.DRAINED: _W.STOPPING,
    },
    _W.STOPPING: {
        **_ALIVE,
        **dict.fromkeys(_LATE, _W.STOPPING),
        _WE.STOP_TIMED_OUT: _W.KILLING,
    },
    _W.KILLING: {
        **dict.fromkeys(_ALIVE, _W.KILLING),
        **dict.fromkeys(_LATE, _W.KILLING),
        _WE.STOP_TIMED_OUT: _W.KILLING,
        _WE.EXITED: _W.BACKING_OFF,
    },
    _W.BACKING_OFF: {
        _WE.BACKOFF_ELAPSED: _W.STARTING,
        _WE.RESTART_REQUESTED: _W.BACKING_OFF,
        _WE.GAVE_UP: _W.QUARANTINED,
        _WE.STOP_REQUESTED: _W.STOPPED,
    },
    _W.QUARANTINED: {
        _WE.RESTART_REQUESTED: _W.BACKING_OFF,
        _WE.STOP_REQUESTED: _W.STOPPED,
    },
    _W.STOPPED: {
        _WE.RESTART_REQUESTED: _W.STOPPED,
        _WE.STOP_REQUESTED: _W.STOPPED,
    },
}

_J, _JE = JobState, JobEvent

JOB_TABLE: dict[JobState, dict[JobEvent, JobState]] = {
    _J.QUEUED: {
        _JE.DISPATCHED: _J.RUNNING,
        _JE.FAILED: _J.FAILED,
        _JE.CANCELLED: _J.CANCELLED,
        _JE.EXPIRED: _J.EXPIRED,
    },
    _J.RUNNING: {
        _JE.WORKER_LOST: _J.QUEUED,
        _JE.FINISHED: _J.FINISHED,
        _JE.FAILED: _J.FAILED,
        _JE.CANCELLED: _J.CANCELLED,
        _JE.EXPIRED: _J.EXPIRED,
    },
    _J.FINISHED: {},
    _J.FAILED: {},
    _J.CANCELLED: {},
    _J.EXPIRED: {},
}

State = TypeVar("State", bound=StrEnum)
Event = TypeVar("Event", bound=StrEnum)


def _next(table: dict[State, dict[Event, State]], state: State, event: Event) -> State:
    if event not in table[state]:
        raise ImpossibleTransition(f"cannot have {event.value} while {state.value}")
    return table[state][event]


def next_worker_state(state: WorkerState, event: WorkerEvent) -> WorkerState:
    return _next(WORKER_TABLE, state, event)


def next_job_state(state: JobState, event: JobEvent) -> JobState:
    return _next(JOB_TABLE, state, event)


LIVE_WORKER_STATES = frozenset({_W.STARTING, _W.READY, _W.DRAINING, _W.STOPPING, _W.KILLING})
ENDED_JOB_STATES = frozenset({_J.FINISHED, _J.FAILED, _J.CANCELLED, _J.EXPIRED})
