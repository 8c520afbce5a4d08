"""What many tests of scripted workers share: a server, models of zeros, callers."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.tools import scripted_models, weights
from tests.tools.server import SCRIPTED, RunningServer, running


@pytest.fixture(scope="session")
def scripted_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted_models.model_dir(tmp_path_factory.mktemp("scripted_models"))


@pytest.fixture(scope="session")
def scripted(
    scripted_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """Two scripted workers and no hub; tests leave it as they find it."""
    data_dir = tmp_path_factory.mktemp("scripted")
    settings = {"MODEL_DIR": str(scripted_model_dir), "HUB_ALLOW": "nobody", "DEVICES": "cpu,cpu"}
    with running(data_dir, SCRIPTED, workers=2, **settings) as server:
        yield server


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("cat", "dog"):
        weights.files(folder / "checkpoints" / name, weights.checkpoint_files("sd15"))
    return folder


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(50) as pool:
        yield pool
