"""ControlNets by request: one or several, their scales and ranges, against stock Diffusers."""

from pathlib import Path
from typing import Any

import pytest

from tests.tools.cells import control_name, controlnet, expected, parameters_for, pipeline_name
from tests.tools.compare import noise_picture, over_http, same
from tests.tools.server import RunningServer

TASKS = ("ControlNet", "ControlNetImg2Img", "ControlNetInpaint")
SETTINGS: dict[str, Any] = {
    "controlnet_conditioning_scale": 0.3,
    "control_guidance_start": 0.4,
    "control_guidance_end": 0.4,
    "guess_mode": True,
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "sdxl_turbo"])
def test_two_controlnets_with_lists_of_settings_equal_stock(
    served: RunningServer, model_dir: Path, family: str, task: str
) -> None:
    name = pipeline_name(family, task)
    given = parameters_for(name, family) | {
        "control_image": [noise_picture(2), noise_picture(3)],
        "controlnet_conditioning_scale": [0.7, 0.3],
        "control_guidance_start": [0.0, 0.3],
        "control_guidance_end": [0.7, 1.0],
        "num_inference_steps": 3,
    }
    names = [control_name(family, letter) for letter in "ab"]
    nets = [controlnet(model_dir, family, letter) for letter in "ab"]
    [image] = over_http(served, family, name, given | {"seed": 5}, control_model=names)
    assert same(image, expected(model_dir, family, name, given, 5, controlnet=nets))
    swapped = given | {"controlnet_conditioning_scale": [0.3, 0.7]}
    assert not same(image, expected(model_dir, family, name, swapped, 5, controlnet=nets))
    later = given | {"control_guidance_start": [0.3, 0.0]}
    assert not same(image, expected(model_dir, family, name, later, 5, controlnet=nets))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_controlnets_setting_equals_stock(
    served: RunningServer, model_dir: Path, family: str, task: str, setting: str
) -> None:
    name = pipeline_name(family, task)
    plain = parameters_for(name, family)
    given = plain | {setting: SETTINGS[setting]}
    net = controlnet(model_dir, family)
    asked = {"control_model": control_name(family)}
    [image] = over_http(served, family, name, given | {"seed": 6}, **asked)
    assert same(image, expected(model_dir, family, name, given, 6, controlnet=net))
    assert not same(image, expected(model_dir, family, name, plain, 6, controlnet=net))


def test_guess_mode_with_two_controlnets_and_one_in_a_list_equal_stock(
    served: RunningServer, model_dir: Path
) -> None:
    name = "StableDiffusionControlNetPipeline"
    given = parameters_for(name, "sd15") | {"guess_mode": True}
    net, other = (controlnet(model_dir, "sd15", letter) for letter in "ab")
    one = over_http(served, "sd15", name, given | {"seed": 4}, control_model=["sd15-a"])[0]
    assert same(one, expected(model_dir, "sd15", name, given, 4, controlnet=net))
    given["control_image"] = [noise_picture(2), noise_picture(3)]
    names = ["sd15-a", "sd15-b"]
    two = over_http(served, "sd15", name, given | {"seed": 4}, control_model=names)[0]
    assert same(two, expected(model_dir, "sd15", name, given, 4, controlnet=[net, other]))


def test_the_controlnet_is_chosen_by_each_request(served: RunningServer, model_dir: Path) -> None:
    name = "StableDiffusionXLControlNetPipeline"
    given = parameters_for(name, "sdxl")
    for letter in "aba":
        asked = {"control_model": f"sdxl-{letter}"}
        [image] = over_http(served, "sdxl", name, given | {"seed": 8}, **asked)
        net = controlnet(model_dir, "sdxl", letter)
        assert same(image, expected(model_dir, "sdxl", name, given, 8, controlnet=net))


def test_a_control_picture_of_another_size_is_fitted_as_stock_does(
    served: RunningServer, model_dir: Path
) -> None:
    name = "StableDiffusionControlNetPipeline"
    given = parameters_for(name, "sd15") | {"control_image": noise_picture(2, (96, 80))}
    [image] = over_http(served, "sd15", name, given | {"seed": 4}, control_model="sd15-a")
    net = controlnet(model_dir, "sd15")
    assert same(image, expected(model_dir, "sd15", name, given, 4, controlnet=net))


def test_controlnets_are_listed(served: RunningServer) -> None:
    families = ("sd15", "sd21", "sdxl")
    names = {f"{family}-{letter}" for family in families for letter in "ab"}
    assert names <= set(served.client.get("/controlnet").json())
