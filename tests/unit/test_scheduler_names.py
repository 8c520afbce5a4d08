"""Scheduler names, as the supervisor knows them."""

import pytest

from supervisor.errors import Problem
from supervisor.schedulers import A1111, CLASSES, by_a1111_name, by_class_name, listing


@pytest.mark.parametrize(
    ("name", "class_name", "settings"),
    [
        ("Euler a", "EulerAncestralDiscreteScheduler", {}),
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        (
            "DPM++ 2M SDE Karras",
            "DPMSolverMultistepScheduler",
            {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
        ),
        ("DPM++ 3M SDE Exponential", "DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("DPM2 a Karras", "KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
        ("LMS Karras", "LMSDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DPM++ SDE", "DPMSolverSDEScheduler", {"use_karras_sigmas": False}),
        ("Euler SGM Uniform", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("PLMS", "PNDMScheduler", {"skip_prk_steps": True}),
        ("Heun", "HeunDiscreteScheduler", {}),
        ("UniPC", "UniPCMultistepScheduler", {}),
        ("DDIM", "DDIMScheduler", {}),
        ("LCM", "LCMScheduler", {}),
    ],
)
def test_a_sampler_name_stands_for_a_class_and_settings(name, class_name, settings):
    found = by_a1111_name(name)
    assert found.class_name == class_name
    assert settings.items() <= found.settings.items()


@pytest.mark.parametrize("name", ["dpm++ 2m karras", "DPM++ 2M  Karras", "DPM++_2M_KARRAS"])
def test_case_and_spaces_do_not_matter(name):
    assert by_a1111_name(name) == A1111["DPM++ 2M Karras"]


@pytest.mark.parametrize("name", ["Restart", "DPM adaptive", "DDIM CFG++", "", "x" * 10_000])
def test_a_sampler_without_an_equivalent_is_refused(name):
    with pytest.raises(Problem, match="cannot use the A1111 scheduler") as refusal:
        by_a1111_name(name)
    assert refusal.value.code == "invalid_request"
    assert refusal.value.field == "a1111_scheduler"
    assert len(refusal.value.detail) < 400


def test_a_misspelt_sampler_is_answered_with_the_nearest_names():
    with pytest.raises(Problem, match=r"near to it are .*DPM\+\+ 2M Karras"):
        by_a1111_name("DPM++ 2M Karas")


def test_a_class_keeps_the_checkpoints_settings():
    assert by_class_name("EulerDiscreteScheduler").settings == {}


def test_an_unknown_class_is_answered_with_the_nearest_names():
    with pytest.raises(Problem, match=r"near to it are .*EulerDiscreteScheduler") as refusal:
        by_class_name("EulerScheduler")
    assert refusal.value.field == "scheduler"


def test_the_listing_holds_every_name_once():
    answer = listing()
    assert answer["schedulers"] == sorted(CLASSES)
    assert len(answer["a1111_schedulers"]) == len({name.lower() for name in A1111})
    for value in answer["a1111_schedulers"].values():
        assert value["scheduler"] in CLASSES
