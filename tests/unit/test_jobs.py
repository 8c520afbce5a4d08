"""A job's life, the queue's order, and what a job is expected to take."""

import pytest

from ipc import messages as m
from supervisor.estimates import GUESSED_STEP_SECONDS, GUESSED_SWAP_SECONDS, Estimates
from supervisor.jobs import (
    UNFOLLOWED_SECONDS,
    Change,
    Ended,
    Job,
    Loading,
    Outcome,
    Preview,
    Progress,
    in_order,
    overdue,
)
from supervisor.states import ImpossibleTransition, JobEvent, JobState
from tests.tools.fleets import generate, job, model, picture


def ids(jobs: list[Job]) -> list[str]:
    return [each.id for each in jobs]


def test_older_jobs_come_first() -> None:
    assert ids(in_order([job("b", now=2), job("a", now=1)], [], {}, 3)) == ["a", "b"]


def test_higher_priority_comes_first() -> None:
    assert ids(in_order([job("low"), job("high", priority=5)], [], {}, 0)) == ["high", "low"]


def test_waiting_counts_as_priority() -> None:
    old, young = job("old", now=0), job("young", now=11, priority=5)
    assert ids(in_order([young, old], [], {}, 11)) == ["old", "young"]
    young = job("young", now=9, priority=5)
    assert ids(in_order([young, old], [], {}, 11)) == ["young", "old"]


def test_callers_take_turns_however_many_jobs_one_of_them_brings() -> None:
    flood = [job(f"a{index}", now=index, caller="a") for index in range(3)]
    late = [job("b0", now=90, caller="b"), job("c0", now=95, caller="c")]
    assert ids(in_order([*flood, *late], [], {}, 100)) == ["a0", "b0", "c0", "a1", "a2"]


def test_what_a_caller_has_running_counts_as_a_turn() -> None:
    queued = [job("a1", now=0, caller="a"), job("b0", now=5, caller="b")]
    assert ids(in_order(queued, [job("a0", caller="a")], {}, 9)) == ["b0", "a1"]


def test_whoever_was_served_last_comes_last() -> None:
    queued = [job("a0", now=0, caller="a"), job("b0", now=5, caller="b")]
    assert ids(in_order(queued, [], {"a": 9.0}, 9)) == ["b0", "a0"]
    assert ids(in_order(queued, [], {"a": 4.0}, 9)) == ["a0", "b0"]
    assert ids(in_order(queued, [], {"a": 9.0, "b": 10.0}, 10)) == ["a0", "b0"]


def test_a_callers_priorities_order_its_own_jobs_only() -> None:
    pushy = [job("a0", caller="a"), job("a1", caller="a", priority=100)]
    assert ids(in_order([*pushy, job("b0", now=1, caller="b")], [], {}, 1)) == ["a1", "b0", "a0"]


def test_a_job_is_overdue_from_its_deadline_on() -> None:
    jobs = [job("a", deadline=5), job("b", deadline=6)]
    assert ids(overdue(jobs, 5)) == ["a"]


def started(**changes: object) -> tuple[Job, list[Change]]:
    one, changed = job(**changes), []  # type: ignore[arg-type, var-annotated]
    one.watchers.append(changed.append)
    one.dispatched(3, 1.0, swaps=True)
    return one, changed


def progress(phase: m.Phase, step: int = 0, steps: int = 0) -> m.Progress:
    return m.Progress(job="job", phase=phase, step=step, steps=steps)


def test_a_running_job_tells_its_watchers_how_it_gets_on() -> None:
    one, changed = started()
    one.moved(progress("loading", 1, 4), 2.0)
    one.moved(progress("loading"), 2.5)
    one.moved(progress("denoising", 5, 10), 3.0)
    one.moved(m.Preview(job="job", index=0, data=b"p"), 4.0)
    assert changed == [Loading("cat", 0.25), Loading("cat", 0.0), Progress(5, 10, 0.5),
                       Preview(b"p")]  # fmt: skip
    assert (one.phase, one.step, one.steps, one.moved_at) == ("denoising", 5, 10, 4.0)


def test_a_job_of_no_steps_has_made_no_progress() -> None:
    one, changed = started()
    one.moved(progress("encoding"), 2.0)
    assert changed == [Progress(0, 0, 0.0)]


