"""What a picture's file says of how it was made: A1111's `parameters` text, and our own JSON.

Pure. The form of the text is the one of A1111's `create_infotext`, which other programs
read back: the prompt, a line that begins with `Negative prompt:`, and a last line of
`Name: value` pairs, where a value with a comma, a colon or a line break is quoted as JSON.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from ipc.messages import Call
from supervisor import VERSION, schedulers

REQUEST_ONLY = ("batch_id", "previews", "priority", "store_images", "return_images",
                "timeout_seconds")  # fmt: skip
"""Fields that say how to answer, not what to draw."""


def texts(inputs: Mapping[str, Any], call: Call, scheduler: str | None) -> dict[str, str]:
    """The texts of one picture by their keys, `parameters` and `igi`.

    `inputs` is the request as it was understood, `scheduler` the class that runs. What `igi`
    holds, sent to POST /generate with the pictures added, makes this very picture again.
    """
    request = {name: v for name, v in inputs.items() if name not in REQUEST_ONLY}
    parameters = {**inputs["parameters"], **call.parameters, "seed": call.seed}
    parameters.pop("num_images_per_prompt", None)
    request["parameters"] = parameters
    return {
        "parameters": _a1111(request, parameters, scheduler),
        "igi": msgspec.json.encode(request).decode(),
    }


def _a1111(request: Mapping[str, Any], parameters: Mapping[str, Any], scheduler: str | None) -> str:
    pairs = {**_pairs(request, parameters, scheduler), "Version": f"IGI {VERSION}"}
    lines = [str(parameters.get("prompt") or "")]
    if parameters.get("negative_prompt"):
        lines.append(f"Negative prompt: {parameters['negative_prompt']}")
    lines.append(", ".join(f"{k}: {_quoted(v)}" for k, v in pairs.items() if v not in (None, "")))
    return "\n".join(lines)


def _pairs(
    request: Mapping[str, Any], parameters: Mapping[str, Any], scheduler: str | None
) -> dict[str, Any]:
    width, height = parameters.get("width"), parameters.get("height")
    loras = (f"{lora['model']} ({lora['scale']})" for lora in request.get("loras") or ())
    controls = request.get("control_model")
    return {
        "Steps": parameters.get("num_inference_steps"),
        "Sampler": request.get("a1111_scheduler") or _sampler(scheduler),
        "CFG scale": parameters.get("guidance_scale"),
        "Seed": parameters["seed"],
        "Size": f"{width}x{height}" if width and height else None,
        "Model": request["checkpoint"],
        "VAE": request.get("vae"),
        "Denoising strength": parameters.get("strength"),
        "Clip skip": parameters.get("clip_skip"),
        "Lora": ", ".join(loras),
        "ControlNet": ", ".join(controls) if isinstance(controls, list) else controls,
        "Refiner": request.get("refiner_model"),
        "Pipeline": request["pipeline"],
    }


def _sampler(scheduler: str | None) -> str | None:
    """A1111's shortest name for a class, else the class itself."""
    names = [name for name, one in schedulers.A1111.items() if one.class_name == scheduler]
    return min(names, key=len, default=scheduler)


def _quoted(value: object) -> str:
    text = str(value)
    return msgspec.json.encode(text).decode() if set(text) & set(",:\n") else text
