"""What many tests share: tiny checkpoints, and one real worker process for all of them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.tools.server import RunningServer
    from tests.tools.worker_client import WorkerClient

# Torch adds up in another order on two threads than on one: comparisons need one on both sides.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-support-table", action="store_true", help="into the README")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MODEL_DIR with tiny models, each under its family's name: `controlnet/sdxl-b`, …"""
    from tests.tools import tiny, tiny_lora
    from tests.tools.tiny_families import FAMILIES

    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny.build_checkpoint(root / "checkpoints" / family, family)
    for family in ("sd15", "sd21", "sdxl"):
        for seed, letter in ((1, "a"), (2, "b")):
            tiny.build_controlnet(root / "controlnet" / f"{family}-{letter}", family, seed)
            for layout in tiny_lora.LAYOUTS:
                path = root / "lora" / f"{family}-{layout}-{letter}.safetensors"
                tiny_lora.build_lora(path, family, layout, seed)
        tiny.build_vae(root / "vae" / family, family, seed=1)
    return root


@pytest.fixture(scope="session")
def tiny_models(model_dir: Path) -> Path:
    """A folder with a tiny checkpoint of each family."""
    return model_dir / "checkpoints"


@pytest.fixture(scope="session")
def served(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[RunningServer]":
    """A real server with one real worker over `model_dir`, shared by all who ask it nicely."""
    from tests.tools.server import running

    data_dir = tmp_path_factory.mktemp("served")
    with running(data_dir, MODEL_DIR=str(model_dir)) as server:
        yield server


@pytest.fixture(scope="session")
def worker() -> "Iterator[WorkerClient]":
    """A real worker on the CPU; a test must leave it without a job."""
    from tests.tools.worker_client import WorkerClient

    with WorkerClient() as client:
        client.ready()
        yield client
