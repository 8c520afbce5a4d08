"""Stock pipelines in the engine against the same pipelines one at a time."""

import gc
import inspect
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from PIL import Image

from gpu_worker.company import needs_to_be_alone
from gpu_worker.engine import Engine, Task
from gpu_worker.forwards import Forwards, run_eagerly
from gpu_worker.interposer import LAYOUTS, Target, interposable, restore
from tests.tools import tiny

TOLERANCE = 1e-3
SIZE = {"width": 64, "height": 64}
Job = Callable[[], torch.Tensor]


def stock_pipeline(folder: Path, family: str) -> Any:
    tiny.build_checkpoint(folder / family, family)
    return diffusers.DiffusionPipeline.from_pretrained(folder / family)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return stock_pipeline(tmp_path_factory.mktemp("checkpoints"), "sd15")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return stock_pipeline(tmp_path_factory.mktemp("checkpoints"), "sdxl")


def own(pipe: Any, kind: str | None = None, scheduler: str | None = None, **parts: Any) -> Any:
    """A pipeline of a job's own around the shared modules, with a scheduler of its own."""
    components = {name: part for name, part in pipe.components.items() if part is not None}
    settings = pipe.scheduler.config
    components["scheduler"] = (
        getattr(diffusers, scheduler).from_config(settings)
        if scheduler
        else type(pipe.scheduler).from_config(settings)
    )
    if not hasattr(pipe, "text_encoder_2"):
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts |= {"requires_safety_checker": False}
    made = (getattr(diffusers, kind) if kind else type(pipe))(**components | parts)
    made.set_progress_bar_config(disable=True)
    return made


def job(pipe: Any, seed: int, /, *, of: dict[str, Any] | None = None, **parameters: Any) -> Job:
    """A call of a stock pipeline that can be made again and again, each time from the start."""
    values = {"prompt": "a red fox", "num_inference_steps": 3} | parameters

    def call() -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        made = own(pipe, **of or {})
        output: torch.Tensor = made(generator=generator, output_type="pt", **values).images[0]
        return output

    return call


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy()).convert(mode)


def mask() -> Image.Image:
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    return half


class Counting:
    """Runs forwards and keeps how many rows each had."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}

    def __call__(self, target: Target, args: Any, kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        tensor = next(value for value in values if isinstance(value, torch.Tensor) and value.ndim)
        self.rows.setdefault(f"{target.architecture}.{target.method}", []).append(tensor.shape[0])
        return run_eagerly(target, args, kwargs)


def modules(*pipes: Any) -> list[tuple[torch.nn.Module, str]]:
    return [each for pipe in pipes for each in interposable(pipe.components.values())]


def engine_of(*pipes: Any, **options: Any) -> Engine:
    engine = Engine(**options)
    for module, method in modules(*pipes):
        engine.adopt(module, method)
    return engine


def give_back(*pipes: Any) -> None:
    for module, _ in modules(*pipes):
        restore(module)


def run(jobs: list[Job], *pipes: Any, **task: Any) -> tuple[list[torch.Tensor], Counting]:
    """The jobs' pictures when the engine runs all of them at once."""
    counting = Counting()
    engine = engine_of(*pipes, forwards=Forwards(execute=counting))
    pictures: dict[int, torch.Tensor] = {}

    def end(index: int) -> Callable[[torch.Tensor], None]:
        return lambda result: pictures.__setitem__(index, result)

    def fail(error: Exception) -> None:
        raise error

    for index, body in enumerate(jobs):
        engine.submit(Task(index, body, finished=end(index), failed=fail, **task))
    engine.run_until_idle()
    engine.close()
    give_back(*pipes)
    return [pictures[index] for index in range(len(jobs))], counting


def check(jobs: list[Job], *pipes: Any) -> Counting:
    """Asserts that the jobs batched are as alone."""
    stock = [body() for body in jobs]
    assert all(
        not torch.allclose(one, other, atol=10 * TOLERANCE)
        for one, other in itertools.pairwise(stock)
    )
    pictures, counting = run(jobs, *pipes)
    for one, other in zip(pictures, stock, strict=True):
        assert (one - other).abs().max() <= TOLERANCE
    return counting


SOLO: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": SIZE,
    "StableDiffusionImg2ImgPipeline": {"image": picture(1), "strength": 0.9},
    "StableDiffusionInpaintPipeline": {"image": picture(1), "mask_image": mask()} | SIZE,
}


