"""What the families of Stable Diffusion are, in small: blocks, conditions, schedulers, scales.

Only widths and depths differ from the published configurations. Pure data.
"""

from typing import Any

FAMILIES = ("sd15", "sd21", "sdxl", "sdxl_turbo", "sdxl_refiner")
NATIVE_PIXELS = 64

# Widths of the text encoders, in place of 768, 1024, 768 + 1280 and 1280.
TEXT_WIDTHS = {"sd15": [32], "sd21": [40], "sdxl": [32, 48], "sdxl_refiner": [48]}

FOUR_BLOCKS = {
    "block_out_channels": (8, 16, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
# A linear projection around attention, and heads of one width: SD2 and later.
LINEAR = {"use_linear_projection": True, "attention_head_dim": [1, 2, 2, 2]}
ADDED_CONDITIONS = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}

UNETS: dict[str, dict[str, Any]] = {
    "sd15": FOUR_BLOCKS | {"attention_head_dim": 4},
    "sd21": FOUR_BLOCKS | LINEAR | {"upcast_attention": True},
    "sdxl": ADDED_CONDITIONS
    | {
        "use_linear_projection": True,
        "block_out_channels": (8, 16, 16),
        "attention_head_dim": [1, 2, 2],
        "transformer_layers_per_block": [1, 2, 2],
        "projection_class_embeddings_input_dim": 48 + 6 * 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "sdxl_refiner": FOUR_BLOCKS
    | LINEAR
    | ADDED_CONDITIONS
    | {
        "transformer_layers_per_block": 2,
        "projection_class_embeddings_input_dim": 48 + 5 * 8,
        "down_block_types": (
            *("DownBlock2D", "CrossAttnDownBlock2D"),
            *("CrossAttnDownBlock2D", "DownBlock2D"),
        ),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = BETAS | {"timestep_spacing": "leading", "steps_offset": 1}
PNDM = {"skip_prk_steps": True, "set_alpha_to_one": False}
VELOCITY = {"prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False}

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("PNDMScheduler", LEADING | PNDM),
    "sd21": ("DDIMScheduler", LEADING | VELOCITY),
    "sdxl": ("EulerDiscreteScheduler", LEADING),
    "sdxl_turbo": ("EulerAncestralDiscreteScheduler", BETAS | {"timestep_spacing": "trailing"}),
    "sdxl_refiner": ("EulerDiscreteScheduler", LEADING),
}
SCALING_FACTORS = {"sd15": 0.18215, "sd21": 0.18215, "sdxl": 0.13025, "sdxl_refiner": 0.13025}

# How a Turbo is told from an SDXL: the defaults in its igi.json.
SIDECARS = {"sdxl_turbo": {"num_inference_steps": 1, "guidance_scale": 0.0}}


def architecture(family: str) -> str:
    """The family whose architecture this one has: a Turbo is an SDXL."""
    return "sdxl" if family == "sdxl_turbo" else family


def text_indices(family: str) -> list[int]:
    """Which of a pipeline's text encoders the family has: the refiner has the second alone."""
    return {"sdxl": [0, 1], "sdxl_refiner": [1]}.get(architecture(family), [0])
