"""schemathesis asks everything that /openapi.json allows, and much that it does not."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor import answers
from tests.tools.process_memory import resident_bytes
from tests.tools.server import SCRIPTED, RunningServer, running

CONFIG = Path(__file__).parents[1] / "schemathesis.toml"
SECONDS = 30
# Every pipeline class has an address of its own; three stand for the rest.
OTHER_PIPELINES = (
    "^/generate/(?!(StableDiffusionPipeline|StableDiffusionXLInpaintPipeline|FluxPipeline)$).*"
)


@pytest.fixture(scope="module")
def server(
    scripted_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    settings = {
        "MODEL_DIR": str(scripted_model_dir),
        "HUB_ALLOW": "nobody",
        "DEVICES": "cpu,cpu",
        "LAUNCH_CHECKPOINT": "sd15",
        "MAX_IMAGE_PIXELS": "65536",
        "API_KEY": "a-key",
    }
    data_dir = tmp_path_factory.mktemp("schema")
    with running(data_dir, SCRIPTED, workers=2, **settings) as server:
        yield server


def test_every_check_of_schemathesis_holds(server: RunningServer, tmp_path: Path) -> None:
    found = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "--no-color"),
            *("run", f"{server.url}/openapi.json", "--header", "Authorization: Bearer a-key"),
            *("--checks", "all", "--max-examples", "10", "--max-time", str(SECONDS)),
            *("--exclude-path-regex", OTHER_PIPELINES),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS * 5,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "Test cases:" in found.stdout
    assert server.client.get("/ready").status_code == 200
    assert resident_bytes(server.process.pid) < 400 * 2**20


def test_every_answers_type_is_used(server: RunningServer) -> None:
    text = server.client.get("/openapi.json").text
    for kind in answers.ALL:
        assert f'"$ref":"#/components/schemas/{kind.__name__}"' in text, kind.__name__
