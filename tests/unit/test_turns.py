from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.turns import PATIENCE, choose_calls, choose_task, rank_of_call


@dataclass
class Call:
    key: str = "a"
    rows: int = 2
    priority: int = 0
    order: int = 0
    passed_over: int = 0
    leads: bool = False


@dataclass
class Task:
    priority: int = 0
    order: int = 0
    passed_over: int = 0
    alone: bool = False
    claims: dict[Any, Any] = field(default_factory=dict)


def at_most(rows: int) -> Any:
    return lambda _: rows


def test_nothing_is_chosen_from_nothing() -> None:
    assert choose_calls([], at_most(8)) == []
    assert choose_task([], [], 4) is None


def test_the_call_that_has_waited_longest_goes_first_with_all_that_merge_with_it() -> None:
    old, other, young = Call(order=1), Call("b", order=2), Call(order=3)
    assert choose_calls([young, other, old], at_most(8)) == [old, young]


def test_priority_outranks_waiting() -> None:
    old, urgent = Call("a", order=1), Call("b", order=2, priority=1)
    assert choose_calls([old, urgent], at_most(8)) == [urgent]


def test_a_call_that_leads_up_to_another_goes_before_older_ones_of_its_priority() -> None:
    old, leading = Call("a", order=1), Call("b", order=2, leads=True)
    assert choose_calls([old, leading], at_most(8)) == [leading]
    old.priority = 1
    assert choose_calls([old, leading], at_most(8)) == [old]


def test_a_call_passed_over_often_enough_outranks_every_priority() -> None:
    forgotten = Call("a", order=1, priority=-100, passed_over=PATIENCE)
    urgent = Call("b", order=2, priority=100)
    assert choose_calls([urgent, forgotten], at_most(8)) == [forgotten]


def test_a_call_larger_than_the_room_runs_by_itself() -> None:
    large, small = Call(rows=9, order=1), Call(order=2)
    assert choose_calls([large, small], at_most(8)) == [large]


def test_a_small_call_fills_the_room_that_a_larger_one_does_not_fit() -> None:
    first, large, small = Call(rows=4, order=1), Call(rows=6, order=2), Call(rows=1, order=3)
    assert choose_calls([first, large, small], at_most(8)) == [first, small]


calls = st.lists(
    st.builds(
        Call,
        key=st.sampled_from("ab"),
        rows=st.integers(1, 5),
        priority=st.integers(-2, 2),
        order=st.integers(),
        passed_over=st.integers(0, 2 * PATIENCE),
        leads=st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


@given(calls, st.integers(1, 12))
def test_what_is_chosen_merges_fits_and_holds_the_first_in_rank(
    parked: list[Call], rows: int
) -> None:
    chosen = choose_calls(parked, at_most(rows))
    assert rank_of_call(chosen[0]) == min(rank_of_call(call) for call in parked)
    assert len({call.key for call in chosen}) == 1
    assert len(chosen) == 1 or sum(call.rows for call in chosen) <= rows
    assert len({id(call) for call in chosen}) == len(chosen)


def test_a_task_waits_while_as_many_of_its_rank_run_as_may() -> None:
    running = [Task(order=1), Task(order=2)]
    assert choose_task([Task(order=3)], running, 2) is None
    assert choose_task([task := Task(order=3)], running, 3) is task


def test_an_urgent_task_begins_though_the_places_are_taken() -> None:
    urgent = Task(order=3, priority=1)
    assert choose_task([urgent], [Task(), Task()], 2) is urgent


def test_a_task_that_runs_alone_waits_for_the_running_ones_and_holds_up_the_next() -> None:
    alone = Task(order=1, alone=True)
    assert choose_task([alone], [Task()], 4) is None
    assert choose_task([alone], [], 4) is alone
    assert choose_task([Task(order=2)], [alone], 4) is None


def test_a_task_in_conflict_is_overtaken_only_until_it_is_overdue() -> None:
    waiting = Task(order=1, claims={"slot": "fox"})
    running = [Task(claims={"slot": "hare"})]
    follower = Task(order=2, claims={"slot": "hare"})
    assert choose_task([waiting, follower], running, 4) is follower
    waiting.passed_over = PATIENCE
    assert choose_task([waiting, follower], running, 4) is None


def test_tasks_that_agree_on_their_claims_run_together() -> None:
    one = Task(claims={"slot": "fox", "vae": 1})
    other = Task(claims={"slot": "fox"})
    assert choose_task([one], [other], 4) is one
