"""Requests under which workers died, and how long that is held against them."""

from typing import Any

import pytest
from msgspec.structs import replace

from ipc import messages as m
from supervisor.suspects import POISON_SECONDS, Suspects, Work, fingerprint
from tests.tools.fleets import generate, model

SAME = [
    generate("b", parameters={"prompt": "a"}),
    generate("c", parameters={"prompt": "a"}, calls=1, priority=9, alone=True),
]


def a_request(**changes: Any) -> m.Generate:
    return replace(generate("a", parameters={"prompt": "a"}), **changes)


@pytest.mark.parametrize("other", SAME)
def test_a_request_is_known_again_whatever_its_id_and_priority(other: Work) -> None:
    assert fingerprint(a_request()) == fingerprint(other)


def test_a_request_is_known_again_with_another_seed() -> None:
    assert fingerprint(a_request(calls=[m.Call(seed=8)])) == fingerprint(a_request())


@pytest.mark.parametrize(
    "other",
    [
        a_request(parameters={"prompt": "b"}),
        a_request(calls=[m.Call(seed=0, parameters={"prompt": "b"})]),
        a_request(checkpoint=model("dog")),
        m.Load(job="a", checkpoint=model()),
    ],
)
def test_another_request_is_another(other: Work) -> None:
    assert fingerprint(a_request()) != fingerprint(other)


def test_two_deaths_make_poison() -> None:
    suspects = Suspects()
    assert suspects.died_with(a_request(), 0) == 1
    assert not suspects.are_poison(a_request(), 0)
    assert suspects.died_with(a_request(), 1) == 2
    assert suspects.are_poison(a_request(), 1)
    assert not suspects.are_poison(a_request(checkpoint=model("dog")), 1)


def test_poison_is_forgotten_after_a_while() -> None:
    suspects = Suspects()
    suspects.died_with(a_request(), 0)
    suspects.died_with(a_request(), 1)
    assert suspects.are_poison(a_request(), POISON_SECONDS)
    assert not suspects.are_poison(a_request(), 1 + POISON_SECONDS)


def test_a_success_clears_the_name() -> None:
    suspects = Suspects()
    suspects.succeeded(a_request())
    suspects.died_with(a_request(), 0)
    suspects.succeeded(a_request())
    assert suspects.died_with(a_request(), 1) == 1
