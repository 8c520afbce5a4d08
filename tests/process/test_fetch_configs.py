"""scripts/fetch_configs against a hub on this machine, and what it fetched in use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor.hub import CONFIG_REPOS
from supervisor.models import Models
from supervisor.settings import Settings
from tests.tools import local_hub, weights

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_configs"
FAMILIES = ("sd15", "sd21", "sdxl", "sdxl_refiner")


def fetched(endpoint: str, folder: Path, *families: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *families],
        env=environ, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("configs")
    with local_hub.running() as hub:
        for family in FAMILIES:
            folder = weights.files(root / "repos" / family, weights.checkpoint_files(family))
            weights.files(folder, {"README.md": None, "run.py": None})
            hub.repos[CONFIG_REPOS[family][-1]] = folder  # type: ignore[index]
        found = fetched(hub.endpoint, root / "fetched")
        assert found.returncode == 0, found.stderr
    return root / "fetched"


def test_only_the_small_files_of_every_family_are_fetched(configs: Path) -> None:
    for family in FAMILIES:
        folder = configs / family
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        visible = {name for name in files if not name.startswith(".")}
        assert visible == set(weights.config_files(family))


def test_a_single_file_takes_its_configuration_from_there(tmp_path: Path, configs: Path) -> None:
    path = tmp_path / "models" / "checkpoints" / "one.safetensors"
    weights.safetensors(path, weights.single_file_shapes("sd15"))
    settings = Settings(data_dir=tmp_path, model_dir=tmp_path / "models", config_dir=configs)
    found = Models(settings).resolve("checkpoint", "one.safetensors")
    assert found.model.config == str(configs / "sd15")


def test_what_a_family_lacks_is_named(tmp_path: Path) -> None:
    with local_hub.running() as hub:
        hub.repos[CONFIG_REPOS["sd15"][0]] = weights.files(tmp_path / "r", {"model_index.json": {}})
        found = fetched(hub.endpoint, tmp_path / "fetched", "sd15")
    assert found.returncode == 1
    assert "unet/config.json" in found.stderr
