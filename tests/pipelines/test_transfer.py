"""Copies to a GPU, with something else in the place of the GPU's own."""

from typing import Any

import pytest
import torch

from gpu_worker import transfer
from gpu_worker.transfer import Unwaited, sent, unwaited

CUDA = torch.device("cuda:0")


@pytest.fixture
def sendings(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What was sent to CUDA; it stays where it is."""
    seen: list[torch.Tensor] = []

    def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert device == CUDA
        seen.append(tensor)
        return tensor

    monkeypatch.setattr(transfer, "sent", sent)
    return seen


@pytest.mark.parametrize(
    ("args", "kwargs", "dtype"),
    [
        (("cuda:0",), {}, torch.float32),
        ((CUDA, torch.float16), {}, torch.float16),
        ((), {"device": CUDA, "dtype": torch.float64}, torch.float64),
        ((CUDA,), {"non_blocking": True}, torch.float32),
    ],
)
def test_what_goes_to_a_gpu_is_sent_in_the_type_it_is_wanted_in(
    sendings: list[torch.Tensor], args: Any, kwargs: Any, dtype: torch.dtype
) -> None:
    numbers = torch.randn(3, 2)
    with Unwaited():
        assert numbers.to(*args, **kwargs).dtype == dtype
    assert torch.equal(sendings[0], numbers.to(dtype))


@pytest.mark.parametrize("given", [((([1.0, 2.0]),), {}), ((), {"data": [1.0, 2.0]})])
def test_what_is_made_on_a_gpu_is_made_here_and_sent(
    sendings: list[torch.Tensor], given: Any
) -> None:
    args, kwargs = given
    with Unwaited():
        torch.tensor(*args, **kwargs, device="cuda:0", dtype=torch.float16)
    assert torch.equal(sendings[0], torch.tensor([1.0, 2.0], dtype=torch.float16))


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.float16,), {}),
        (("cpu",), {}),
        ((torch.float16, False, True), {}),
        ((), {"dtype": torch.float16, "copy": True}),
        ((torch.zeros(1, dtype=torch.float64),), {}),
        ((), {"memory_format": torch.channels_last}),
    ],
)
def test_all_else_is_as_ever(sendings: list[torch.Tensor], args: Any, kwargs: Any) -> None:
    numbers = torch.randn(2, 3, 4, 5)
    expected = numbers.to(*args, **kwargs)
    with Unwaited():
        made = numbers.to(*args, **kwargs)
        assert torch.tensor([1, 2]).tolist() == [1, 2]
    assert torch.equal(made, expected)
    assert (made.dtype, made.stride()) == (expected.dtype, expected.stride())
    assert not sendings


def test_an_expanded_tensor_is_written_out_and_another_pinned_as_it_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned: list[torch.Tensor] = []

    class Pinned(torch.Tensor):
        def to(self, *_: Any, **__: Any) -> torch.Tensor:
            return self.as_subclass(torch.Tensor)

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor)
        return tensor.as_subclass(Pinned)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    one, turned = torch.randn(1, 4), torch.randn(2, 3).t()
    assert torch.equal(sent(one.expand(3, 4), CUDA), one.expand(3, 4))
    assert torch.equal(sent(turned, CUDA), turned)
    assert [tensor.stride() for tensor in pinned] == [(4, 1), (1, 3)]


def test_on_a_cpu_nothing_is_in_the_way() -> None:
    with unwaited(torch.device("cpu")), unwaited(torch.device("cpu")):
        assert torch.overrides._get_current_function_mode_stack() == []
