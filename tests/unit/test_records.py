"""Records: results are kept for a while, and an idempotency key stands for one request."""

from collections.abc import Callable

import msgspec
import pytest

from ipc import messages
from supervisor.errors import Problem
from supervisor.jobs import Job, Outcome
from supervisor.preparation import Prepared
from supervisor.records import Record, Records
from supervisor.requests import GenerateBody
from tests.tools.clock import Clock

RETENTION_SECONDS = 600.0


@pytest.fixture
def records(clock: Clock) -> Records:
    return Records(RETENTION_SECONDS, clock)


def record(id: str) -> Record:
    message = messages.Generate(
        job=id, pipeline="P", checkpoint=messages.Model(name="c", path="/c"), calls=[]
    )
    prepared = Prepared(message=message, inputs={}, seeds=[])
    return Record(Job(id, message, 0.0, 60.0), GenerateBody(), prepared, id, 0.0)


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(Problem) as raised:
        call()
    return raised.value.code


def test_a_job_that_runs_is_never_forgotten(records: Records, clock: Clock) -> None:
    running = record("a")
    records.add(running)
    clock.now = 10 * RETENTION_SECONDS
    assert records.find("a") is running


def test_a_result_is_kept_then_forgotten_then_unknown(records: Records, clock: Clock) -> None:
    ended = record("a")
    records.add(ended)
    ended.end(clock.now, answer=b"{}")
    clock.now = RETENTION_SECONDS - 1
    assert records.find("a").result() == b"{}"
    clock.now = RETENTION_SECONDS
    assert code_of(lambda: records.find("a")) == "forgotten"
    clock.now = 3 * RETENTION_SECONDS
    assert code_of(lambda: records.find("a")) == "not_found"


def test_what_was_answered_to_whoever_waited_is_forgotten_at_once(records: Records) -> None:
    ended = record("a")
    records.add(ended)
    ended.end(0.0, answer=b"{}")
    records.drop("a")
    records.drop("a")
    assert code_of(lambda: records.find("a")) == "forgotten"
    records.drop("b")
    assert code_of(lambda: records.find("b")) == "not_found"


def test_of_an_answered_job_only_the_answer_is_kept() -> None:
    held = record("a")
    message = msgspec.structs.replace(held.job.message, images={"image": [b"given"]})
    held.job.message = message
    held.prepared = msgspec.structs.replace(held.prepared, message=message, inputs={"image": "b"})
    held.body = GenerateBody(parameters={"image": "given"})
    held.job.pictures[0] = messages.Picture(job="a", index=0, data=b"made")
    held.job.outcome = Outcome(pictures=[held.job.pictures[0]])
    held.end(0.0, answer=b"{}")
    held.let_go()
    assert held.result() == b"{}"
    for each in (held.body, held.prepared, held.job.message, held.job.outcome, held.job.pictures):
        assert "given" not in repr(each)
        assert "made" not in repr(each)
    assert held.prepared.inputs == {}


def test_a_record_that_ended_badly_raises_what_it_ended_with() -> None:
    ended = record("a")
    ended.end(0.0, problem=Problem("poison", "cannot"))
    assert code_of(ended.result) == "poison"


def test_a_key_answers_the_same_request_with_the_same_record(records: Records) -> None:
    claim = records.claim("caller", "k", b"body")
    assert claim.record is None
    assert code_of(lambda: records.claim("caller", "k", b"body")) == "key_in_use"
    claim.record = record("a")
    records.add(claim.record)
    assert code_of(lambda: records.claim("caller", "k", b"body")) == "key_in_use"
    claim.record.end(0.0, answer=b"{}")
    assert records.claim("caller", "k", b"body").record is claim.record
    assert code_of(lambda: records.claim("caller", "k", b"other")) == "key_reused"


def test_keys_of_different_callers_are_different_keys(records: Records) -> None:
    records.claim("one", "k", b"body")
    assert records.claim("two", "k", b"other").record is None


def test_a_key_is_free_again_when_its_request_was_refused(records: Records) -> None:
    records.claim("caller", "k", b"body")
    records.unclaim("caller", "k")
    assert records.claim("caller", "k", b"other").record is None


def test_a_key_is_kept_as_long_as_its_job(records: Records, clock: Clock) -> None:
    claim = records.claim("caller", "k", b"body")
    claim.record = record("a")
    records.add(claim.record)
    claim.record.end(clock.now, answer=b"{}")
    clock.now = RETENTION_SECONDS
    assert records.claim("caller", "k", b"other").record is None


def test_what_is_behind_a_job_that_runs_is_forgotten_in_its_time(
    records: Records, clock: Clock
) -> None:
    running, ended = record("running"), record("ended")
    records.claim("caller", "of the running one", b"body").record = running
    claim = records.claim("caller", "k", b"body")
    claim.record = ended
    for each in (running, ended):
        records.add(each)
    ended.end(clock.now, answer=b"{}")
    clock.now = RETENTION_SECONDS
    assert code_of(lambda: records.find("ended")) == "forgotten"
    assert records.find("running") is running
    assert len(records._claims) == 1
    assert records.claim("caller", "k", b"other").record is None


def test_a_job_that_was_long_prepared_is_kept_and_forgotten_like_any_other(
    records: Records, clock: Clock
) -> None:
    """Its request came before those that stand in front of it."""
    quick, long_prepared = record("quick"), record("long")
    quick.accepted_at = clock.now = 300.0
    for each in (quick, long_prepared):
        records.add(each)
        each.end(clock.now, answer=b"{}")
    clock.now = 300.0 + RETENTION_SECONDS - 1
    assert records.find("long") is long_prepared
    quick.accepted_at = 1e9  # it stays in front
    clock.now += 1
    assert code_of(lambda: records.find("long")) == "forgotten"


def test_looking_for_what_to_forget_does_not_take_longer_with_more_records(
    records: Records, clock: Clock
) -> None:
    looked_at = 0

    class Counted(Record):
        @property
        def ended_at(self) -> float | None:
            nonlocal looked_at
            looked_at += 1
            return None

        @ended_at.setter
        def ended_at(self, value: float | None) -> None: ...

    for number in range(1000):
        one = record(str(number))
        records.add(Counted(one.job, one.body, one.prepared, one.batch_id, clock.now))
    assert looked_at <= 1000
