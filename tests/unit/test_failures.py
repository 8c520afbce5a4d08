import pytest

from gpu_worker.failures import (
    JobCancelled,
    MemoryShort,
    Refusal,
    RequestRefused,
    outcome,
    speakable,
)
from ipc.messages import Cancelled, Failed, Fatal, Rejected


class OutOfMemoryError(RuntimeError):
    """Stands for torch's, which is known by its name."""


class AcceleratorError(RuntimeError):
    """Stands for torch's, which is known by its name."""


def test_a_cancelled_job_is_answered_as_cancelled() -> None:
    assert outcome("1", JobCancelled()) == Cancelled(job="1")


def test_a_refusal_keeps_its_code_and_field() -> None:
    refusal = Refusal("unknown_model", "cannot load 'x'", "checkpoint")
    expected = Rejected(job="1", code="unknown_model", detail="cannot load 'x'", field="checkpoint")
    assert outcome("1", refusal) == expected


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        MemoryShort("cannot load it"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RequestRefused("P", OutOfMemoryError("CUDA out of memory")),
    ],
)
def test_want_of_memory_fails_the_job_alone(error: Exception) -> None:
    if isinstance(error, RequestRefused):
        error = error.error
    answer = outcome("1", error)
    assert isinstance(answer, Failed)
    assert answer.code == "out_of_memory"


@pytest.mark.parametrize(
    "error",
    [
        AcceleratorError("an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
    ],
)
def test_any_other_device_error_ends_the_worker(error: Exception) -> None:
    answer = outcome("1", error)
    assert isinstance(answer, Fatal)
    assert answer.reason == "device"


def test_a_pipelines_complaint_names_the_parameter_it_is_about() -> None:
    complaint = ValueError("`height` and `width` have to be divisible by 8 but are 64 and 65.")
    answer = outcome("1", RequestRefused("FluxPipeline", complaint), {"width": 65, "prompt": "x"})
    assert isinstance(answer, Rejected)
    assert (answer.code, answer.field) == ("invalid_request", "parameters.width")
    assert answer.detail.startswith("cannot run FluxPipeline: `height` and `width` have to be")


def test_a_complaint_about_nothing_that_was_given_names_no_field() -> None:
    answer = outcome("1", RequestRefused("P", ValueError("Provide a `prompt`")), {"width": 64})
    assert isinstance(answer, Rejected)
    assert answer.field is None


def test_every_other_exception_fails_the_job() -> None:
    answer = outcome("1", IndexError("index 21 is out of bounds"))
    expected = "cannot finish the job: index 21 is out of bounds"
    assert answer == Failed(job="1", code="generation_failed", detail=expected)


@pytest.mark.parametrize(
    "said",
    [
        "cannot open /data/models/checkpoints/x.safetensors: gone",
        "cannot open '/data': gone",
        'File "/usr/lib/python3/site-packages/torch/nn.py", line 1',
        "cannot open C:\\models\\x.safetensors: gone",
    ],
)
def test_what_is_said_holds_no_paths(said: str) -> None:
    text = speakable(RuntimeError(said))
    assert "data" not in text
    assert "site-packages" not in text
    assert "x.safetensors" not in text
    assert "…" in text


def test_fractions_and_shapes_are_not_taken_for_paths() -> None:
    said = "expected a/b channels, 4/8 of [2, 4] and <class 'str'>"
    assert speakable(ValueError(said)) == said


def test_only_a_bounded_first_line_is_said() -> None:
    assert speakable(RuntimeError("first\nTraceback: second")) == "first"
    assert len(speakable(RuntimeError("x" * 10_000))) == 400
    assert speakable(RuntimeError()) == "RuntimeError"
