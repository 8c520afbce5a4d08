"""Settings that a host cannot honour stop the start."""

import pytest

from supervisor.settings import Settings, SettingsError
from supervisor.start_checks import check_compilation, is_open_to_all


@pytest.mark.parametrize(
    ("environ", "devices", "stable_fast"),
    [
        ({"CUDA_GRAPH": "true"}, ["cpu", "cpu"], "1.0.5"),
        ({"COMPILE_BACKEND": "stable-fast"}, ["cpu"], "1.0.5"),
        ({"COMPILE_BACKEND": "stable-fast"}, ["cuda:0"], None),
    ],
)
def test_what_cannot_be_compiled_stops_the_start(
    environ: dict[str, str], devices: list[str], stable_fast: str | None
) -> None:
    [name] = environ
    with pytest.raises(SettingsError, match=f"cannot use {name}="):
        check_compilation(Settings.from_environ(environ), devices, stable_fast)


@pytest.mark.parametrize(
    ("environ", "devices"),
    [
        ({}, ["cpu"]),
        ({"CUDA_GRAPH": "true"}, ["cpu", "cuda:0"]),
        ({"COMPILE_BACKEND": "inductor"}, ["cpu"]),
        ({"COMPILE_BACKEND": "stable-fast", "CUDA_GRAPH": "true"}, ["cuda:0"]),
    ],
)
def test_what_can_be_compiled_passes(environ: dict[str, str], devices: list[str]) -> None:
    check_compilation(Settings.from_environ(environ), devices, "1.0.5")


@pytest.mark.parametrize(
    ("environ", "is_open"),
    [
        ({}, True),
        ({"HOST": "0.0.0.0"}, True),
        ({"HOST": "::"}, True),
        ({"HOST": "192.168.1.5"}, True),
        ({"HOST": "127.0.0.1"}, False),
        ({"HOST": "::1"}, False),
        ({"HOST": "localhost"}, False),
        ({"API_KEY": "key"}, False),
    ],
)
def test_a_server_without_a_key_is_open_beyond_the_loopback(
    environ: dict[str, str], is_open: bool
) -> None:
    assert is_open_to_all(Settings.from_environ(environ)) is is_open
