"""Names that lead out, pickles in disguise, broken weights and folders with code in them."""

import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.tools import hostile_models
from tests.tools.hostile_models import BROKEN, FORBIDDEN
from tests.tools.scripted_worker import solid_png
from tests.tools.server import SCRIPTED, RunningServer, running

PARAMETERS = {"prompt": "a fox", "num_inference_steps": 1}
CODE_FOLDERS = ("own-pipeline", "own-pipeline-name", "own-unet", "own-module", "pickled")
Body = dict[str, Any]
REQUESTS: dict[str, Any] = {
    "checkpoint": lambda name: ("/generate", {"checkpoint": name}),
    "vae": lambda name: ("/generate", {"vae": name}),
    "control_model": lambda name: ("/generate", {"control_model": name}),
    "loras": lambda name: ("/generate", {"loras": [{"model": name}]}),
    "refiner_model": lambda name: ("/generate", {"refiner_model": name}),
    "load": lambda name: ("/load/checkpoint", {"checkpoint": name}),
    "load's vae": lambda name: ("/load/checkpoint", {"checkpoint": "good", "vae": name}),
    "unload": lambda name: ("/unload/checkpoint", {"checkpoint": name}),
    "model": lambda name: ("/v1/images/generations", {"model": name, "prompt": "a"}),
}
"""Every field that names a model."""
FIELDS = {"load": "checkpoint", "load's vae": "vae", "unload": "checkpoint"}


@pytest.fixture(scope="module")
def mark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Appears when code out of a model was run."""
    return tmp_path_factory.mktemp("mark") / "exploded"


@pytest.fixture(scope="module")
def trapped(tmp_path_factory: pytest.TempPathFactory, mark: Path) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("trapped")
    models = hostile_models.build(root, mark)
    with running(root, SCRIPTED, MODEL_DIR=str(models), HUB_ALLOW="nobody") as server:
        yield server


def asked(server: RunningServer, place: str, name: str) -> httpx.Response:
    route, body = REQUESTS[place](name)
    if route == "/generate":
        body = {"checkpoint": "good", "parameters": control(place), **body}
    return server.client.post(route, json=body)


def control(place: str) -> Body:
    picture = base64.b64encode(solid_png(64, 64, bytes(3))).decode()
    more = {"control_image": picture} if place == "control_model" else {}
    return PARAMETERS | more


def problem(answer: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    return body.get("error", body)


def without_id(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "request_id"}


@pytest.mark.parametrize("place", list(REQUESTS))
def test_forbidden_and_missing_names_get_the_same_answer(
    trapped: RunningServer, place: str
) -> None:
    missing = asked(trapped, place, "missing")
    assert missing.status_code == 404
    expected = without_id(problem(missing))
    assert expected["code"] == "unknown_model"
    assert expected.get("field", expected.get("param")) == FIELDS.get(place, place)
    for name in FORBIDDEN:
        answer = asked(trapped, place, name)
        assert answer.status_code == 404, (name, answer.text)
        assert without_id(problem(answer)) == expected, name


@pytest.mark.parametrize("name", FORBIDDEN)
def test_names_that_lead_out_are_not_models_of_openais(trapped: RunningServer, name: str) -> None:
    answer = trapped.client.get("/v1/models/" + name.replace("\0", "%00").replace("\n", "%0a"))
    # The client takes dots out of an address; what is left may be a route of its own.
    assert answer.status_code == 404 or answer.url.path in ("/v1/models/good",), answer.text


def test_nothing_forbidden_is_listed(trapped: RunningServer) -> None:
    names = set(trapped.client.get("/checkpoints").json())
    assert "good" in names
    assert not names & set(FORBIDDEN)
    ids = {model["id"] for model in trapped.client.get("/v1/models").json()["data"]}
    assert ids == names


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("place", ["checkpoint", "vae", "control_model", "loras", "load"])
def test_a_file_that_is_no_safetensors_is_refused_within_a_second(
    trapped: RunningServer, mark: Path, place: str, name: str
) -> None:
    began = time.monotonic()
    answer = asked(trapped, place, name)
    assert time.monotonic() - began < 1.0
    assert 400 <= answer.status_code < 500, answer.text
    found = problem(answer)
    assert found["code"] in ("invalid_model", "unknown_model", "incompatible_model")
    assert found["field"] == FIELDS.get(place, place)
    assert str(trapped.log.parent) not in answer.text
    assert not mark.exists(), "a pickle was opened"


@pytest.mark.parametrize("name", CODE_FOLDERS)
def test_a_folder_with_code_or_pickles_is_refused(
    trapped: RunningServer, mark: Path, name: str
) -> None:
    for place in ("checkpoint", "load", "model"):
        answer = asked(trapped, place, name)
        assert 400 <= answer.status_code < 500, answer.text
        assert problem(answer)["code"] in ("invalid_model", "invalid_request")
        assert str(trapped.log.parent) not in answer.text
    assert not mark.exists(), "code out of a model was run"


def test_the_workers_have_seen_nothing_of_it(trapped: RunningServer) -> None:
    assert [worker["restarts"] for worker in trapped.placement()] == [0]
    assert trapped.generate({"checkpoint": "good", "parameters": PARAMETERS}).status_code == 200
