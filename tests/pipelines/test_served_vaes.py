"""VAEs by request against stock Diffusers; LAUNCH_VAE and safety checkers have a file each."""

from pathlib import Path
from typing import Any

import diffusers
import pytest

from tests.tools.cells import controlnet, expected, parameters_for, pipeline_name
from tests.tools.compare import asked, over_http, same
from tests.tools.server import RunningServer


def vae(model_dir: Path, family: str) -> Any:
    name = family.removesuffix("_turbo").removesuffix("_refiner")
    return diffusers.AutoencoderKL.from_pretrained(model_dir / "vae" / name)


@pytest.mark.parametrize("task", ["", "Img2Img", "Inpaint"])
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "sdxl_turbo"])
def test_a_vae_equals_stock_and_is_gone_for_the_next_request(
    served: RunningServer, model_dir: Path, family: str, task: str
) -> None:
    name = pipeline_name(family, task)
    given = parameters_for(name, family)
    chosen = family.removesuffix("_turbo")
    [image] = over_http(served, family, name, given | {"seed": 5}, vae=chosen)
    [after] = over_http(served, family, name, given | {"seed": 5})
    assert same(image, expected(model_dir, family, name, given, 5, vae=vae(model_dir, family)))
    assert same(after, expected(model_dir, family, name, given, 5))
    assert not same(image, after)


def test_a_vae_beside_a_controlnet_equals_stock(served: RunningServer, model_dir: Path) -> None:
    name = "StableDiffusionControlNetInpaintPipeline"
    given = parameters_for(name, "sd15")
    chosen = {"vae": "sd15", "control_model": "sd15-b"}
    [image] = over_http(served, "sd15", name, given | {"seed": 5}, **chosen)
    parts = {"vae": vae(model_dir, "sd15"), "controlnet": controlnet(model_dir, "sd15", "b")}
    assert same(image, expected(model_dir, "sd15", name, given, 5, **parts))


def test_the_refiner_takes_a_vae_too(served: RunningServer, model_dir: Path) -> None:
    name = "StableDiffusionXLImg2ImgPipeline"
    given = parameters_for(name, "sdxl_refiner")
    [image] = over_http(served, "sdxl_refiner", name, given | {"seed": 5}, vae="sdxl")
    right = vae(model_dir, "sdxl")
    assert same(image, expected(model_dir, "sdxl_refiner", name, given, 5, vae=right))
    assert not same(image, expected(model_dir, "sdxl_refiner", name, given, 5))


def test_a_vae_of_sd15_fits_sd21_whose_latents_are_the_same(
    served: RunningServer, model_dir: Path
) -> None:
    given = parameters_for("StableDiffusionPipeline", "sd21")
    [image] = over_http(served, "sd21", "StableDiffusionPipeline", given | {"seed": 5}, vae="sd15")
    right = vae(model_dir, "sd15")
    name = "StableDiffusionPipeline"
    assert same(image, expected(model_dir, "sd21", name, given, 5, vae=right))


@pytest.mark.parametrize(("family", "other"), [("sd15", "sdxl"), ("sdxl", "sd21")])
def test_a_vae_of_another_family_is_refused_and_both_are_named(
    served: RunningServer, model_dir: Path, family: str, other: str
) -> None:
    name = pipeline_name(family)
    given = parameters_for(name, family)
    answer = asked(served, family, name, given | {"seed": 5}, vae=other)
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, "incompatible_model")
    assert problem["field"] == "vae"
    assert f"'{family}'" in problem["detail"]
    assert f"'{other}'" in problem["detail"]
    [after] = over_http(served, family, name, given | {"seed": 5})
    assert same(after, expected(model_dir, family, name, given, 5))


def test_a_checkpoint_loaded_with_a_vae_is_told_in_placement(served: RunningServer) -> None:
    answer = served.client.post("/load/checkpoint", json={"checkpoint": "sd15", "vae": "sd15"})
    assert answer.status_code == 200, answer.text
    [worker] = served.placement()
    vaes = {model["checkpoint"]: model["vae"] for model in worker["models"]}
    assert vaes["sd15"] == "sd15"


def test_vaes_are_listed(served: RunningServer) -> None:
    assert {"sd15", "sd21", "sdxl"} <= set(served.client.get("/vae").json())
