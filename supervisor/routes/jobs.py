"""Jobs that were accepted: how they stand, their events, and ending them."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from supervisor import answers
from supervisor.errors import Problem
from supervisor.operations import Operation, json_response, request_id_of, service_of
from supervisor.problems import problem_body
from supervisor.records import Record
from supervisor.routes.generate import event_stream
from supervisor.states import JobState


def status_of(record: Record) -> str:
    """The job's state; it counts as running until its answer is there."""
    state = record.job.state
    if state is JobState.FINISHED:
        if not record.done.is_set():
            return JobState.RUNNING.value
        return JobState.FAILED.value if record.problem else state.value
    return state.value


async def show(request: Request) -> Response:
    record = service_of(request).records.find(request.path_params["id"])
    job, problem = record.job, record.problem
    content: dict[str, Any] = {
        "id": job.id,
        "status": status_of(record),
        "position": job.position if job.state is JobState.QUEUED else None,
        "step": job.step,
        "steps": job.expected_steps(),
        "result": msgspec.Raw(record.answer) if record.answer else None,
        "error": problem_body(problem, job.request_id) if problem else None,
    }
    return json_response(content)


async def events(request: Request) -> Response:
    record = service_of(request).records.find(request.path_params["id"])
    record.detached = True  # whoever looks on does not own the job
    return event_stream(request, record)


async def delete(request: Request) -> Response:
    service = service_of(request)
    record = service.records.find(request.path_params["id"])
    if record.job.has_ended:
        raise Problem("job_ended", f"cannot cancel the job: it is {status_of(record)}")
    service.cancel(record)
    content = {"id": record.job.id, "status": status_of(record), "request_id":
               request_id_of(request)}  # fmt: skip
    return json_response(content, 202)


FOUND = ("not_found", "forgotten")
OPERATIONS = [
    Operation(method="GET", path="/jobs/{id}", endpoint=show, errors=FOUND, tag="jobs",
              summary="How a job stands", answer=answers.Job),
    Operation(method="GET", path="/jobs/{id}/events", endpoint=events, errors=FOUND, tag="jobs",
              summary="A job's events from where it is", media_type="text/event-stream"),
    Operation(method="DELETE", path="/jobs/{id}", endpoint=delete, status=202, tag="jobs",
              summary="Cancel a job", errors=(*FOUND, "job_ended"),
              answer=answers.Cancelling),
]  # fmt: skip
