"""A job's own scheduler, built from the checkpoint's and what the request wants.

Always a new instance: schedulers keep state, and jobs of one checkpoint run side by
side. The checkpoint's configuration is the base, so v-prediction, zero terminal SNR
and timestep spacing stay as it says unless the request's settings say otherwise.
"""

import inspect
import weakref
from typing import Any

import diffusers

from ipc.messages import Scheduler


class SchedulerError(ValueError):
    """The scheduler that the request wants cannot be used with its checkpoint."""

    code = "invalid_request"
    field = "scheduler"


def build(own: Any, wanted: Scheduler | None, seed: int) -> Any:
    """A fresh scheduler for one call of a pipeline.

    `own` is the checkpoint's scheduler; it is not changed. The noise of a stochastic
    scheduler comes from the generator that the pipeline hands it, or from `seed` where
    it draws its noise itself (DPMSolverSDEScheduler, which else uses the global
    generator). Raises SchedulerError.
    """
    kind = type(own) if wanted is None else compatible_class(own, wanted.class_name)
    settings = dict(wanted.settings) if wanted is not None else {}
    accepted = inspect.signature(kind.__init__).parameters
    strange = sorted(set(settings) - set(accepted))
    if strange:
        raise SchedulerError(f"cannot set {', '.join(strange)} of {kind.__name__}")
    if "noise_sampler_seed" in accepted:
        settings["noise_sampler_seed"] = seed
    try:
        return kind.from_config(own.config, **settings)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise SchedulerError(f"cannot use {kind.__name__} with this checkpoint: {error}") from error


def compatible_class(own: Any, name: str) -> type[Any]:
    """The Diffusers class `name`, if it fits the checkpoint's own. Raises SchedulerError."""
    right = {each.__name__: each for each in compatible_classes(own)}
    if name in right:
        return right[name]
    listed = ", ".join(sorted(right))
    raise SchedulerError(
        f"cannot use {name} with this checkpoint, whose own is {type(own).__name__}: "
        f"right would be one of {listed}"
    )


def compatible_classes(own: Any) -> set[type[Any]]:
    """What `own` says it is compatible with, and the distilled samplers among their like.

    LCM and TCD name no compatible classes and are named by none, yet Diffusers' pages
    build them from the configuration of any checkpoint of Stable Diffusion, and back.
    """
    right = set(own.compatibles)
    alike = {*diffusers.DDIMScheduler._get_compatibles(), *DISTILLED}
    return right | alike if type(own) in alike else right


DISTILLED = (diffusers.LCMScheduler, diffusers.TCDScheduler)


ON_DEVICE = (
    diffusers.KDPM2DiscreteScheduler,
    diffusers.KDPM2AncestralDiscreteScheduler,
    diffusers.LCMScheduler,
)
"""Their steps reckon with numbers that lie beside the timesteps, rounded as a GPU does it."""


def timed_on_host(scheduler: Any) -> Any:
    """The scheduler, so changed that its timesteps stay on the host, where most look them up:
    read back from a GPU, each would wait for all of its work.

    For pipelines with a UNet, which takes a timestep from anywhere. ON_DEVICE's stay as they are.
    """
    accepted = inspect.signature(scheduler.set_timesteps)
    if isinstance(scheduler, ON_DEVICE) or "device" not in accepted.parameters:
        return scheduler
    own, itself = type(scheduler).set_timesteps, weakref.ref(scheduler)

    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        given = accepted.bind(*args, **kwargs)
        given.arguments["device"] = "cpu"
        own(itself(), *given.args, **given.kwargs)

    # Pipelines look whether timesteps and sigmas of one's own are taken.
    set_timesteps.__signature__ = accepted  # type: ignore[attr-defined]
    scheduler.set_timesteps = set_timesteps
    return scheduler