@pytest.mark.parametrize("kind", SOLO)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_job_alone_gives_the_stock_picture_bit_for_bit(
    kind: str, family: str, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(family)
    name = kind.replace("StableDiffusion", "StableDiffusionXL") if family == "sdxl" else kind
    body = job(pipe, 3, of={"kind": name}, **SOLO[kind])
    stock = body()
    pictures, _ = run([body], pipe)
    assert torch.equal(pictures[0], stock)


def test_different_prompts_seeds_and_guidance_share_every_forward(sd15: Any) -> None:
    jobs = [
        job(sd15, seed, prompt=prompt, guidance_scale=guidance, **SIZE)
        for seed, prompt, guidance in [(1, "a fox", 7.5), (2, "two hares", 3.0), (3, "", 1.0)]
    ]
    counting = check(jobs, sd15)
    alone = run(jobs[:1], sd15)[1].rows["UNet2DConditionModel.forward"]
    assert counting.rows["UNet2DConditionModel.forward"] == [5] * len(alone)
    assert counting.rows["CLIPTextModel.forward"] == [3, 2]
    assert counting.rows["AutoencoderKL.decode"] == [3]


def test_different_steps_and_schedulers_share_forwards(sd15: Any) -> None:
    schedulers = [
        "EulerDiscreteScheduler",
        "DDIMScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
    ]
    jobs = [
        job(sd15, seed, of={"scheduler": name}, num_inference_steps=3 + seed, **SIZE)
        for seed, name in enumerate(schedulers)
    ]
    forwards = check(jobs, sd15).rows["UNet2DConditionModel.forward"]
    assert max(forwards) == 10
    assert len(forwards) == 9  # Heun's 2 x 5 - 1, the most that any of them needs


def test_text_image_and_inpainting_jobs_share_forwards(sd15: Any) -> None:
    jobs = [
        job(sd15, 1, num_inference_steps=6, **SIZE),
        job(sd15, 2, of={"kind": "StableDiffusionImg2ImgPipeline"}, image=picture(2), strength=0.9),
        job(sd15, 3, of={"kind": "StableDiffusionImg2ImgPipeline"}, image=picture(3), strength=0.7),
        job(
            sd15,
            4,
            of={"kind": "StableDiffusionInpaintPipeline"},
            image=picture(4),
            mask_image=mask(),
            strength=1.0,
            **SIZE,
        ),
    ]
    forwards = check(jobs, sd15).rows["UNet2DConditionModel.forward"]
    assert max(forwards) >= 6


def test_jobs_of_several_sizes_share_what_they_can(sd15: Any) -> None:
    jobs = [job(sd15, seed, width=64 + 16 * (seed % 2), height=64) for seed in range(4)]
    counting = Counting()
    stock = [body() for body in jobs]
    pictures, counting = run(jobs, sd15)
    assert set(counting.rows["UNet2DConditionModel.forward"]) == {4}
    for one, other in zip(pictures, stock, strict=True):
        assert (one - other).abs().max() <= TOLERANCE


def test_jobs_of_sdxl_share_forwards_of_both_text_encoders_and_the_denoiser(sdxl: Any) -> None:
    jobs = [
        job(sdxl, 1, prompt="a fox", **SIZE),
        job(sdxl, 2, prompt="a hare", guidance_scale=1.0, num_inference_steps=5, **SIZE),
        job(
            sdxl,
            3,
            of={"kind": "StableDiffusionXLImg2ImgPipeline"},
            image=picture(3),
            strength=0.99,
            num_inference_steps=4,
        ),
    ]
    rows = check(jobs, sdxl).rows
    assert max(rows["UNet2DConditionModel.forward"]) == 5
    assert max(rows["CLIPTextModelWithProjection.forward"]) == 3


def controlnet(folder: Path, family: str, seed: int) -> Any:
    tiny.build_controlnet(folder / str(seed), family, seed)
    return diffusers.ControlNetModel.from_pretrained(folder / str(seed)).eval()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_controlnet_jobs_share_forwards_of_the_net_and_the_denoiser(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pipe = request.getfixturevalue(family)
    kind = {
        "sd15": "StableDiffusionControlNetPipeline",
        "sdxl": "StableDiffusionXLControlNetPipeline",
    }[family]
    net = controlnet(tmp_path, family, 1)
    of = {"kind": kind, "controlnet": net}
    jobs = [
        job(pipe, seed, of=of, image=picture(seed), guidance_scale=5.0 * (seed > 0), **SIZE)
        for seed in range(3)
    ]
    rows = check(jobs, pipe, own(pipe, **of)).rows
    alone = run(jobs[:1], pipe, own(pipe, **of))[1].rows
    for forward in ("ControlNetModel.forward", "UNet2DConditionModel.forward"):
        # The unguided job encodes one prompt less, so it may be a step ahead.
        assert rows[forward].count(5) >= len(alone[forward]) - 1
        assert len(rows[forward]) <= len(alone[forward]) + 1


def test_jobs_with_several_controlnets_share_each_nets_forwards(sd15: Any, tmp_path: Path) -> None:
    nets = [controlnet(tmp_path, "sd15", seed) for seed in (1, 2)]
    of = {"kind": "StableDiffusionControlNetPipeline", "controlnet": nets}
    jobs = [
        job(
            sd15,
            seed,
            of=of,
            image=[picture(seed), picture(seed + 5)],
            controlnet_conditioning_scale=[0.5, 0.75],
            **SIZE,
        )
        for seed in range(2)
    ]
    rows = check(jobs, sd15, own(sd15, **of)).rows
    assert set(rows["ControlNetModel.forward"]) == {4}
    assert len(rows["ControlNetModel.forward"]) == 2 * len(rows["UNet2DConditionModel.forward"])


def test_a_deterministic_job_beside_others_gives_the_stock_picture_bit_for_bit(sd15: Any) -> None:
    jobs = [job(sd15, seed, **SIZE) for seed in range(3)]
    stock = [body() for body in jobs]
    pictures, _ = run(jobs, sd15, deterministic=True)
    assert all(torch.equal(*pair) for pair in zip(pictures, stock, strict=True))


def flux() -> tuple[Any, Callable[[int], dict[str, Any]]]:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    pipe = diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKL(latent_channels=4, norm_num_groups=4, block_out_channels=[8]),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    return pipe, lambda _: {"prompt_embeds": torch.rand(1, 5, 32), "pooled": torch.rand(1, 16)}


def sd3() -> tuple[Any, Callable[[int], dict[str, Any]]]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKL(
            latent_channels=4, norm_num_groups=4, block_out_channels=[8], shift_factor=0.0
        ),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return pipe, lambda _: {"prompt_embeds": torch.rand(1, 5, 32), "pooled": torch.rand(1, 16)}


@pytest.mark.parametrize("family", [flux, sd3])
def test_transformer_families_share_forwards(family: Any) -> None:
    torch.manual_seed(0)
    pipe, embeds = family()
    pipe.set_progress_bar_config(disable=True)
    given = [embeds(seed) for seed in range(3)]
    guided = {"negative_prompt_embeds", "negative_pooled_prompt_embeds"}

    def body(seed: int) -> Job:
        values = {
            "prompt_embeds": given[seed]["prompt_embeds"],
            "pooled_prompt_embeds": given[seed]["pooled"],
            "num_inference_steps": 2 + seed,
            "guidance_scale": 1.0 + seed,
            "width": 16,
            "height": 8 if seed == 2 else 16,
        }
        if family is sd3:
            values |= dict.fromkeys(guided, torch.zeros(1, 5, 32))
            values["negative_pooled_prompt_embeds"] = torch.zeros(1, 16)

        def call() -> torch.Tensor:
            parts = dict(pipe.components)
            parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
            made = type(pipe)(**parts)
            made.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(seed)
            output: torch.Tensor = made(generator=generator, output_type="latent", **values)[0]
            return output

        return call

    jobs = [body(seed) for seed in range(3)]
    stock = [call() for call in jobs]
    pictures, counting = run(jobs, pipe)
    for one, other in zip(pictures, stock, strict=True):
        assert (one - other).abs().max() <= TOLERANCE
    forwards = counting.rows[f"{type(pipe.transformer).__name__}.forward"]
    assert max(forwards) > 1 if family is flux else max(forwards) == 3
    assert len(forwards) < 2 + 3 + 4


def test_every_architecture_with_a_layout_exists_and_has_the_named_arguments() -> None:
    for (name, method), layout in LAYOUTS.items():
        kind = getattr(diffusers, name, None) or getattr(transformers, name)
        parameters = inspect.signature(getattr(kind, method)).parameters
        assert {layout.rows, *layout.scalars, *layout.shared} <= set(parameters), name


def test_a_failing_and_a_cancelled_job_do_not_touch_their_batch_mates(sd15: Any) -> None:
    jobs = [job(sd15, seed, num_inference_steps=4, **SIZE) for seed in range(3)]
    stock = jobs[0]()
    engine = engine_of(sd15)

    def callback(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        if step == 1:
            raise RuntimeError("cannot go on")
        return tensors

    failing = job(sd15, 5, callback_on_step_end=callback, num_inference_steps=4, **SIZE)
    ends: dict[str, Any] = {}
    engine.submit(Task("kept", jobs[0], finished=lambda result: ends.update(kept=result)))
    engine.submit(Task("failing", failing, failed=lambda error: ends.update(failing=error)))
    engine.submit(Task("gone", jobs[2], cancelled=lambda: ends.update(gone=True)))
    for _ in range(4):
        engine.round()
    engine.cancel("gone")
    engine.run_until_idle()
    give_back(sd15)
    assert (ends["kept"] - stock).abs().max() <= TOLERANCE
    assert str(ends["failing"]) == "cannot go on"
    assert ends["gone"]


def test_a_dropped_checkpoint_is_freed_though_it_was_adopted(tmp_path: Path) -> None:
    pipe = stock_pipeline(tmp_path, "sd15")
    engine = engine_of(pipe)
    engine.submit(Task(1, job(pipe, 1, num_inference_steps=1, **SIZE)))
    engine.run_until_idle()
    gone = weakref.ref(pipe.unet.conv_in)
    del pipe
    gc.collect()
    assert gone() is None


def test_pipelines_that_leave_traces_on_the_thread_or_on_modules_are_known() -> None:
    alone = ["StableDiffusionDepth2ImgPipeline", "StableDiffusionPAGPipeline"]
    assert all(needs_to_be_alone(getattr(diffusers, name)) for name in alone)
    among_others = [*SOLO, "StableDiffusionXLControlNetImg2ImgPipeline", "FluxPipeline"]
    assert not any(needs_to_be_alone(getattr(diffusers, name)) for name in among_others)
