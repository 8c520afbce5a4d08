"""What many tests share: tiny checkpoints, and one real worker process for all of them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.tools.worker_client import WorkerClient

# Torch adds up in another order on two threads than on one: comparisons need one on both sides.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint of each family."""
    from tests.tools import tiny

    root = tmp_path_factory.mktemp("models")
    for family in tiny.FAMILIES:
        tiny.build_checkpoint(root / family, family)
    return root


@pytest.fixture(scope="session")
def worker() -> "Iterator[WorkerClient]":
    """A real worker on the CPU; a test must leave it without a job."""
    from tests.tools.worker_client import WorkerClient

    with WorkerClient() as client:
        client.ready()
        yield client
