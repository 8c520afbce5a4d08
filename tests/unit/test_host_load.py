"""What the bench of a whole host reckons from answers."""

import math
import random
from collections import Counter

from scripts.host_load import Answer, percentile, rate, zipf
from scripts.host_probe import Sample


def answer(sent: float, done: float, status: int = 200) -> Answer:
    return Answer("sd15-0", sent, done, status, {"queue_time": 0.5, "worker": 1}, "")


def test_a_picture_counts_by_the_share_of_its_time_within_the_measurement() -> None:
    whole, half, outside = answer(2, 4), answer(9, 11), answer(20, 30)
    assert rate([whole, half, outside], 0, 10) == (1 + 0.5) / 10


def test_a_refusal_is_no_picture() -> None:
    assert rate([answer(1, 2, status=503)], 0, 10) == 0


def test_callers_that_never_pause_give_the_rate_that_they_have() -> None:
    """Three callers, a picture each 0.7 s, cut anywhere."""
    answers = [answer(n * 0.7 + c / 5, (n + 1) * 0.7 + c / 5) for n in range(99) for c in range(3)]
    assert math.isclose(rate(answers, 10.1, 23.37), 3 / 0.7)


def test_the_99th_percentile_is_above_99_of_a_hundred_values() -> None:
    assert percentile(range(100), 99) == 99
    assert percentile(range(100), 50) == 50
    assert math.isnan(percentile([], 99))


def test_the_first_model_is_wanted_most_and_the_last_now_and_then() -> None:
    draws = random.Random(1)
    seen = Counter(zipf(["a", "b", "c"], draws) for _ in range(6000))
    assert seen["a"] > 1.5 * seen["b"] > 1.5 * seen["c"] > 0


def test_a_model_in_host_memory_is_not_held_on_the_device() -> None:
    models = [{"checkpoint": "x", "tier": "device"}, {"checkpoint": "y", "tier": "host"}]
    sample = Sample(0.0, workers=[{"id": 3, "models": models}])
    assert sample.holds(3, "x")
    assert not sample.holds(3, "y")
    assert not sample.holds(3, "z")
