"""The README's support table, made of the tests' own results."""

from collections.abc import Mapping
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- support table -->\n", "<!-- end of support table -->"
FAMILIES = {"sd15": "SD1.5", "sd21": "SD2.1", "sdxl": "SDXL", "sdxl_turbo": "SDXL Turbo"}

Results = Mapping[tuple[str, str], bool]


def render(results: Results) -> str:
    """A row per pipeline class, a column per family; a dash where they do not fit."""
    pipelines = dict.fromkeys(pipeline for pipeline, _ in results)
    rows = [
        ["pipeline", *FAMILIES.values()],
        ["---", *([":-:"] * len(FAMILIES))],
        *(
            [f"`{pipeline}`", *(_mark(results.get((pipeline, family))) for family in FAMILIES)]
            for pipeline in pipelines
        ),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _mark(passed: bool | None) -> str:
    return {None: "-", True: "✓", False: "✗"}[passed]


def shown() -> str:
    return README.read_text().partition(BEGIN)[2].partition(END)[0]


def write(table: str) -> None:
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    README.write_text(before + begin + table + end + after)
