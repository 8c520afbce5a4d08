"""Every message between the supervisor and a worker: one tagged union per direction.

Names stop at the supervisor: a worker is given absolute paths, seeds that are
decided and pictures as their encoded bytes. Each message has a golden file in
tests/golden; a change that a worker of the previous commit would misread raises
PROTOCOL_VERSION.
"""

from typing import Any, Literal

import msgspec

PROTOCOL_VERSION = 1

Family = Literal["sd15", "sd21", "sdxl", "sdxl_refiner", "other"]
Tier = Literal["device", "host"]
Phase = Literal["loading", "encoding", "denoising", "decoding"]
OutputFormat = Literal["jpeg", "png", "webp"]


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A value inside a message."""


class Message(Struct, frozen=True, kw_only=True, tag_field="type", tag=str.lower):
    """A message; its type travels as the class's name in lower case."""


# Values that messages carry.


class Model(Struct, frozen=True, kw_only=True):
    """A file or folder of weights, resolved and checked by the supervisor."""

    name: str
    path: str
    family: Family = "other"
    single_file: bool = False
    config: str | None = None
    """Folder with the family's configurations, for a single file."""
    prediction_type: str | None = None


class Lora(Struct, frozen=True, kw_only=True):
    """A LoRA's file and how strongly it counts."""

    model: Model
    scale: float = 1.0


class Scheduler(Struct, frozen=True, kw_only=True):
    """A Diffusers scheduler class and the settings laid over the checkpoint's own."""

    class_name: str
    settings: dict[str, Any] = {}


class Call(Struct, frozen=True, kw_only=True):
    """One picture: one call of the pipeline with one seed."""

    seed: int
    parameters: dict[str, Any] = {}
    """What differs from the job's common parameters, such as the prompt."""
    metadata: dict[str, str] = {}
    """Texts to embed in the picture's file."""


class Refiner(Struct, frozen=True, kw_only=True):
    """What goes on with the base's latents or pictures."""

    checkpoint: Model
    parameters: dict[str, Any] = {}


class Resident(Struct, frozen=True, kw_only=True):
    """A checkpoint that a worker holds. `last_used` is seconds since the epoch."""

    checkpoint: str
    path: str
    family: Family
    vae: str | None
    loras: list[str]
    tier: Tier
    bytes: int
    last_used: float


class Memory(Struct, frozen=True, kw_only=True):
    """A device's memory in bytes; on a CPU, the host's."""

    total: int
    used: int
    free: int


# Supervisor to worker.


class Start(Message, frozen=True, kw_only=True):
    """The first message: what the worker is to be."""

    protocol: int
    device: str
    """A torch device as the worker sees it: `cpu` or `cuda:0`."""
    dtype: str = "auto"
    device_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    compile_backend: Literal["none", "inductor", "stable-fast"] = "none"
    cuda_graph: bool = False
    cache_dir: str | None = None


class Generate(Message, frozen=True, kw_only=True):
    """Make one picture per call. Answered by Finished, Rejected, Failed or Cancelled."""

    job: str
    pipeline: str
    checkpoint: Model
    calls: list[Call]
    parameters: dict[str, Any] = {}
    images: dict[str, list[bytes]] = {}
    """Encoded pictures by the name of the pipeline's own call parameter."""
    scheduler: Scheduler | None = None
    vae: Model | None = None
    controlnets: list[Model] = []
    loras: list[Lora] = []
    refiner: Refiner | None = None
    safety_checker: Model | bool = False
    """False: off. True: the checkpoint's own. A Model: loaded from there."""
    output_format: OutputFormat = "jpeg"
    output_quality: int | None = None
    """0 to 100, for JPEG and WebP; None: what each format takes by itself."""
    previews: int = 0
    deterministic: bool = False
    alone: bool = False
    """Nothing else runs beside it: set after a worker died under this job."""
    priority: int = 0
    progress_seconds: float = 0.0
    """How late pictures and signs of progress may come, of these the newest; 0: all at once."""


class Load(Message, frozen=True, kw_only=True):
    """Make a checkpoint resident. Answered like a Generate without pictures."""

    job: str
    checkpoint: Model
    vae: Model | None = None


class Unload(Message, frozen=True, kw_only=True):
    """Drop a checkpoint. Answered like a Generate without pictures."""

    job: str
    checkpoint: Model


class Cancel(Message, frozen=True, kw_only=True):
    """End this job within a step; its answer may still be another one."""

    job: str


class Shutdown(Message, frozen=True, kw_only=True):
    """End now; jobs that still run are lost."""


# Worker to supervisor.


class Ready(Message, frozen=True, kw_only=True):
    """Sent once, after Start."""

    protocol: int
    device_name: str
    memory: Memory
    packages: dict[str, str | None]
    capacity: int = 1
    """Jobs the worker runs at a time."""


class Progress(Message, frozen=True, kw_only=True):
    """A job moved on; `step` of `steps` counts over all of the job's calls.

    At every change of phase and every step, or the newest of them within `progress_seconds`.
    """

    job: str
    phase: Phase
    step: int = 0
    steps: int = 0


class Preview(Message, frozen=True, kw_only=True):
    """A rough picture of a step in between, as JPEG."""

    job: str
    index: int
    data: bytes


class Picture(Message, frozen=True, kw_only=True):
    """A finished picture, encoded; each travels in a frame of its own."""

    job: str
    index: int
    data: bytes
    nsfw: bool | None = None


class Finished(Message, frozen=True, kw_only=True):
    """The job's last message when all went well. Times are in seconds."""

    job: str
    load_seconds: float = 0.0
    generation_seconds: float = 0.0
    encode_seconds: float = 0.0
    step_seconds: float | None = None
    batch_rows: float | None = None
    """Pictures that shared the job's steps, its own included, on the average."""
    memory_fallback: str | None = None


class Rejected(Message, frozen=True, kw_only=True):
    """The request is wrong: `code` and `field` are of the supervisor's catalogue."""

    job: str
    code: str
    detail: str
    field: str | None = None


class Failed(Message, frozen=True, kw_only=True):
    """The job failed; the worker is fine."""

    job: str
    code: str
    detail: str


class Cancelled(Message, frozen=True, kw_only=True):
    """The job was ended as it was asked to be."""

    job: str


class Residency(Message, frozen=True, kw_only=True):
    """What the worker holds, sent whenever it changes."""

    models: list[Resident]
    memory: Memory


class Worn(Message, frozen=True, kw_only=True):
    """Replace this worker once its jobs are done; until then it goes on, less well."""

    reason: str
    detail: str


class Fatal(Message, frozen=True, kw_only=True):
    """Last words: the worker must be replaced and exits by itself."""

    reason: str
    detail: str


ToWorker = Start | Generate | Load | Unload | Cancel | Shutdown
FromWorker = (
    Ready
    | Progress
    | Preview
    | Picture
    | Finished
    | Rejected
    | Failed
    | Cancelled
    | Residency
    | Worn
    | Fatal
)
