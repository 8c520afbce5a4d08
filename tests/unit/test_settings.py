"""Settings: what each variable accepts, and the sentence for what it does not."""

from pathlib import Path

import pytest

from supervisor.settings import GB, MB, SECRET, VARIABLES, Settings, SettingsError

ACCEPTED = [
    ("DATA_DIR", "/srv/igi", "data_dir", Path("/srv/igi")),
    ("CUDA_GRAPH", "TRUE", "cuda_graph", True),
    ("LOAD_SAFETY_CHECKER", "0", "load_safety_checker", False),
    ("HOST", "::1", "host", "::1"),
    ("PORT", "65535", "port", 65535),
    ("LAUNCH_CHECKPOINT", "a b.safetensors", "launch_checkpoint", "a b.safetensors"),
    ("IMAGE_STORAGE_STRATEGY", "HTTP-POST", "image_storage_strategy", "post"),
    ("WEBHOOK_IMAGE_STORED", "https://example.org/x?y", "webhook_image_stored",
     "https://example.org/x?y"),
    ("WEBHOOK_AUTH_HEADER", "X-Key", "webhook_auth_header", "X-Key"),
    ("WEBHOOK_AUTH_VALUE", "Bearer a b", "webhook_auth_value", "Bearer a b"),
    ("WEBHOOK_SECRET", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "webhook_secret",
     "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"),
    ("MAX_DATA_DIR_SIZE_GB", "0.5", "max_data_dir_bytes", GB // 2),
    ("LOG_LEVEL", "Warning", "log_level", "warning"),
    ("DEVICES", "auto", "devices", ("auto",)),
    ("DEVICES", "0, 01,cpu,cpu", "devices", ("0", "1", "cpu", "cpu")),
    ("COMPILE_BACKEND", "Stable-Fast", "compile_backend", "stable-fast"),
    ("DTYPE", "bfloat16", "dtype", "bfloat16"),
    ("DEVICE_MEMORY_GB", "auto", "device_memory_bytes", None),
    ("HOST_MEMORY_GB", "2", "host_memory_bytes", 2 * GB),
    ("HUB_ALLOW", "a/*, b/c", "hub_allow", ("a/*", "b/c")),
    ("API_KEY", "one,two", "api_keys", ("one", "two")),
    ("MAX_QUEUE", "1", "max_queue", 1),
    ("DRAIN_SECONDS", "0", "drain_seconds", 0.0),
    ("MAX_BODY_MB", "1.5", "max_body_bytes", MB * 3 // 2),
    ("MAX_IMAGE_PIXELS", "1000000", "max_image_pixels", 1_000_000),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "field", "value"), ACCEPTED)
def test_a_variable_sets_its_field(name: str, text: str, field: str, value: object) -> None:
    assert getattr(Settings.from_environ({name: text}), field) == value


REFUSED = [
    ("CUDA_GRAPH", "maybe"), ("PORT", "65536"), ("PORT", "-1"), ("PORT", "1e3"),
    ("HOST", "a b"), ("IMAGE_STORAGE_STRATEGY", "s3"), ("WEBHOOK_MODEL_LOADED", "ftp://x"),
    ("WEBHOOK_AUTH_HEADER", "a:b"), ("WEBHOOK_AUTH_VALUE", "a\nb"), ("WEBHOOK_SECRET", "hunter2"),
    ("MAX_DATA_DIR_SIZE_GB", "-1"), ("MAX_DATA_DIR_SIZE_GB", "nan"), ("LOG_LEVEL", "loud"),
    ("DEVICES", "0,0"), ("DEVICES", "gpu"), ("DEVICES", "auto,0"), ("COMPILE_BACKEND", "tensorrt"),
    ("DTYPE", "int8"), ("DEVICE_MEMORY_GB", "0"), ("API_KEY", "ключ"), ("API_KEY", "a,,b"),
    ("MAX_QUEUE", "0"), ("REQUEST_TIMEOUT_SECONDS", "inf"), ("MAX_BODY_MB", "x"),
    ("MAX_IMAGE_PIXELS", "12"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), REFUSED)
def test_a_bad_value_is_answered_with_what_would_be_right(name: str, text: str) -> None:
    accepts = next(variable.accepts for variable in VARIABLES if variable.name == name)
    with pytest.raises(SettingsError) as raised:
        Settings.from_environ({name: text})
    assert str(raised.value).startswith(f"cannot use {name}=")
    assert accepts in str(raised.value)


def test_a_bad_secret_is_not_repeated() -> None:
    with pytest.raises(SettingsError) as raised:
        Settings.from_environ({"WEBHOOK_SECRET": "hunter2"})
    assert "hunter2" not in str(raised.value)


def test_folders_follow_from_the_data_dir_unless_they_are_given() -> None:
    settings = Settings.from_environ({"DATA_DIR": "/x", "IMAGE_DIR": "/y"})
    assert settings.model_dir == Path("/x/models")
    assert settings.image_dir == Path("/y")


def test_nothing_set_is_all_defaults_and_empty_counts_as_not_set() -> None:
    assert Settings.from_environ({"PORT": " ", "API_KEY": ""}) == Settings()


def test_every_field_has_its_variable() -> None:
    assert {variable.field for variable in VARIABLES} == set(Settings.__struct_fields__)
    assert {variable.field for variable in VARIABLES} >= SECRET
