"""The container's files, as far as they can be held to without building them."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from supervisor.settings import VARIABLES

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
NAMES = {one.name for one in VARIABLES}


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return content


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed: the Dockerfile was not linted")
    found = subprocess.run(
        [hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_what_the_dockerfile_copies_reaches_it() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    sources = {source for line in copied for source in line.split()[:-1]}
    assert sources == kept
    for source in sources - {"scripts/build_stable_fast"}:
        assert (ROOT / source).exists(), source


def test_the_container_does_not_run_as_root() -> None:
    users = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert users[-1] not in ("root", "0")


def test_the_container_has_a_health_check_and_volumes() -> None:
    assert "HEALTHCHECK" in DOCKERFILE
    assert 'VOLUME ["/data", "/models"]' in DOCKERFILE
    environment = dict(re.findall(r"\b([A-Z_]+)=(/\S+)", DOCKERFILE))
    assert (environment["DATA_DIR"], environment["MODEL_DIR"]) == ("/data", "/models")


def test_the_services_settings_exist() -> None:
    [service] = compose()["services"].values()
    assert set(service["environment"]) <= NAMES
    [device] = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_a_container_is_given_the_time_to_drain() -> None:
    [service] = compose()["services"].values()
    drain = int(service["environment"]["DRAIN_SECONDS"])
    assert int(service["stop_grace_period"].removesuffix("s")) >= drain + 15
