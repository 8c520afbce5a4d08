"""The error catalogue: every code that a caller can meet, its HTTP status and title.

An answer's `detail` names what is wrong and what would be right. It never holds a
path outside the names that a caller may use, an address or a traceback.
"""

from typing import NamedTuple


class Kind(NamedTuple):
    status: int
    title: str


CATALOGUE: dict[str, Kind] = {
    "invalid_request": Kind(422, "The request is not valid"),
    "not_supported": Kind(422, "The request asks for what this server does not do"),
    "incompatible_model": Kind(422, "A model does not fit the others or the pipeline"),
    "invalid_model": Kind(422, "A model's files cannot be used"),
    "unknown_model": Kind(404, "There is no such model"),
    "not_found": Kind(404, "There is nothing at this address"),
    "method_not_allowed": Kind(405, "This address does not take this method"),
    "body_too_large": Kind(413, "The request's body is too large"),
    "body_timeout": Kind(408, "The request's body took too long to arrive"),
    "unsupported_media_type": Kind(415, "The request's body is not of a known type"),
    "unauthorized": Kind(401, "A valid API key is needed"),
    "queue_full": Kind(429, "The queue is full"),
    "too_late": Kind(429, "The job cannot be done within its time limit"),
    "unavailable": Kind(503, "No worker can take this job"),
    "draining": Kind(503, "The server is stopping"),
    "worker_lost": Kind(503, "The job's worker was lost twice"),
    "poison": Kind(500, "The request ends every worker that it runs on"),
    "generation_failed": Kind(500, "The pipeline failed"),
    "internal_error": Kind(500, "The server failed"),
    "out_of_memory": Kind(507, "The device's memory does not suffice"),
    "storage_full": Kind(507, "There is no room to store the pictures"),
    "deadline_exceeded": Kind(504, "The job's time limit has passed"),
    "cancelled": Kind(409, "The job was cancelled"),
    "batch_id_exists": Kind(409, "Pictures of this batch id are stored already"),
    "job_ended": Kind(409, "The job has ended already"),
    "key_in_use": Kind(409, "A request with this idempotency key still runs"),
    "key_reused": Kind(422, "This idempotency key came with another request"),
    "forgotten": Kind(410, "The job's result is no longer kept"),
}


class Problem(Exception):
    """An answer out of the catalogue. `retry_after` is in seconds.

    `extra` joins the problem body: pictures that could not be stored, for one.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        field: str | None = None,
        retry_after: int | None = None,
        extra: dict[str, object] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code = code if code in CATALOGUE else "internal_error"
        self.detail = detail
        self.field = field
        self.retry_after = retry_after
        self.extra = extra or {}

    @property
    def status(self) -> int:
        return CATALOGUE[self.code].status

    @property
    def title(self) -> str:
        return CATALOGUE[self.code].title
