"""How many threads a worker computes with: what the environment says, though torch has read it."""

from collections.abc import Iterator

import pytest
import torch

from gpu_worker import device


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("words", "seen"), [("3", 3), ("", 5), ("0", 5), ("-1", 5), ("4,2", 5), ("many", 5)]
)
def test_threads_are_as_many_as_the_environment_says_where_it_says_a_number(
    monkeypatch: pytest.MonkeyPatch, words: str, seen: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", words)
    device.use_threads()
    assert torch.get_num_threads() == seen
