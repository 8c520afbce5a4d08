"""What the routes answer, field by field, for the OpenAPI document. Pure.

The routes build their answers where the facts are; schemathesis holds them to these
types. Sizes of memory under /placement are bytes, those of /stats GB (2^30 bytes).
"""

from typing import Any, Literal

import msgspec

from ipc.messages import Family, Memory


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON object with these fields and no others."""


class Health(Answer, frozen=True, kw_only=True):
    status: Literal["ok"]
    version: str


class Readiness(Answer, frozen=True, kw_only=True):
    status: Literal["ready"]
    workers: int


class Restarting(Answer, frozen=True, kw_only=True):
    status: Literal["restarting"]
    workers: int


class ResidentModel(Answer, frozen=True, kw_only=True):
    """`last_used` is in seconds since the epoch."""

    checkpoint: str
    family: Family
    vae: str | None
    loras: list[str]
    tier: Literal["device", "host"]
    bytes: int
    last_used: float


class PlacedWorker(Answer, frozen=True, kw_only=True):
    id: int
    device: str
    name: str | None
    pid: int | None
    state: str
    restarts: int
    last_exit: str | None
    running: int
    queued: int
    step_seconds: float | None
    memory: Memory | None
    models: list[ResidentModel]


class Placement(Answer, frozen=True, kw_only=True):
    workers: list[PlacedWorker]


class Frequency(Answer, frozen=True, kw_only=True):
    """In MHz."""

    current: float
    min: float
    max: float


class Processors(Answer, frozen=True, kw_only=True):
    utilization: list[float]
    frequency: list[Frequency]


class HostMemory(Answer, frozen=True, kw_only=True):
    total: float
    available: float
    percent: float
    used: float
    free: float


class FileSystem(Answer, frozen=True, kw_only=True):
    used: float | None
    free: float | None


class Gpu(Answer, frozen=True, kw_only=True):
    """Load in percent, memory in GB, temperature in °C; null for what is not told."""

    id: int
    name: str | None
    load: float | None
    free_memory: float | None
    used_memory: float | None
    total_memory: float | None
    temperature: float | None


class Packages(Answer, frozen=True, kw_only=True):
    torch: str | None
    cuda: str | None
    xformers: str | None
    triton: str | None
    diffusers: str | None
    transformers: str | None
    stable_fast: str | None


class SystemStats(Answer, frozen=True, kw_only=True):
    cpu: Processors
    memory: HostMemory
    storage: FileSystem
    gpu: list[Gpu]
    packages: Packages


class Meta(Answer, frozen=True, kw_only=True):
    """Times in seconds; `nsfw` is null for a picture that was not checked."""

    model_load_time: float
    generation_time: float
    image_encoding_time: float
    b64_encoding_time: float
    total_time: float
    queue_time: float
    seeds: list[int]
    worker: int
    device: str
    attempts: int
    nsfw: list[bool | None]
    memory_fallback: str | None


class Generated(Answer, frozen=True, kw_only=True):
    """Pictures in base64, or stored names when `return_images` is false.

    `inputs` is the request as it was understood, without its pictures.
    """

    batch_id: str
    images: list[str]
    inputs: dict[str, Any]
    meta: Meta


class Accepted(Answer, frozen=True, kw_only=True):
    id: str
    status: str
    poll_url: str


class ProblemBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True,
                  omit_defaults=True):  # fmt: skip
    """RFC 9457. `images`: what could not be stored, when the request wanted it returned."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    field: str = ""
    images: list[str] = []


JobStatus = Literal["queued", "running", "finished", "failed", "cancelled", "expired"]


class Job(Answer, frozen=True, kw_only=True):
    """`position` counts from 0 while the job is queued."""

    id: str
    status: JobStatus
    position: int | None
    step: int
    steps: int
    result: Generated | None
    error: ProblemBody | None


class Cancelling(Answer, frozen=True, kw_only=True):
    id: str
    status: JobStatus
    request_id: str


class A1111Scheduler(Answer, frozen=True, kw_only=True):
    scheduler: str
    settings: dict[str, Any]


class Schedulers(Answer, frozen=True, kw_only=True):
    schedulers: list[str]
    a1111_schedulers: dict[str, A1111Scheduler]


class OpenaiImage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the two."""

    b64_json: str = ""
    url: str = ""


class OpenaiImages(Answer, frozen=True, kw_only=True):
    created: int
    data: list[OpenaiImage]
    output_format: Literal["png", "jpeg", "webp"]
    background: Literal["opaque"]
    size: str = ""


class OpenaiModel(Answer, frozen=True, kw_only=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class OpenaiModels(Answer, frozen=True, kw_only=True):
    object: Literal["list"]
    data: list[OpenaiModel]


class OpenaiErrorDetail(Answer, frozen=True, kw_only=True):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str
    images: list[str] = []


class OpenaiError(Answer, frozen=True, kw_only=True):
    error: OpenaiErrorDetail


ALL: tuple[type[msgspec.Struct], ...] = (
    Health, Readiness, Restarting, Placement, SystemStats, Generated, Accepted, ProblemBody,
    Job, Cancelling, Schedulers, OpenaiImages, OpenaiModel, OpenaiModels, OpenaiError,
)  # fmt: skip
