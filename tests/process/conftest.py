"""A server over scripted workers that many tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools import scripted_models
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
