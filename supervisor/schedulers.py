"""Schedulers by name: Diffusers' classes, and what the sampler names of A1111 stand for.

Pure, and without Diffusers: the list of classes is written here and a test compares
it with the installed one. Whether a class fits a checkpoint is the worker's to say,
since only the checkpoint's own scheduler knows what it is compatible with.
"""

import difflib
from typing import Any

from ipc.messages import Scheduler
from supervisor.errors import Problem

CLASSES = (
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "CMStochasticIterativeScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DDPMWuerstchenScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "DiscreteDDIMScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EntropyBoundScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeliosDMDScheduler",
    "HeliosScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KarrasVeScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
    "MiniMaxH3Scheduler",
    "PNDMScheduler",
    "PiflowScheduler",
    "RFD4ProteinaScheduler",
    "RePaintScheduler",
    "SASolverScheduler",
    "SCMScheduler",
    "ScoreSdeVeScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
    "UniPCMultistepScheduler",
    "VQDiffusionScheduler",
)
"""Every scheduler class that the installed Diffusers exports, in order."""

_ODE = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_SDE = _ODE | {"algorithm_type": "sde-dpmsolver++"}

_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    # As in the table of Diffusers' page on schedulers. `DPM++ 2S a` is there as the nearest
    # thing that Diffusers has; `DPM++ SDE` is the port of k-diffusion's own sampler.
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2S a": ("DPMSolverSinglestepScheduler", _ODE),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", _ODE),
    "DPM++ SDE": ("DPMSolverSDEScheduler", {}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", _SDE),
    "DPM++ 2M SDE Heun": ("DPMSolverMultistepScheduler", _SDE | {"solver_type": "heun"}),
    "DPM++ 3M SDE": ("DPMSolverMultistepScheduler", _SDE | {"solver_order": 3}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DDIM": ("DDIMScheduler", {}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "LCM": ("LCMScheduler", {}),
}

_NO_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    # The setting that a class must have, and what is set.
    "Karras": ("use_karras_sigmas", {}),
    "Exponential": ("use_exponential_sigmas", {"timestep_spacing": "linspace"}),
    "Beta": ("use_beta_sigmas", {"timestep_spacing": "linspace"}),
    "SGM Uniform": ("timestep_spacing", {"timestep_spacing": "trailing"}),
    "Simple": ("timestep_spacing", {"timestep_spacing": "trailing"}),
}
_WITHOUT_SCHEDULES = {"UniPC", "DDIM", "PLMS", "LCM"}
"""Samplers that take no schedule in A1111."""
_LACKS = {
    "EulerAncestralDiscreteScheduler": set(_NO_SIGMAS),
    "DDIMScheduler": set(_NO_SIGMAS),
    "PNDMScheduler": set(_NO_SIGMAS),
    "LCMScheduler": set(_NO_SIGMAS),
    "DPMSolverSinglestepScheduler": {"timestep_spacing"},
}
"""Settings used here that a class does not have."""


def _scheduler(class_name: str, settings: dict[str, Any]) -> Scheduler:
    """A name says all: a checkpoint whose own scheduler uses Karras' sigmas loses them here."""
    lacks = _LACKS.get(class_name, set())
    laid = {key: value for key, value in (_NO_SIGMAS | settings).items() if key not in lacks}
    return Scheduler(class_name=class_name, settings=laid)


def _table() -> dict[str, Scheduler]:
    table = {}
    for sampler, (class_name, settings) in _SAMPLERS.items():
        table[sampler] = _scheduler(class_name, settings)
        for schedule, (needed, chosen) in _SCHEDULES.items():
            if sampler in _WITHOUT_SCHEDULES or needed in _LACKS.get(class_name, set()):
                continue
            switched = {needed: True} | settings | chosen
            table[f"{sampler} {schedule}"] = _scheduler(class_name, switched)
    return table


A1111: dict[str, Scheduler] = _table()
"""Class and settings by A1111's name, for every name that Diffusers has an equivalent for."""


def _folded(name: str) -> str:
    return name.replace(" ", "").replace("_", "").lower()


_BY_FOLDED_NAME = {_folded(name): name for name in A1111}


def by_a1111_name(name: str) -> Scheduler:
    """The class and settings of a sampler name; case, spaces and underscores do not matter.

    Raises Problem `invalid_request`, field `a1111_scheduler`.
    """
    found = _BY_FOLDED_NAME.get(_folded(name))
    if found is not None:
        return A1111[found]
    near = difflib.get_close_matches(_folded(name), _BY_FOLDED_NAME, n=3)
    raise Problem(
        "invalid_request",
        f"cannot use the A1111 scheduler {name[:80]!r}: it has no equivalent here; "
        + _instead([_BY_FOLDED_NAME[match] for match in near]),
        field="a1111_scheduler",
    )


def by_class_name(name: str) -> Scheduler:
    """A Diffusers class with the checkpoint's own settings.

    Raises Problem `invalid_request`, field `scheduler`.
    """
    if name in CLASSES:
        return Scheduler(class_name=name)
    raise Problem(
        "invalid_request",
        f"cannot use the scheduler {name[:80]!r}: Diffusers has no such class; "
        + _instead(difflib.get_close_matches(name, CLASSES, n=3)),
        field="scheduler",
    )


def _instead(near: list[str]) -> str:
    listed = "GET /schedulers lists them all"
    return f"near to it are {', '.join(near)}; {listed}" if near else listed


def listing() -> dict[str, Any]:
    """The answer of GET /schedulers: class names, and each A1111 name's class and settings."""
    return {
        "schedulers": list(CLASSES),
        "a1111_schedulers": {
            name: {"scheduler": value.class_name, "settings": value.settings}
            for name, value in A1111.items()
        },
    }
