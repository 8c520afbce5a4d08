"""How the worker builds its pipelines from a checkpoint's parts."""

import inspect
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.hooks import group_offloading

from gpu_worker.pipelines import built, device_of, settled
from ipc.messages import Model
from tests.tools.compare import components


def test_a_pipeline_does_not_search_its_modules_for_their_device(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = diffusers.StableDiffusionPipeline
    model = Model(name="sd15", path=str(tiny_models / "sd15"), family="sd15")
    made = built(kind, model, components(tiny_models / "sd15"))
    assert isinstance(made, kind)
    assert type(made).__name__ == kind.__name__
    assert inspect.signature(type(made)) == inspect.signature(kind)

    def search(module: torch.nn.Module) -> torch.device:
        raise AssertionError("it searches")

    stock = kind(**made.components, requires_safety_checker=False)
    assert made._execution_device == stock._execution_device
    monkeypatch.setattr(group_offloading, "_get_group_onload_device", search)
    assert made._execution_device == torch.device("cpu")
    with pytest.raises(AssertionError, match="it searches"):
        stock._execution_device  # noqa: B018


def test_a_pipeline_is_on_the_device_of_its_first_module_with_weights() -> None:
    there = torch.nn.Linear(1, 1, device="meta")
    assert device_of(["no module", torch.nn.Identity(), there]) == torch.device("meta")
    assert device_of([None]) == torch.device("cpu")


def test_devices_have_classes_of_their_own() -> None:
    kind = diffusers.StableDiffusionPipeline
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert settled(kind, cpu) is settled(kind, torch.device("cpu"))
    assert settled(kind, meta)._execution_device == meta
    assert settled(kind, cpu)._execution_device == cpu
