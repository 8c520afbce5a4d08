"""Placement against simpler rules, in the simulation that docs/placement.md shows."""

import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
OURS, *OTHERS = ("expected completion (ours)", "any idle worker", "only the holder")


@pytest.fixture(scope="module")
def simulation() -> dict[str, Any]:
    names = runpy.run_path(str(ROOT / "scripts" / "simulate_placement"))
    return names | {"figures": cache(names["figures"])}


@pytest.mark.parametrize("swaps", ["from the page cache", "as Diffusers loads"])
@pytest.mark.parametrize("other", OTHERS)
def test_expected_completion_beats_simpler_rules(
    simulation: dict[str, Any], swaps: str, other: str
) -> None:
    figures = simulation["figures"](500, 0.5, simulation["SWAPS"][swaps], 1)
    mean, p95, _ = figures[OURS]
    assert mean < figures[other][0]
    assert p95 < figures[other][1]


def test_the_table_in_the_docs_is_the_simulations_own(simulation: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "placement.md").read_text()
    [kind, *_] = simulation["SWAPS"]
    for name, (mean, p95, swapped) in simulation["figures"](
        1500, 0.3, simulation["SWAPS"][kind], 1
    ).items():
        assert f"| {kind} | 30% | {name} | {mean:.2f} | {p95:.2f} | {swapped} |" in page
