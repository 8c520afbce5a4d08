"""What is remembered of measured steps and swaps."""

import pytest

from supervisor.estimates import GUESSED_STEP_SECONDS, MAX_KINDS, WEIGHT, Averages, Estimates
from supervisor.placement import slowdown


def test_nothing_known_is_a_guess() -> None:
    averages = Averages(7.0)
    assert averages.expected("a") == 7.0
    assert not averages.knows("a")


def test_a_first_measurement_is_believed() -> None:
    averages = Averages(7.0)
    averages.measured("a", 1.0)
    assert averages.expected("a") == 1.0
    assert averages.knows("a")


def test_later_measurements_move_the_average() -> None:
    averages = Averages(7.0)
    averages.measured("a", 1.0)
    averages.measured("a", 2.0)
    assert averages.expected("a") == pytest.approx(1 + WEIGHT)


def test_an_unknown_model_is_taken_for_the_mean_of_others() -> None:
    averages = Averages(7.0)
    averages.measured("a", 1.0)
    averages.measured("b", 3.0)
    assert averages.expected("c") == pytest.approx(2.0)


def test_steps_that_were_shared_count_as_if_they_had_not_been() -> None:
    estimates = Estimates()
    assert estimates.steps.expected("a") == GUESSED_STEP_SECONDS
    estimates.stepped("a", slowdown(4) * 0.5, 4)
    assert estimates.steps.expected("a") == pytest.approx(0.5)
    estimates.stepped("b", 0.5, None)
    assert estimates.steps.expected("b") == 0.5


def test_what_was_measured_longest_ago_is_forgotten() -> None:
    averages = Averages(7.0)
    for index in range(MAX_KINDS):
        averages.measured(f"{index}", 1.0)
    averages.measured("0", 1.0)
    averages.measured("one more", 1.0)
    assert averages.knows("0")
    assert not averages.knows("1")
