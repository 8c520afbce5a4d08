"""Schedulers by class and by A1111 name, against stock pipelines given the same ones."""

from pathlib import Path
from typing import Any

import diffusers
import pytest

from tests.tools.cells import expected, parameters_for, pipeline_name
from tests.tools.compare import asked, components, over_http, same
from tests.tools.server import RunningServer

STEPS = 5
"""Enough for third-order solvers to be told from second-order ones."""

KARRAS = {"use_karras_sigmas": True}
BETA = {"use_beta_sigmas": True, "timestep_spacing": "linspace"}
ODE = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
SDE = ODE | {"algorithm_type": "sde-dpmsolver++"}
A1111: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "LMS Karras": ("LMSDiscreteScheduler", KARRAS),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", ODE),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", ODE | KARRAS),
    "DPM++ 2M SDE Karras": ("DPMSolverMultistepScheduler", SDE | KARRAS),
    "DPM++ 2M SDE Heun": ("DPMSolverMultistepScheduler", SDE | {"solver_type": "heun"}),
    "DPM++ 3M SDE": ("DPMSolverMultistepScheduler", SDE | {"solver_order": 3}),
    "DPM++ SDE": ("DPMSolverSDEScheduler", {}),
    "Euler Beta": ("EulerDiscreteScheduler", BETA),
    "Euler SGM Uniform": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DDIM": ("DDIMScheduler", {}),
    "LCM": ("LCMScheduler", {}),
}
STOCHASTIC = ("Euler a", "DPM2 a", "DPM++ 2M SDE", "DPM++ 3M SDE", "DPM++ SDE", "LCM")
CLASSES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)


def given_for(family: str) -> dict[str, Any]:
    return parameters_for(pipeline_name(family), family) | {"num_inference_steps": STEPS}


def right(
    model_dir: Path, family: str, seed: int, class_name: str, settings: dict[str, Any]
) -> Any:
    """Stock's picture with that scheduler over the checkpoint's own configuration."""
    own = components(model_dir / "checkpoints" / family)["scheduler"]
    if class_name == "DPMSolverSDEScheduler":
        settings = settings | {"noise_sampler_seed": seed}
    # Given to the pipeline's constructor, which corrects what would draw poor pictures.
    scheduler = getattr(diffusers, class_name).from_config(own.config, **settings)
    name = pipeline_name(family)
    return expected(model_dir, family, name, given_for(family), seed, scheduler=scheduler)


@pytest.mark.parametrize("name", A1111)
def test_an_a1111_name_equals_its_class_and_settings(
    served: RunningServer, model_dir: Path, name: str
) -> None:
    family = "sd15"
    sent = given_for(family) | {"seed": 7}
    [image] = over_http(served, family, pipeline_name(family), sent, a1111_scheduler=name)
    assert same(image, right(model_dir, family, 7, *A1111[name]))
    other = "DPM++ 2M" if A1111[name][0] != "DPMSolverMultistepScheduler" else "Euler"
    assert not same(image, right(model_dir, family, 7, *A1111[other]))


@pytest.mark.parametrize("family", ["sd21", "sdxl"])
@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "euler_a", "UniPC", "DPM++ SDE"])
def test_an_a1111_name_keeps_what_the_checkpoint_predicts(
    served: RunningServer, model_dir: Path, name: str, family: str
) -> None:
    sent = given_for(family) | {"seed": 7}
    [image] = over_http(served, family, pipeline_name(family), sent, a1111_scheduler=name)
    assert same(image, right(model_dir, family, 7, *A1111[name]))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_class_equals_stock(
    served: RunningServer, model_dir: Path, name: str, family: str
) -> None:
    sent = given_for(family) | {"seed": 7}
    [image] = over_http(served, family, pipeline_name(family), sent, scheduler=name)
    assert same(image, right(model_dir, family, 7, name, {}))
    own = expected(model_dir, family, pipeline_name(family), given_for(family), 7)
    is_own = type(components(model_dir / "checkpoints" / family)["scheduler"]).__name__ == name
    assert same(image, own) is is_own


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_sampler_repeats_by_the_seed(served: RunningServer, name: str) -> None:
    pipeline, given = pipeline_name("sd15"), given_for("sd15")
    first, second = over_http(
        served,
        "sd15",
        pipeline,
        given | {"seed": 7, "num_images_per_prompt": 2},
        a1111_scheduler=name,
    )
    [again] = over_http(served, "sd15", pipeline, given | {"seed": 7}, a1111_scheduler=name)
    [next_one] = over_http(served, "sd15", pipeline, given | {"seed": 8}, a1111_scheduler=name)
    assert same(first, again)
    assert same(second, next_one)
    assert not same(first, second)


@pytest.mark.parametrize(
    ("family", "name"),
    [("sd15", "FlowMatchEulerDiscreteScheduler"), ("sdxl", "VQDiffusionScheduler")],
)
def test_a_class_that_does_not_fit_is_refused_and_the_right_ones_are_named(
    served: RunningServer, model_dir: Path, family: str, name: str
) -> None:
    pipeline, sent = pipeline_name(family), given_for(family) | {"seed": 7}
    answer = asked(served, family, pipeline, sent, scheduler=name)
    problem = answer.json()
    assert answer.status_code == 422
    assert problem["field"] == "scheduler"
    assert name in problem["detail"]
    assert "DPMSolverMultistepScheduler" in problem["detail"]
    [after] = over_http(served, family, pipeline, sent)
    assert same(after, expected(model_dir, family, pipeline, given_for(family), 7))


def test_schedulers_are_listed_with_what_a1111_names_stand_for(served: RunningServer) -> None:
    listed = served.client.get("/schedulers").json()
    assert set(CLASSES) <= set(listed["schedulers"])
    names = listed["a1111_schedulers"]
    for name, (class_name, settings) in A1111.items():
        found = names["Euler a" if name == "euler_a" else name]
        assert found["scheduler"] == class_name
        assert settings.items() <= found["settings"].items()
