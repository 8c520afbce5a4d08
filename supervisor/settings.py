"""Settings from the environment: one frozen struct, read once.

Pure: the environment and the current directory are arguments. A bad value raises
SettingsError with a sentence that names the variable and what it accepts.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

MB = 2**20
GB = 2**30


class SettingsError(Exception):
    """A variable holds a value that cannot be used."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an operator can set. Sizes are in bytes, times in seconds."""

    data_dir: Path = Path("/data")
    model_dir: Path = Path("/data/models")
    image_dir: Path = Path("/data/images")
    config_dir: Path | None = None
    cuda_graph: bool = False
    load_safety_checker: bool = False
    host: str = "*"
    port: int = 1234
    launch_checkpoint: str | None = None
    launch_vae: str | None = None
    image_storage_strategy: Literal["disk", "post"] = "disk"
    webhook_model_loaded: str | None = None
    webhook_model_unloaded: str | None = None
    webhook_image_generated: str | None = None
    webhook_image_stored: str | None = None
    webhook_auth_header: str | None = None
    webhook_auth_value: str | None = None
    webhook_secret: str | None = None
    salad_machine_id: str | None = None
    salad_container_group_id: str | None = None
    max_data_dir_bytes: int = 0
    log_level: str = "info"
    devices: tuple[str, ...] = ("auto",)
    compile_backend: Literal["none", "inductor", "stable-fast"] = "none"
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    device_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    hf_token: str | None = None
    hub_allow: tuple[str, ...] = ("*",)
    api_keys: tuple[str, ...] = ()
    max_queue: int = 64
    request_timeout_seconds: float = 600.0
    drain_seconds: float = 30.0
    job_retention_seconds: float = 600.0
    max_body_bytes: int = 64 * MB
    max_image_pixels: int = 16_000_000
    start_timeout_seconds: float = 300.0
    load_timeout_seconds: float = 600.0
    step_timeout_seconds: float = 60.0
    body_timeout_seconds: float = 60.0
    header_timeout_seconds: float = 10.0

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "Settings":
        """Raises SettingsError. An empty variable counts as one that is not set."""
        given: dict[str, Any] = {}
        for variable in VARIABLES:
            text = environ.get(variable.name, "").strip()
            if text:
                given[variable.field] = variable.read(text)
        data_dir = given.get("data_dir", cls.__struct_defaults__[0])
        given.setdefault("model_dir", data_dir / "models")
        given.setdefault("image_dir", data_dir / "images")
        return cls(**given)


class Variable(msgspec.Struct, frozen=True):
    """One environment variable: the field it sets, how it is read, what it is for."""

    name: str
    field: str
    parse: Callable[[str], Any]
    accepts: str
    purpose: str
    default: str = "none"

    def read(self, text: str) -> Any:
        try:
            return self.parse(text)
        except (ValueError, OverflowError):
            shown = "the given value" if self.field in SECRET else repr(text)
            raise SettingsError(
                f"cannot use {self.name}={shown}: it accepts {self.accepts}"
            ) from None


SECRET = {"api_keys", "hf_token", "webhook_auth_value", "webhook_secret"}


def _path(text: str) -> Path:
    return Path(text).absolute()


def _boolean(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "on": True}
    words |= {"false": False, "0": False, "no": False, "off": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    return parse


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0 <= value <= 1e9):
        raise ValueError(text)
    return value


def _size(unit: int, low: float = 0.0) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = float(text)
        if not (math.isfinite(value) and low <= value <= 1e9):
            raise ValueError(text)
        return round(value * unit)

    return parse


def _automatic_size(text: str) -> int | None:
    return None if text.lower() == "auto" else _size(GB, 0.001)(text)


def _one_of(*words: str, **aliases: str) -> Callable[[str], str]:
    spelled = {word.lower(): word for word in words}
    spelled |= {alias.replace("_", "-"): word for alias, word in aliases.items()}

    def parse(text: str) -> str:
        if text.lower() not in spelled:
            raise ValueError(text)
        return spelled[text.lower()]

    return parse


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/]+\S*", text):
        raise ValueError(text)
    return text


