"""What is known of each parameter by its name: a sentence, and the range it may lie in.

Types and defaults come from Diffusers (pipelines.json); this table adds what a signature does
not say. A name without a row takes `UNLISTED`. Pure: knows no pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

MAX_IMAGES = 16
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
MAX_PROMPT_CHARACTERS = 16_384
MAX_SIDE_PIXELS = 16_384


class Rule(msgspec.Struct, frozen=True):
    """A sentence for callers, and bounds that hold for every number in the value.

    Both bounds are inclusive. They also keep out NaN, infinities and integers of 400 digits.
    """

    sentence: str
    minimum: float = -1_000_000
    maximum: float = 1_000_000
    multiple_of: int | None = None


UNLISTED = Rule("As in the call of the Diffusers class.")


def _fraction(sentence: str) -> Rule:
    return Rule(sentence, 0, 1)


def _scale(sentence: str, maximum: float = 100) -> Rule:
    return Rule(sentence, 0, maximum)


def _side(sentence: str) -> Rule:
    return Rule(sentence, 8, MAX_SIDE_PIXELS, multiple_of=8)


def _size(sentence: str) -> Rule:
    return Rule(sentence, 1, MAX_SIDE_PIXELS)


def _corner(sentence: str) -> Rule:
    return Rule(sentence, 0, MAX_SIDE_PIXELS)


def _steps(sentence: str) -> Rule:
    return Rule(sentence, 1, MAX_STEPS)


# Parameters of every pipeline that the server acts on itself; they never reach the call.
OURS: Mapping[str, str] = {"seed": "int | list[int] | None", "num_images_per_prompt": "int"}

RULES: Mapping[str, Rule] = {
    # What to draw
    "prompt": Rule("What the picture shows; a list makes pictures of each."),
    "prompt_2": Rule("The prompt for the second text encoder; `prompt` when left out."),
    "prompt_3": Rule("The prompt for the third text encoder; `prompt` when left out."),
    "prompt_4": Rule("The prompt for the fourth text encoder; `prompt` when left out."),
    "negative_prompt": Rule("What the picture shall not show; without effect without guidance."),
    "negative_prompt_2": Rule("The negative prompt for the second text encoder."),
    "negative_prompt_3": Rule("The negative prompt for the third text encoder."),
    "negative_prompt_4": Rule("The negative prompt for the fourth text encoder."),
    "class_labels": Rule("Numbers of the classes to draw.", 0, 100_000),
    "seed": Rule(
        "The first picture's seed, the next ones count up; a list gives one for each picture; "
        "-1 or null draws one.",
        -1,
        MAX_SEED,
    ),
    "num_images_per_prompt": Rule("How many pictures of each prompt.", 1, MAX_IMAGES),
    # Pictures
    "image": Rule("The picture to start from, base64."),
    "images": Rule("The pictures to start from, base64."),
    "input_images": Rule("The pictures that the prompt speaks of, base64."),
    "image_reference": Rule("A picture to take the looks from, base64."),
    "original_image": Rule("The picture before it was scaled down, base64."),
    "text_images": Rule("Pictures of the texts to be drawn, base64."),
    "mask_image": Rule("White where the picture is to be drawn anew, base64, the size of `image`."),
    "mask": Rule("White where the picture is to be drawn anew, base64, the size of `image`."),
    "control_image": Rule("The picture for the ControlNet, base64; one each for several of them."),
    "control_mask": Rule("White where the picture is to be drawn anew, base64."),
    "padding_mask_crop": Rule("Work on the masked part only, with this margin in pixels.", 0, 4096),
    # Size
    "width": _side("Width in pixels, a multiple of 8; the checkpoint's own when left out."),
    "height": _side("Height in pixels, a multiple of 8; the checkpoint's own when left out."),
    "max_area": Rule("The largest area in pixels that is drawn.", 64, MAX_SIDE_PIXELS**2),
    "output_resolution": _side("The side of a square of the area to be drawn, in pixels."),
    "max_input_image_size": _side("Larger input pictures are scaled down to this side, in pixels."),
    "use_input_image_size_as_output": Rule("Draw at the size of the input picture."),
    "use_resolution_binning": Rule("Draw at the nearest size that the model was trained at."),
    "original_size": _size("SDXL's micro-conditioning: the size of the picture before cropping."),
    "target_size": _size("SDXL's micro-conditioning: the size of the picture asked for."),
    "crops_coords_top_left": _corner("SDXL's micro-conditioning: where the picture was cropped."),
    "negative_original_size": _size("As `original_size`, to move away from."),
    "negative_target_size": _size("As `target_size`, to move away from."),
    "negative_crops_coords_top_left": _corner("As `crops_coords_top_left`, to move away from."),
    "aesthetic_score": _scale("The refiner's micro-conditioning: how pleasing it shall be.", 10),
    "negative_aesthetic_score": _scale("As `aesthetic_score`, to move away from.", 10),
    # Steps
    "num_inference_steps": _steps("How many denoising steps."),
    "prior_num_inference_steps": _steps("How many denoising steps of the prior."),
    "original_inference_steps": _steps("How many steps the checkpoint was distilled from."),
    "timesteps": Rule("The schedule itself, in place of `num_inference_steps`.", 0, MAX_STEPS),
    "sigmas": Rule("The schedule as noise levels, in place of `num_inference_steps`.", 0, 10_000),
    "max_timesteps": _scale("Where the schedule begins, for distilled models.", 1000),
    "intermediate_timesteps": _scale("The schedule's second step, for two-step models.", 1000),
    "strength": _fraction("How far `image` is drawn anew: 0 leaves it, 1 forgets it."),
    "denoising_start": _fraction("The fraction of the steps that were done already."),
    "denoising_end": _fraction("The fraction of the steps after which to stop."),
    "eta": _fraction("The noise of DDIM; other schedulers ignore it."),
    "noise_level": Rule("The noise put on the picture before it is drawn larger.", 0, MAX_STEPS),
    "use_clipped_model_output": Rule("Correct the model's output by the clipped picture (DDIM)."),
    "mu": Rule("The shift of the schedule."),
    "std": _scale("The width of the schedule's distribution of noise."),
    # Guidance
    "guidance_scale": _scale("How closely to follow the prompt; up to 1 is without guidance."),
    "true_cfg_scale": _scale("How closely to follow the prompt, with a negative prompt."),
    "prior_guidance_scale": _scale("How closely the prior follows the prompt."),
    "distilled_guidance_scale": _scale("The guidance that a distilled model was trained with."),
    "image_guidance_scale": _scale("How closely to follow the picture."),
    "img_guidance_scale": _scale("How closely to follow the picture."),
    "guidance_schedule": _scale("One guidance scale for each step."),
    "guidance_rescale": _fraction("How far to pull the contrast back (arXiv 2305.08891)."),
    "pag_scale": _scale("The scale of perturbed-attention guidance (arXiv 2403.17377)."),
    "pag_adaptive_scale": _scale("How fast perturbed-attention guidance fades."),
    "cfg_trunc_ratio": _fraction("The fraction of the steps that are guided."),
    "cfg_truncation": _scale("The fraction of the steps after which guidance ends."),
    "cfg_normalization": Rule("Keep the guided prediction at the norm of the unguided."),
    "enable_cfg_renorm": Rule("Keep the guided prediction at the norm of the unguided."),
    "cfg_renorm_min": _fraction("The least factor of that normalisation."),
    "enable_denormalization": Rule("Undo the normalisation of the latents."),
    "skip_guidance_layers": Rule("Layers left out for skip-layer guidance.", 0, 1000),
    "skip_layer_guidance_scale": _scale("The scale of skip-layer guidance."),
    "skip_layer_guidance_start": _fraction("Where in the steps skip-layer guidance begins."),
    "skip_layer_guidance_stop": _fraction("Where in the steps skip-layer guidance ends."),
    # ControlNets and adapters
    "controlnet_conditioning_scale": _scale("The ControlNet's weight; one each for several.", 10),
    "control_guidance_start": _fraction("Where in the steps the ControlNet begins."),
    "control_guidance_end": _fraction("Where in the steps the ControlNet ends."),
    "control_mode": Rule("The kind of the control picture, for union ControlNets.", -1, 63),
    "guess_mode": Rule("Let the ControlNet recognise the picture without a prompt."),
    "adapter_conditioning_scale": _scale("The adapter's weight.", 10),
    "adapter_conditioning_factor": _fraction("The fraction of the steps the adapter is used in."),
    # Text encoders
    "clip_skip": Rule("How many of CLIP's last layers to leave out.", 0, 24),
    "max_sequence_length": Rule("How many tokens of the prompt are read.", 1, 8192),
    "tokenizer_max_length": Rule("How many tokens of the prompt are read.", 1, 8192),
    "text_encoder_out_layers": Rule("The text encoder's layers that are read.", 0, 1000),
    "clean_caption": Rule("Clean the prompt up as captions were in training."),
    "skip_text_cleaning": Rule("Take the prompt as it is."),
    "system_prompt": Rule("The instruction put before the prompt."),
    "complex_human_instruction": Rule("The instruction put before the prompt, line by line."),
    "enable_prompt_rewrite": Rule("Let the model write the prompt at more length first."),
    "use_pe": Rule("Let the model write the prompt at more length first."),
    "prompt_upsampling": Rule("Let the model write the prompt at more length first."),
    "prompt_upsampling_temperature": _scale("How freely it does.", 10),
    "caption_upsample_temperature": _scale("How freely the prompt is written at length.", 10),
    "render_text_images": Rule("Draw the texts of the prompt as pictures for the model."),
}
