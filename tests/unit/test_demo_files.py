"""What the demo ships: small files that say nothing of the machine they were made on."""

import json
import re
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "gpu_worker" / "demo"
FILES = sorted(path for path in DEMO.rglob("*") if path.is_file())
ABSOLUTE = re.compile(r"(?<![\w./:])(?:/[\w.~-]+){2,}|\b[A-Za-z]:\\")
"""Two names or more behind a slash that begins a word, or a drive's letter."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEMO)))
def test_no_shipped_file_names_an_absolute_path(path: Path) -> None:
    assert ABSOLUTE.findall(written(path)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('"_name_or_path": "/home/me/build/unet"', True),
        ('"C:\\\\work"', True),
        ("--out gpu_worker/demo, see https://example.org/a/b", False),
        ('"/</w>": 270, "//": 5', False),
    ],
)
def test_absolute_paths_are_told_from_others(text: str, found: bool) -> None:
    assert bool(ABSOLUTE.search(text)) == found


def test_no_shipped_configuration_remembers_where_it_was_loaded_from() -> None:
    configurations = [path for path in FILES if path.suffix == ".json"]
    assert len(configurations) > 5
    for path in configurations:
        assert "_name_or_path" not in json.loads(path.read_text()), path


def test_the_files_are_as_small_as_promised() -> None:
    sizes = [path.stat().st_size for path in FILES]
    assert max(sizes) <= 15e6
    assert sum(sizes) <= 40e6


def written(path: Path) -> str:
    """A text file, or the header of a safetensors file."""
    if path.suffix != ".safetensors":
        return path.read_text()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(length).decode()