def _ascii_word(text: str) -> str:
    if not re.fullmatch(r"[\x21-\x7e]+", text):
        raise ValueError(text)
    return text


def _header_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", text):
        raise ValueError(text)
    return text


def _header_value(text: str) -> str:
    if not re.fullmatch(r"[\x20-\x7e]+", text):
        raise ValueError(text)
    return text


def _secret(text: str) -> str:
    if not re.fullmatch(r"whsec_[A-Za-z0-9+/=]{16,}", text):
        raise ValueError(text)
    return text


def _words(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(","))
    if not all(re.fullmatch(r"[\x21-\x7e]+", word) for word in words):
        raise ValueError(text)
    return words


def _devices(text: str) -> tuple[str, ...]:
    words = tuple(word.strip().lower() for word in text.split(","))
    if words == ("auto",):
        return words
    if not all(re.fullmatch(r"cpu|[0-9]{1,3}", word) for word in words):
        raise ValueError(text)
    gpus = [int(word) for word in words if word != "cpu"]
    if len(set(gpus)) != len(gpus):
        raise ValueError(text)
    return tuple(word if word == "cpu" else str(int(word)) for word in words)


_boolean_words = "true or false"
_name_words = "the name of a model under MODEL_DIR"
_url_words = "an http:// or https:// address"

