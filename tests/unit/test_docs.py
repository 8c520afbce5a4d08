"""The documentation names everything that there is."""

import importlib.machinery
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from supervisor.app import OPERATIONS
from supervisor.openai_images import EditsBody
from supervisor.requests import GenerateBody, LoadBody, UnloadBody
from supervisor.settings import VARIABLES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOT_OURS = {"CUDA_VISIBLE_DEVICES", "HF_ENDPOINT"}


def script() -> ModuleType:
    path = str(ROOT / "scripts" / "make_docs")
    loader = importlib.machinery.SourceFileLoader("make_docs", path)
    spec = importlib.util.spec_from_loader("make_docs", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_what_is_generated_is_what_the_code_says() -> None:
    for path, text in script().pages().items():
        assert path.read_text() == text, f"{path.name}: run scripts/make_docs"


@pytest.mark.parametrize("body", [GenerateBody, LoadBody, UnloadBody, EditsBody])
def test_every_field_of_a_request_is_explained(body: type) -> None:
    text = (DOCS / "api.md").read_text()
    missing = [name for name in body.__struct_fields__ if f"`{name}`" not in text]  # type: ignore[attr-defined]
    assert not missing


@pytest.mark.parametrize("page", ["operations.md", "security.md", "api.md"])
def test_every_setting_that_a_page_names_exists(page: str) -> None:
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", (DOCS / page).read_text()))
    assert named - {one.name for one in VARIABLES} <= NOT_OURS


def test_every_route_has_a_sentence() -> None:
    assert all(operation.summary for operation in OPERATIONS)
