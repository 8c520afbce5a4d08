"""When memory counts as lost."""

import pytest

from gpu_worker.wear import GB, worn


@pytest.mark.parametrize(
    ("allocated", "accounted", "total"),
    [(0, 0, 8 * GB), (5 * GB, 5 * GB, 8 * GB), (5 * GB + GB // 2, 5 * GB, 8 * GB),
     (7 * GB, 4 * GB, 80 * GB), (GB, 2 * GB, 8 * GB)],
)  # fmt: skip
def test_what_the_models_take_and_a_little_more_is_all_well(
    allocated: int, accounted: int, total: int
) -> None:
    assert worn(allocated, accounted, total) is None


@pytest.mark.parametrize(
    ("allocated", "accounted", "total", "words"),
    [(6 * GB, 5 * GB, 8 * GB, "1.00 GB"), (9 * GB, 4 * GB, 80 * GB, "5.00 GB")],
)
def test_what_nothing_accounts_for_is_lost(
    allocated: int, accounted: int, total: int, words: str
) -> None:
    found = worn(allocated, accounted, total)
    assert found is not None
    assert (found.reason, found.detail) == ("memory", f"cannot get {words} of its memory back")
