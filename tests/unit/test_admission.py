"""Which jobs are refused, with what, and when to come again."""

from typing import Any

import pytest

from supervisor.admission import Situation, refusal, whole_seconds


@pytest.mark.parametrize(
    ("situation", "code", "retry_after"),
    [
        ({}, None, None),
        ({"draining": True, "drain_seconds": 29.5}, "draining", 30),
        ({"is_poison": True}, "poison", None),
        ({"has_worker": False}, "unavailable", 30),
        ({"queued": 63, "max_queue": 64}, None, None),
        ({"queued": 64, "max_queue": 64, "place_seconds": 3.2}, "queue_full", 4),
        ({"expected_seconds": 5, "left_seconds": 5}, None, None),
        ({"expected_seconds": 9.1, "left_seconds": 5}, "too_late", 5),
        ({"expected_seconds": None, "left_seconds": 0.1}, None, None),
        ({"expected_seconds": 1, "left_seconds": -1}, "too_late", 2),
    ],
)
def test_a_job_is_refused_for_the_first_thing_in_its_way(
    situation: dict[str, Any], code: str | None, retry_after: int | None
) -> None:
    problem = refusal(Situation(**situation))
    assert (problem.code if problem else None) == code
    assert (problem.retry_after if problem else None) == retry_after


def test_a_refusal_says_what_the_limit_is() -> None:
    full = refusal(Situation(queued=64, max_queue=64))
    late = refusal(Situation(expected_seconds=9.12, left_seconds=5))
    assert full is not None
    assert full.detail == "cannot accept the job: the queue is full (64 of 64)"
    assert late is not None
    assert late.detail == "cannot finish within 5 s: about 9.12 s are needed"
    assert late.field == "timeout_seconds"


def test_retry_after_is_at_least_a_second() -> None:
    assert [whole_seconds(seconds) for seconds in (0, 0.1, 1.1)] == [1, 1, 2]
