"""Schedulers against stock Diffusers: same class, same settings, same picture."""

import functools
import gc
import inspect
import weakref

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from gpu_worker.schedulers import SchedulerError, build, timed_on_host
from ipc.messages import Scheduler
from supervisor.schedulers import A1111, CLASSES
from tests.tools import stock

STEPS = 5
"""Enough for third-order solvers to be told from second-order ones."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Pixels are compared, and two threads may sum in another order than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipe():
    return stock.pipeline("sd15")


def latents(pipe, scheduler, seed=7):
    pipe.scheduler = scheduler
    return stock.latents(pipe, seed, num_inference_steps=STEPS)


@pytest.fixture(scope="module")
def own():
    return stock.pipeline("sd15").scheduler


@pytest.fixture(scope="module")
def drawn(pipe):
    """The latents of an A1111 name with seed 7, computed once."""
    own = stock.pipeline("sd15").scheduler

    @functools.cache
    def drawn(name: str) -> torch.Tensor:
        return latents(pipe, build(own, A1111[name], 7))

    return drawn


def test_the_list_of_classes_is_what_diffusers_exports():
    exported = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    classes = [getattr(diffusers, name) for name in exported]
    names = [each.__name__ for each in classes if issubclass(each, SchedulerMixin)]
    assert list(CLASSES) == sorted(names), "write the right side into supervisor/schedulers.py"


@pytest.mark.parametrize("name", A1111)
def test_every_setting_of_an_a1111_name_is_known_to_its_class(name):
    wanted = A1111[name]
    accepted = inspect.signature(getattr(diffusers, wanted.class_name).__init__).parameters
    assert set(wanted.settings) <= set(accepted)


@pytest.mark.parametrize("name", A1111)
def test_an_a1111_name_gives_the_pictures_of_its_class_and_settings(pipe, drawn, name, own):
    wanted = A1111[name]
    settings = dict(wanted.settings)
    if wanted.class_name == "DPMSolverSDEScheduler":
        settings["noise_sampler_seed"] = 7
    usual = getattr(diffusers, wanted.class_name).from_config(own.config, **settings)
    assert torch.equal(drawn(name), latents(pipe, usual))


def test_each_sampler_draws_a_picture_of_its_own(drawn):
    # Simple is left out: in Diffusers it has the same settings as SGM Uniform.
    names = [name for name in A1111 if not name.endswith(" Simple")]
    seen: dict[bytes, str] = {}
    for name in names:
        assert torch.isfinite(drawn(name)).all(), name
        other = seen.setdefault(drawn(name).numpy().tobytes(), name)
        assert other == name, f"{name} draws what {other} draws"


@pytest.mark.parametrize("name", [each for each in A1111 if each.endswith((" a", "SDE", "LCM"))])
def test_a_stochastic_sampler_takes_its_noise_from_the_seed(pipe, name, own):
    torch.manual_seed(1)
    first = latents(pipe, build(own, A1111[name], 7), seed=7)
    torch.manual_seed(2)
    again = latents(pipe, build(own, A1111[name], 7), seed=7)
    other = latents(pipe, build(own, A1111[name], 8), seed=8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_largest_seed_is_taken(pipe, own):
    built = build(own, A1111["DPM++ SDE"], 2**63 - 1)
    assert torch.isfinite(latents(pipe, built)).all()


def test_the_noise_of_dpmpp_sde_changes_with_the_jobs_seed(pipe, own):
    first = latents(pipe, build(own, A1111["DPM++ SDE"], 7), seed=7)
    assert not torch.equal(first, latents(pipe, build(own, A1111["DPM++ SDE"], 8), seed=7))


def test_without_a_wish_the_checkpoints_own_class_is_built_anew(pipe, own):
    built = build(own, None, 7)
    assert type(built) is type(own)
    assert built is not own
    assert torch.equal(latents(pipe, built), latents(pipe, own))


@pytest.mark.parametrize("name", ["Euler", "DPM++ 2M Karras", "UniPC", "Euler a"])
def test_v_prediction_and_zero_terminal_snr_stay(name):
    snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    own = diffusers.DDIMScheduler.from_config(stock.pipeline("sd21").scheduler.config, **snr)
    built = build(own, A1111[name], 7)
    assert built.config.prediction_type == "v_prediction"
    assert built.config.timestep_spacing == "trailing"
    assert built.config.rescale_betas_zero_snr


def test_a_name_without_karras_takes_them_off_a_checkpoint_that_has_them():
    own = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    assert not build(own, A1111["DPM++ 2M"], 7).config.use_karras_sigmas
    assert build(own, Scheduler(class_name="LMSDiscreteScheduler"), 7).config.use_karras_sigmas


def test_a_class_that_does_not_fit_is_refused_and_the_right_ones_are_named(own):
    wanted = Scheduler(class_name="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(SchedulerError, match=r"FlowMatchEuler.*PNDMScheduler.*DDIMScheduler.*LMS"):
        build(own, wanted, 7)


def test_a_checkpoint_with_a_distilled_sampler_takes_ordinary_ones_too(pipe, own):
    distilled = build(own, A1111["LCM"], 7)
    usual = diffusers.EulerDiscreteScheduler.from_config(distilled.config)
    assert torch.equal(latents(pipe, build(distilled, A1111["Euler"], 7)), latents(pipe, usual))


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "logging", "NoSuchScheduler"])
def test_what_is_no_scheduler_is_refused(name, own):
    with pytest.raises(SchedulerError, match=f"cannot use {name}"):
        build(own, Scheduler(class_name=name), 7)


def test_a_setting_that_the_class_lacks_is_refused(own):
    wanted = Scheduler(class_name="DDIMScheduler", settings={"use_karras_sigmas": True})
    with pytest.raises(SchedulerError, match="cannot set use_karras_sigmas of DDIMScheduler"):
        build(own, wanted, 7)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerAncestralDiscreteScheduler"])
def test_timesteps_stay_on_the_host_and_are_the_same(own, name):
    wanted = Scheduler(class_name=name)
    expected, scheduler = build(own, wanted, 0), timed_on_host(build(own, wanted, 0))
    expected.set_timesteps(STEPS)
    for set_timesteps in (
        lambda: scheduler.set_timesteps(STEPS, "meta"),
        lambda: scheduler.set_timesteps(STEPS, device="meta"),
    ):
        set_timesteps()
        assert torch.equal(scheduler.timesteps, expected.timesteps)
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    assert accepted == inspect.signature(expected.set_timesteps).parameters


def test_a_scheduler_timed_on_the_host_is_no_cycle(own):
    scheduler = timed_on_host(build(own, None, 0))
    scheduler.set_timesteps(STEPS, device="meta")
    gone = weakref.ref(scheduler)
    gc.disable()
    try:
        del scheduler
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["LCMScheduler", "KDPM2DiscreteScheduler"])
def test_those_that_reckon_beside_their_timesteps_stay_where_they_are(own, name):
    scheduler = build(own, Scheduler(class_name=name), 0)
    assert "set_timesteps" not in vars(timed_on_host(scheduler))