def test_a_picture_that_was_not_asked_for_is_impossible() -> None:
    one, _ = started(calls=2)
    one.moved(picture("job", 1), 2.0)
    for index in (-1, 2):
        with pytest.raises(ImpossibleTransition, match=f"cannot have picture {index}"):
            one.moved(picture("job", index), 2.0)


def test_after_a_death_a_job_starts_anew_and_alone_with_the_same_seeds() -> None:
    one, _ = started()
    one.moved(progress("denoising", 5, 10), 2.0)
    one.moved(picture("job"), 2.0)
    one.worker_lost(from_outside=True)
    assert (one.state, one.phase, one.step, one.pictures) == (JobState.QUEUED, None, 0, {})
    assert (one.deaths, one.killed_from_outside, one.left_worker, one.worker) == (1, 1, 3, None)
    assert one.outgoing(0.25) == m.Generate(
        job="job",
        pipeline="StableDiffusionPipeline",
        checkpoint=model(),
        calls=generate("job").calls,
        parameters=generate("job").parameters,
        alone=True,
    )
    one.dispatched(1, 9.0, swaps=False)
    assert (one.attempts, one.started_at) == (2, 1.0)


def test_an_ended_job_tells_nothing_but_its_end() -> None:
    one, changed = started()
    one.ended(JobEvent.CANCELLED, Outcome())
    one.moved(progress("denoising", 1, 10), 2.0)
    assert changed == [Ended()]
    assert one.has_ended


def test_an_answered_job_lets_go_of_its_pictures() -> None:
    one, _ = started(images={"image": [b"given"]})
    one.moved(picture("job"), 2.0)
    one.ended(*one.outcome_of(m.Finished(job="job")))
    assert one.outcome is not None
    assert len(one.outcome.pictures) == 1
    one.let_go()
    assert one.message == generate("job")
    assert (one.pictures, one.outcome.pictures) == ({}, [])


@pytest.mark.parametrize("event", [JobEvent.CANCELLED, JobEvent.EXPIRED])
def test_a_job_that_was_given_up_keeps_what_it_was_given_and_takes_no_picture(
    event: JobEvent,
) -> None:
    one, _ = started(images={"image": [b"given"]})
    one.moved(picture("job"), 2.0)
    one.ended(event, Outcome())
    one.let_go()
    one.moved(picture("job"), 3.0)
    assert one.message == generate("job", images={"image": [b"given"]})
    assert one.pictures == {}


def test_a_job_that_makes_no_picture_has_none_to_let_go_of() -> None:
    load = Job("load", m.Load(job="load", checkpoint=model()), 0, 9)
    load.let_go()
    assert load.message == m.Load(job="load", checkpoint=model())


@pytest.mark.parametrize(
    ("answer", "event", "code"),
    [
        (m.Finished(job="job"), JobEvent.FAILED, "generation_failed"),
        (m.Rejected(job="job", code="invalid_request", detail="d"), JobEvent.FAILED,
         "invalid_request"),
        (m.Failed(job="job", code="out_of_memory", detail="d"), JobEvent.FAILED, "out_of_memory"),
        (m.Cancelled(job="job"), JobEvent.FAILED, "cancelled"),
    ],
)  # fmt: skip
def test_an_answer_without_all_pictures_is_a_problem(
    answer: m.Finished | m.Rejected | m.Failed | m.Cancelled, event: JobEvent, code: str
) -> None:
    one, _ = started()
    happened, outcome = one.outcome_of(answer)
    assert outcome.problem is not None
    assert (happened, outcome.problem.code) == (event, code)


def test_pictures_come_out_in_order() -> None:
    one, _ = started(calls=2)
    one.moved(picture("job", 1), 2.0)
    one.moved(picture("job", 0), 2.0)
    event, outcome = one.outcome_of(m.Finished(job="job"))
    assert event is JobEvent.FINISHED
    assert [each.index for each in outcome.pictures] == [0, 1]


def measured() -> Estimates:
    estimates = Estimates()
    estimates.stepped(job().kind, 0.5, None)
    estimates.swaps.measured("/models/cat", 3.0)
    return estimates