VARIABLES = (
    Variable("DATA_DIR", "data_dir", _path, "a folder that can be written",
             "Pictures, cache and outbox.", "/data"),
    Variable("MODEL_DIR", "model_dir", _path, "a folder",
             "checkpoints, vae, lora, controlnet, configs, safety_checker; may be read-only.",
             "${DATA_DIR}/models"),
    Variable("IMAGE_DIR", "image_dir", _path, "a folder that can be written",
             "Where pictures are stored by the disk strategy.", "${DATA_DIR}/images"),
    Variable("CONFIG_DIR", "config_dir", _path, "a folder",
             "Configurations of families, for single files that MODEL_DIR/configs has none for."),
    Variable("CUDA_GRAPH", "cuda_graph", _boolean, _boolean_words,
             "Capture CUDA graphs of denoisers, ControlNets and text encoders.", "false"),
    Variable("LOAD_SAFETY_CHECKER", "load_safety_checker", _boolean, _boolean_words,
             "Check pictures unless a request says otherwise.", "false"),
    Variable("HOST", "host", _ascii_word, "an address, or * for all of IPv4 and IPv6",
             "The address to listen on.", "*"),
    Variable("PORT", "port", _integer(0, 65535), "a port from 0 to 65535",
             "The port to listen on; 0 takes a free one.", "1234"),
    Variable("LAUNCH_CHECKPOINT", "launch_checkpoint", str, _name_words,
             "Loaded on every worker before it is ready; the default checkpoint."),
    Variable("LAUNCH_VAE", "launch_vae", str, _name_words,
             "Loaded with LAUNCH_CHECKPOINT."),
    Variable("IMAGE_STORAGE_STRATEGY", "image_storage_strategy",
             _one_of("disk", "post", http_post="post"), "disk, post or http-post",
             "Where stored pictures go: IMAGE_DIR, or WEBHOOK_IMAGE_STORED.", "disk"),
    Variable("WEBHOOK_MODEL_LOADED", "webhook_model_loaded", _url, _url_words,
             "Told of each model that was loaded."),
    Variable("WEBHOOK_MODEL_UNLOADED", "webhook_model_unloaded", _url, _url_words,
             "Told of each model that was unloaded."),
    Variable("WEBHOOK_IMAGE_GENERATED", "webhook_image_generated", _url, _url_words,
             "Told of each batch of pictures."),
    Variable("WEBHOOK_IMAGE_STORED", "webhook_image_stored", _url, _url_words,
             "Told of each picture that was stored; with the post strategy, sent it."),
    Variable("WEBHOOK_AUTH_HEADER", "webhook_auth_header", _header_name, "a header's name",
             "Sent with each webhook."),
    Variable("WEBHOOK_AUTH_VALUE", "webhook_auth_value", _header_value, "printable ASCII",
             "The value of WEBHOOK_AUTH_HEADER."),
    Variable("WEBHOOK_SECRET", "webhook_secret", _secret, "whsec_ and base64",
             "Signs webhooks by the Standard Webhooks rules."),
    Variable("SALAD_MACHINE_ID", "salad_machine_id", str, "any text",
             "Identity in webhook payloads."),
    Variable("SALAD_CONTAINER_GROUP_ID", "salad_container_group_id", str, "any text",
             "Identity in webhook payloads."),
    Variable("MAX_DATA_DIR_SIZE_GB", "max_data_dir_bytes", _size(GB),
             "a number of GB (2^30 bytes), 0 for no limit", "Quota of DATA_DIR.", "0"),
    Variable("LOG_LEVEL", "log_level", _one_of("debug", "info", "warning", "error"),
             "debug, info, warning or error", "Least severity that is logged.", "info"),
    Variable("DEVICES", "devices", _devices, "auto, or a list such as 0,1 or cpu,cpu",
             "One worker is started per device; auto: all GPUs, else cpu.", "auto"),
    Variable("COMPILE_BACKEND", "compile_backend", _one_of("none", "inductor", "stable-fast"),
             "none, inductor or stable-fast", "Compiles the denoisers.", "none"),
    Variable("DTYPE", "dtype", _one_of("auto", "float16", "bfloat16", "float32"),
             "auto, float16, bfloat16 or float32",
             "The weights' type; auto: float16 on a GPU, float32 on a CPU.", "auto"),
    Variable("DEVICE_MEMORY_GB", "device_memory_bytes", _automatic_size,
             "auto or a number of GB (2^30 bytes)",
             "Budget for weights on each device.", "auto"),
    Variable("HOST_MEMORY_GB", "host_memory_bytes", _automatic_size,
             "auto or a number of GB (2^30 bytes)",
             "Budget for weights in the host's memory.", "auto"),
    Variable("HF_TOKEN", "hf_token", _ascii_word, "a token of the hub", "For hub downloads."),
    Variable("HUB_ALLOW", "hub_allow", _words, "patterns such as runwayml/*, comma-separated",
             "Hub ids that may be downloaded.", "*"),
    Variable("API_KEY", "api_keys", _words, "bearer keys in ASCII, comma-separated",
             "Asked for on all routes but /hc, /health and /ready."),
    Variable("MAX_QUEUE", "max_queue", _integer(1, 100_000), "a number from 1 to 100000",
             "Jobs that may wait, on the whole host.", "64"),
    Variable("REQUEST_TIMEOUT_SECONDS", "request_timeout_seconds", _seconds, "seconds",
             "Time limit of a job that names none.", "600"),
    Variable("DRAIN_SECONDS", "drain_seconds", _seconds, "seconds",
             "How long running jobs may go on when the server stops.", "30"),
    Variable("JOB_RETENTION_SECONDS", "job_retention_seconds", _seconds, "seconds",
             "How long results that may be asked for again are kept.", "600"),
    Variable("MAX_BODY_MB", "max_body_bytes", _size(MB, 0.001), "a number of MB (2^20 bytes)",
             "The largest request body.", "64"),
    Variable("MAX_IMAGE_PIXELS", "max_image_pixels", _integer(4096, 1_000_000_000),
             "a number of pixels from 4096", "The largest picture, in or out.", "16000000"),
    Variable("START_TIMEOUT_SECONDS", "start_timeout_seconds", _seconds, "seconds",
             "A worker, or what forks workers, is replaced when its start takes longer.", "300"),
    Variable("LOAD_TIMEOUT_SECONDS", "load_timeout_seconds", _seconds, "seconds",
             "A worker that takes longer to load a model is replaced.", "600"),
    Variable("STEP_TIMEOUT_SECONDS", "step_timeout_seconds", _seconds, "seconds",
             "A worker whose step or decode takes longer is replaced.", "60"),
    Variable("BODY_TIMEOUT_SECONDS", "body_timeout_seconds", _seconds, "seconds",
             "A request body that takes longer to arrive is refused.", "60"),
    Variable("HEADER_TIMEOUT_SECONDS", "header_timeout_seconds", _seconds, "seconds",
             "A connection without a whole request head for longer is closed.", "10"),
)  # fmt: skip
