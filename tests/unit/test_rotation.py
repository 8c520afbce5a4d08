"""Whose turn it is when workers are replaced one at a time."""

from supervisor.rotation import Rotation


def test_one_is_replaced_after_the_other() -> None:
    rotation = Rotation()
    assert rotation.requested([0, 1, 2]) == 0
    assert rotation.came_back(0) == 1
    assert rotation.came_back(1) == 2
    assert rotation.came_back(2) is None


def test_nobody_is_replaced_twice_at_a_time() -> None:
    rotation = Rotation()
    assert rotation.requested([0, 1]) == 0
    assert rotation.requested([0, 1]) is None
    assert rotation.came_back(0) == 1


def test_whoever_was_replaced_before_a_second_request_is_replaced_again() -> None:
    rotation = Rotation()
    rotation.requested([0, 1])
    rotation.came_back(0)
    rotation.requested([0, 1])
    assert rotation.came_back(1) == 0
    assert rotation.came_back(0) is None


def test_a_worker_that_comes_back_out_of_turn_is_not_replaced_again() -> None:
    rotation = Rotation()
    rotation.requested([0, 1, 2])
    assert rotation.came_back(1) is None
    assert rotation.came_back(0) == 2


def test_of_no_workers_none_is_replaced() -> None:
    assert Rotation().requested([]) is None
    assert Rotation().came_back(0) is None
