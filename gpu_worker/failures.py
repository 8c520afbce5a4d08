"""Exceptions, and what each means for the request, the job and the worker.

Pure, and free of torch: the libraries' exceptions are told by their class names.
What is said about a failure never holds a path or a traceback; the log has those.
"""

import re
from collections.abc import Collection

from ipc.messages import Cancelled, Failed, Fatal, Rejected

Outcome = Rejected | Failed | Fatal | Cancelled

MAX_DETAIL = 400
PATH = re.compile(
    r"(?<![\w<])(?:[A-Za-z]:)?[/\\](?:[\w.@+~ -]+[/\\])+[\w.@+~-]*|(?<!\w)/[\w.@+~-]{2,}"
)
DEVICE_WORDS = re.compile(
    r"CUDA error|cuda runtime error|CUDNN_STATUS|cuDNN error|CUBLAS_STATUS|CUSOLVER_STATUS"
    r"|NCCL error|device-side assert|illegal memory access|HIP error",
    re.IGNORECASE,
)
MEMORY_WORDS = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|CUDNN_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


class Refusal(Exception):
    """The request asks for what cannot be; `code` is of the supervisor's catalogue."""

    def __init__(self, code: str, detail: str, field: str | None = None) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.field = field


class MemoryShort(Exception):
    """The job needs more of the device's memory than it may have, by so many bytes."""

    def __init__(self, detail: str, missing_bytes: int = 0) -> None:
        super().__init__(detail)
        self.missing_bytes = missing_bytes


class JobCancelled(Exception):
    """The job was cancelled; raised at its next step."""


class RequestRefused(Exception):
    """The pipeline refused its arguments before it denoised anything."""

    def __init__(self, pipeline: str, error: Exception) -> None:
        super().__init__(str(error))
        self.pipeline = pipeline
        self.error = error


def outcome(job: str, error: BaseException, parameters: Collection[str] = ()) -> Outcome:
    """The last message of a job that raised `error`.

    `parameters` are the names that the request gave, one of which is blamed where
    a pipeline's complaint names it.
    """
    match error:
        case JobCancelled():
            return Cancelled(job=job)
        case Refusal():
            return Rejected(job=job, code=error.code, detail=error.detail, field=error.field)
        case MemoryShort():
            return Failed(job=job, code="out_of_memory", detail=str(error))
    if is_out_of_memory(error):
        return Failed(
            job=job,
            code="out_of_memory",
            detail="cannot finish the job: the device's memory does not suffice",
        )
    if is_device_failure(error):
        return Fatal(reason="device", detail=f"cannot go on: {speakable(error)}")
    if isinstance(error, RequestRefused):
        return _refused(job, error, parameters)
    detail = f"cannot finish the job: {speakable(error)}"
    return Failed(job=job, code="generation_failed", detail=detail)


def is_out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError, MemoryError, and allocators that raise a RuntimeError."""
    names = class_names(error)
    if names & {"OutOfMemoryError", "MemoryError", "MemoryShort"}:
        return True
    return "RuntimeError" in names and bool(MEMORY_WORDS.search(str(error)))


def is_device_failure(error: BaseException) -> bool:
    """An error after which the device's context is not to be trusted."""
    names = class_names(error)
    if "OutOfMemoryError" in names:
        return False
    return "AcceleratorError" in names or (
        "RuntimeError" in names and bool(DEVICE_WORDS.search(str(error)))
    )


def class_names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def speakable(error: BaseException) -> str:
    """The first line of what an exception says, without paths, of bounded length."""
    lines = str(error).strip().splitlines()
    text = PATH.sub("…", lines[0].strip()) if lines else ""
    if len(text) > MAX_DETAIL:
        text = text[: MAX_DETAIL - 1] + "…"
    return text or type(error).__name__


def blamed(text: str, parameters: Collection[str]) -> str | None:
    """The first of `parameters` that a complaint names, `set_timesteps` for timesteps too."""
    words = (word.removeprefix("set_") for word in re.findall(r"[A-Za-z_][A-Za-z_0-9]*", text))
    return next((word for word in words if word in parameters), None)


def _refused(job: str, error: RequestRefused, parameters: Collection[str]) -> Rejected:
    text = speakable(error.error)
    name = blamed(text, parameters)
    return Rejected(
        job=job,
        code="invalid_request",
        detail=f"cannot run {error.pipeline}: {text}",
        field=f"parameters.{name}" if name else None,
    )
