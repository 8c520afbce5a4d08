"""What a start says, and what stops it."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.tools.server import ROOT, SCRIPTED, SERVE, running

WARNING = "anyone who reaches this port may use it"


def warnings(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if '"level":"warning"' in line]


def test_a_server_that_is_open_to_all_says_so_in_one_line(tmp_path: Path) -> None:
    with running(tmp_path, SCRIPTED, HOST="*") as server:
        [line] = warnings(server.log)
        assert WARNING in line


@pytest.mark.parametrize("environ", [{"API_KEY": "key"}, {"HOST": "127.0.0.1"}])
def test_a_server_that_is_not_says_nothing(tmp_path: Path, environ: dict[str, str]) -> None:
    with running(tmp_path, SCRIPTED, **({"HOST": "*"} | environ)) as server:
        assert warnings(server.log) == []


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"CUDA_GRAPH": "true"}, "cannot use CUDA_GRAPH=true: there is no GPU"),
        ({"COMPILE_BACKEND": "stable-fast"}, "cannot use COMPILE_BACKEND=stable-fast: there is no"),
        ({"DEVICES": "7"}, "cannot use DEVICES=7: this host has"),
        ({"PORT": "http"}, "cannot use PORT='http': it accepts a port from 0 to 65535"),
        ({"API_KEY": "schl\u00fcssel"}, "cannot use API_KEY=the given value: it accepts"),
        ({"LAUNCH_CHECKPOINT": "../x"}, "cannot use LAUNCH_CHECKPOINT or LAUNCH_VAE"),
        ({"HOST": "nowhere.invalid"}, "cannot listen on HOST=nowhere.invalid"),
    ],
)
def test_a_setting_that_cannot_be_honoured_stops_the_start(
    tmp_path: Path, environ: dict[str, str], said: str
) -> None:
    settings = {"DATA_DIR": str(tmp_path), "HOST": "127.0.0.1", "PORT": "0", "DEVICES": "cpu"}
    found = subprocess.run(
        SERVE, cwd=ROOT, env={**os.environ, **settings, **environ}, capture_output=True, timeout=60
    )
    assert found.returncode == 2
    [line] = found.stderr.decode().splitlines()
    assert line.startswith(f"igi: {said}")
