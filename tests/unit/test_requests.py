"""Request bodies: what is refused says where, and seeds and prompts multiply in order."""

from typing import Any

import pytest

from supervisor.errors import Problem
from supervisor.requests import GenerateBody, LoadBody, decide_seeds, decode, expand

REFUSED: list[tuple[bytes, str | None, str]] = [
    (b"", None, "cannot read the body"),
    (b"{", None, "cannot read the body"),
    (b"[]", None, "cannot read the body"),
    (b"\xff\xfe", None, "cannot read the body"),
    (b'{"parameters":{"prompt":"\xff"}}', None, "cannot read the body"),
    (b'{"parameters":{"x":' + b"[" * 100_000, None, "nested too deeply"),
    (b'{"checkpoint": 5}', "checkpoint", "cannot accept checkpoint"),
    (b'{"chekpoint": "x"}', "chekpoint", "not known"),
    (b'{"loras": [{"model": "x", "weight": 1}]}', "loras[0].weight", "not known"),
    (b'{"loras": [{"model": "x", "scale": 1000}]}', "loras[0].scale", "100"),
    (b'{"priority": 101}', "priority", "100"),
    (b'{"timeout_seconds": 0}', "timeout_seconds", "> 0"),
    (b'{"timeout_seconds": NaN}', None, "cannot read the body"),
    (b'{"output_format": "gif"}', "output_format", "gif"),
    (b'{"batch_id": "../x"}', "batch_id", "regex"),
    (b'{"batch_id": ".x"}', "batch_id", "regex"),
    (b'{"previews": ' + b"9" * 400 + b"}", "previews", "cannot accept previews"),
]


@pytest.mark.parametrize(("body", "field", "words"), REFUSED)
def test_a_bad_body_is_refused_where_it_is_bad(body: bytes, field: str | None, words: str) -> None:
    with pytest.raises(Problem) as raised:
        decode(body, GenerateBody)
    assert raised.value.code == "invalid_request"
    assert raised.value.field == field
    assert words in raised.value.detail


def test_one_controlnet_may_come_without_a_list() -> None:
    assert decode(b"{}", GenerateBody).control_models == []
    assert decode(b'{"control_model": "a"}', GenerateBody).control_models == ["a"]
    assert decode(b'{"control_model": ["a", "b"]}', GenerateBody).control_models == ["a", "b"]


def test_a_worker_is_named_by_number_or_all() -> None:
    assert decode(b'{"checkpoint": "a", "worker": 1}', LoadBody).worker == 1
    assert decode(b'{"checkpoint": "a", "worker": "all"}', LoadBody).worker == "all"


def draw(below: int) -> int:
    return below - 1


@pytest.mark.parametrize(
    ("seed", "seeds"),
    [(7, [7, 8, 9]), (0, [0, 1, 2]), ([5, -1, 1], [5, 2**32 - 1, 1]),
     (None, [2**32 - 1, 2**32, 2**32 + 1]), (-1, [2**32 - 1, 2**32, 2**32 + 1])],
)  # fmt: skip
def test_every_picture_has_a_seed(seed: Any, seeds: list[int]) -> None:
    assert decide_seeds(seed, 3, draw) == seeds


def test_every_prompt_is_drawn_as_often_as_asked_in_order() -> None:
    parameters = {"prompt": ["a", "b"], "negative_prompt": "no", "num_images_per_prompt": 2,
                  "seed": 5, "width": 64}  # fmt: skip
    calls = expand(parameters, draw)
    assert [(call.parameters["prompt"], call.seed) for call in calls] == [
        ("a", 5), ("a", 6), ("b", 7), ("b", 8)
    ]  # fmt: skip
    assert parameters == {"negative_prompt": "no", "width": 64}