def left(one: Job, now: float, rows: int = 1, loaded: bool = True) -> float:
    return one.running_seconds(measured(), rows, now, loaded=loaded)


def test_a_jobs_work_is_its_steps_over_all_pictures() -> None:
    one, _ = started(calls=2)
    assert one.work_seconds(measured()) == 20 * 0.5
    one.moved(progress("denoising", 4, 20), 2.0)
    assert one.work_seconds(measured()) == 16 * 0.5
    one.moved(progress("denoising", 30, 20), 2.0)
    assert one.work_seconds(measured()) == 0


def test_steps_that_were_not_named_are_guessed() -> None:
    assert job(parameters={}).expected_steps() == 50


def test_what_makes_no_picture_takes_no_steps() -> None:
    load = Job("load", m.Load(job="load", checkpoint=model()), 0, 9)
    assert (load.expected_steps(), load.expected_pictures, load.priority) == (0, 0, 0)
    load.dispatched(0, 0, swaps=True)
    assert load.outgoing(0.25) == load.message
    event, _ = load.outcome_of(m.Finished(job="load"))
    assert event is JobEvent.FINISHED


def test_a_swap_counts_until_it_is_over() -> None:
    one, _ = started()
    assert left(one, one.moved_at, loaded=False) == 3 + 5
    one.moved(progress("loading"), 2.0)
    assert left(one, 2.0, loaded=False) == 3 + 5
    assert left(one, 2.5, rows=4, loaded=False) == 3 + 5 - 0.5  # others' steps do not slow it down
    assert left(one, 5.5, loaded=False) == 5  # no step is done before
    assert left(one, 2.5) == 5 - 0.5
    one.moved(progress("denoising", 1, 10), 2.0)
    assert left(one, 2.0, loaded=False) == 4.5


def test_no_step_of_who_follows_a_swap_is_done_before_it_is_over() -> None:
    one = job()
    one.dispatched(3, 1.0, swaps=False)
    assert left(one, 2.0, loaded=False) == 5
    assert left(one, 2.0) == 4


@pytest.mark.parametrize(("rows", "now", "seconds"), [
    (1, 3.0, 3.5), (2, 3.75, 3.5), (5, 3.0, 4.25),  # a step of five rows takes four times
    (1, 2.0 + UNFOLLOWED_SECONDS, 0.5), (1, 99.0, 0.5),
])  # fmt: skip
def test_steps_that_nobody_told_of_follow_from_the_time(
    rows: int, now: float, seconds: float
) -> None:
    """But not for longer than a worker may be silent."""
    one, _ = started()
    one.moved(progress("denoising", 1, 10), 2.0)
    assert left(one, now, rows) == seconds


def test_a_job_that_takes_longer_than_it_should_is_about_to_be_done() -> None:
    one, _ = started()
    one.moved(progress("denoising", 9, 10), 2.0)
    assert left(one, 4.0) == 0.0
    one.moved(progress("decoding", 10, 10), 100.0)
    assert left(one, 101.0) == 0.0


def test_a_queued_job_shows_placement_what_it_needs() -> None:
    one = job(pinned_worker=1)
    view = one.view(Estimates())
    assert (view.model, view.worker, view.alone, view.avoids) == ("/models/cat", 1, False, None)
    assert view.work_seconds == 10 * GUESSED_STEP_SECONDS
    assert view.swap_seconds == GUESSED_SWAP_SECONDS


def test_pictures_of_another_size_are_another_kind_of_work() -> None:
    small, large = (job(parameters={"width": side, "height": side}) for side in (512, 1024))
    assert small.kind != large.kind
    small.take(generate("job", parameters={"width": 1024, "height": 1024}))
    assert small.kind == large.kind
    load = Job("load", m.Load(job="load", checkpoint=model()), 0, 9)
    assert load.kind == "/models/cat"


def test_a_worker_tells_every_step_of_a_job_that_may_be_looked_at() -> None:
    for followed, seconds in ((True, 0.0), (False, 0.25)):
        one = job()
        one.followed = followed
        sent = one.outgoing(0.25)
        assert isinstance(sent, m.Generate)
        assert sent.progress_seconds == seconds
