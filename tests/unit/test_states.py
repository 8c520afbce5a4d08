"""The life cycles of workers and jobs: every event in every state."""

import runpy
from collections.abc import Mapping
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from supervisor.states import (
    ENDED_JOB_STATES,
    JOB_TABLE,
    LIVE_WORKER_STATES,
    WORKER_TABLE,
    ImpossibleTransition,
    JobEvent,
    JobState,
    WorkerEvent,
    WorkerState,
    next_job_state,
    next_worker_state,
)

# Written out by hand, apart from the table: state by state, what each event leads to.
WORKERS = """
            ready_rep restart_req stop_req drained  worn_rep fatal_rep stalled protocol stop_timed exited  backoff  gave_up
starting    ready     starting    stopping -        -        stopping  killing killing  -          backing -        -
ready       -         draining    stopping -        draining stopping  killing killing  -          backing -        -
draining    -         draining    stopping stopping draining stopping  killing killing  -          backing -        -
stopping    stopping  stopping    stopping -        stopping stopping  killing killing  killing    backing -        -
killing     killing   killing     killing  -        killing  killing   killing killing  killing    backing -        -
backing_off -         backing     stopped  -        -        -         -       -        -          -       starting quarantined
quarantined -         backing     stopped  -        -        -         -       -        -          -       -        -
stopped     -         stopped     stopped  -        -        -         -       -        -          -       -        -
"""  # noqa: E501
JOBS = """
          dispatched worker_lost finished failed cancelled expired
queued    running    -           -        failed cancelled expired
running   -          queued      finished failed cancelled expired
finished  -          -           -        -      -         -
failed    -          -           -        -      -         -
cancelled -          -           -        -      -         -
expired   -          -           -        -      -         -
"""


def expectations(text: str, states: Any, events: Any) -> dict[tuple[StrEnum, StrEnum], Any]:
    def of(members: Any, word: str) -> Any:
        return None if word == "-" else next(one for one in members if one.startswith(word))

    header, *rows = text.strip().splitlines()
    columns = [of(events, word) for word in header.split()]
    return {
        (of(states, row.split()[0]), event): of(states, word)
        for row in rows
        for event, word in zip(columns, row.split()[1:], strict=True)
    }


WORKER_EXPECTATIONS = expectations(WORKERS, WorkerState, WorkerEvent)
JOB_EXPECTATIONS = expectations(JOBS, JobState, JobEvent)


def test_the_expectations_name_every_event_in_every_state() -> None:
    assert set(WORKER_EXPECTATIONS) == set(product(WorkerState, WorkerEvent))
    assert set(JOB_EXPECTATIONS) == set(product(JobState, JobEvent))


@pytest.mark.parametrize(("state", "event"), list(product(WorkerState, WorkerEvent)))
def test_a_worker_goes_where_its_table_says(state: WorkerState, event: WorkerEvent) -> None:
    expected = WORKER_EXPECTATIONS[state, event]
    if expected is None:
        with pytest.raises(ImpossibleTransition, match=f"cannot have {event} while {state}"):
            next_worker_state(state, event)
    else:
        assert next_worker_state(state, event) is expected


@pytest.mark.parametrize(("state", "event"), list(product(JobState, JobEvent)))
def test_a_job_goes_where_its_table_says(state: JobState, event: JobEvent) -> None:
    expected = JOB_EXPECTATIONS[state, event]
    if expected is None:
        with pytest.raises(ImpossibleTransition, match=f"cannot have {event} while {state}"):
            next_job_state(state, event)
    else:
        assert next_job_state(state, event) is expected


def reachable(table: Mapping[Any, Mapping[Any, Any]], start: Any) -> set[Any]:
    found, ahead = set(), [start]
    while ahead:
        state = ahead.pop()
        if state not in found:
            found.add(state)
            ahead.extend(table[state].values())
    return found


def test_every_state_can_be_reached() -> None:
    assert reachable(WORKER_TABLE, WorkerState.STARTING) == set(WorkerState)
    assert reachable(JOB_TABLE, JobState.QUEUED) == set(JobState)


def test_every_live_worker_can_exit_and_be_stopped() -> None:
    """No state of a process has it hang in there: its exit is always welcome."""
    for state in LIVE_WORKER_STATES:
        assert next_worker_state(state, WorkerEvent.EXITED) is WorkerState.BACKING_OFF
        assert WorkerState.STOPPED in reachable(WORKER_TABLE, state)


def test_a_job_that_has_ended_never_ends_again() -> None:
    assert all(not JOB_TABLE[state] for state in ENDED_JOB_STATES)


def test_the_drawn_diagrams_are_those_of_the_tables() -> None:
    script = Path(__file__).parents[2] / "scripts" / "make_states_docs"
    namespace = runpy.run_path(str(script))
    assert namespace["PAGE"].read_text() == namespace["page"]()
