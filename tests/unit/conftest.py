"""Folders for the tests that need one, and a small MODEL_DIR in them."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from supervisor import models as models_module
from supervisor.models import Models
from supervisor.settings import Settings
from tests.tools import weights
from tests.tools.clock import Clock
from tests.tools.model_folders import LORA
from tests.tools.weights import files, safetensors

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where the system has a folder there: a disk takes seconds for all the tests."""
    with TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        path = Path(folder) / "test"  # its parent is the test's own, too
        path.mkdir()
        yield path


@pytest.fixture
def no_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo that comes with the project is no part of these folders."""
    monkeypatch.setattr(models_module, "DEMO_DIR", tmp_path / "no_demo")


@pytest.fixture
def root(tmp_path: Path, no_demo: None) -> Path:
    """Of one LoRA; checkpoints are added by the tests that need them."""
    root = tmp_path / "models"
    safetensors(root / "lora" / "style.safetensors", LORA)
    return root


@pytest.fixture
def sd15(root: Path) -> Path:
    return files(root / "checkpoints" / "sd15", weights.checkpoint_files("sd15"))


@pytest.fixture
def sdxl(root: Path) -> Path:
    return files(root / "checkpoints" / "sdxl", weights.checkpoint_files("sdxl"))


@pytest.fixture
def models(root: Path) -> Models:
    """Each look at its clock is so much later that it looks at files every time."""
    clock = itertools.count(step=models_module.FRESH_SECONDS).__next__
    return Models(Settings(model_dir=root, data_dir=root.parent / "data"), clock=clock)


@pytest.fixture
def clock() -> Clock:
    return Clock()
