"""The catalogue that is served is the one that the installed Diffusers gives."""

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = SourceFileLoader("make_catalogue", str(ROOT / "scripts" / "make_catalogue"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(script: ModuleType) -> dict[str, object]:
    value: dict[str, object] = script.catalogue()
    return value


def test_the_catalogue_is_what_diffusers_says(script: ModuleType, made: dict[str, object]) -> None:
    assert script.TARGET.read_text() == script.render(made) + "\n", "run scripts/make_catalogue"


def test_the_page_of_pipelines_is_current(script: ModuleType, made: dict[str, object]) -> None:
    page = (ROOT / "docs" / "pipelines.md").read_text()
    assert page == script.table(made) + "\n", (
        "run scripts/make_catalogue --list > docs/pipelines.md"
    )


def test_the_twelve_calls_take_what_the_catalogue_says(made: dict[str, dict[str, dict]]) -> None:
    """Read once more by other means, so that the script cannot agree with itself alone."""
    import inspect

    import diffusers

    from supervisor.catalogue import FAMILIES, pipeline

    for name in FAMILIES:
        call = inspect.signature(getattr(diffusers, name).__call__).parameters
        served = pipeline(name)
        for public, called in served.call_names.items():
            assert called in call, f"{name} has no {called}"
            default = served.parameters[public].default
            if public in served.defaults and call[called].default != default:
                assert call[called].default == tuple(default)
