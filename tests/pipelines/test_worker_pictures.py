"""The pictures that come out of the worker's pipe, against stock pipelines: every pixel."""

import io
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ipc import messages as m
from tests.tools import tiny, tiny_families
from tests.tools.worker_client import WorkerClient, pictures

torch.set_num_threads(1)

FAMILIES = {"sd15": "sd15", "sd21": "sd21", "sdxl": "sdxl", "sdxl_turbo": "sdxl"}
COMMON = {"prompt": "a cat", "num_inference_steps": 4, "guidance_scale": 5.0}
TURBO = {"prompt": "a cat", "num_inference_steps": 2, "guidance_scale": 0.0}
SIZE = {"width": 64, "height": 64}


def noise(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def square_mask() -> Image.Image:
    return Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16)).convert("RGB")


PICTURE, MASK, CONTROL, OTHER_CONTROL = noise(1), square_mask(), noise(2), noise(3)
INPUTS: dict[str, dict[str, Any]] = {
    "": {},
    "Img2Img": {"image": PICTURE},
    "Inpaint": {"image": PICTURE, "mask_image": MASK},
    "ControlNet": {"image": CONTROL},
    "ControlNetImg2Img": {"image": PICTURE, "control_image": CONTROL},
    "ControlNetInpaint": {"image": PICTURE, "mask_image": MASK, "control_image": CONTROL},
}


class Bench:
    """Runs the same request through the worker and through Diffusers itself."""

    def __init__(self, worker: WorkerClient, models: Path) -> None:
        self.worker = worker
        self.models = models

    def model(self, name: str) -> m.Model:
        family = FAMILIES.get(name, name if name in tiny_families.FAMILIES else "other")
        return m.Model(name=name, path=str(self.models / name), family=family)  # type: ignore[arg-type]

    def ours(
        self, name: str, family: str, given: dict[str, Any], seeds: list[int], **request: Any
    ) -> list[Any]:
        encoded = {key: png(value) for key, value in given.items() if is_picture(value)}
        received = self.worker.generate(
            pipeline=name,
            checkpoint=self.model(family),
            calls=[m.Call(seed=seed) for seed in seeds],
            parameters={key: value for key, value in given.items() if not is_picture(value)},
            images=encoded,
            deterministic=len(seeds) > 1,  # pictures that share a step differ by roundings
            **request,
        )
        return [np.array(Image.open(io.BytesIO(data))) for data in pictures(received)]

    def stock(self, name: str, family: str, **parts: Any) -> Any:
        kind = getattr(diffusers, name)
        return kind.from_pretrained(self.models / family, local_files_only=True, **parts)


def is_picture(value: Any) -> bool:
    return isinstance(value[0] if isinstance(value, list) and value else value, Image.Image)


def png(value: Any) -> list[bytes]:
    files = []
    for picture in value if isinstance(value, list) else [value]:
        file = io.BytesIO()
        picture.save(file, "PNG")
        files.append(file.getvalue())
    return files


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def same(ours: Any, stock: Any) -> bool:
    return np.array_equal(ours, np.array(stock))


@pytest.fixture(scope="module")
def bench(worker: WorkerClient, tiny_models: Path) -> Bench:
    for family in ("sd15", "sd21", "sdxl"):
        build_extras(tiny_models, family)
    return Bench(worker, tiny_models)


@cache
def build_extras(models: Path, family: str) -> None:
    tiny.build_controlnet(models / f"control-{family}", family)
    tiny.build_controlnet(models / f"other-control-{family}", family, seed=5)
    tiny.build_vae(models / f"vae-{family}", family, seed=9)


def pipeline_name(family: str, kind: str) -> str:
    return f"StableDiffusion{'XL' if 'xl' in family else ''}{kind}Pipeline"


def parameters(family: str, kind: str) -> dict[str, Any]:
    common = TURBO if family == "sdxl_turbo" else COMMON
    extra = SIZE if kind in ("", "ControlNet") else {"strength": 0.6}
    return common | extra | INPUTS[kind]


@pytest.mark.parametrize("kind", ["", "Img2Img", "Inpaint"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_pictures_equal_those_of_two_stock_calls(bench: Bench, family: str, kind: str) -> None:
    name, given = pipeline_name(family, kind), parameters(family, kind)
    ours = bench.ours(name, family, given, [7, 8])
    pipeline = bench.stock(name, family)
    assert same(ours[0], pipeline(**given, generator=generator(7)).images[0])
    assert same(ours[1], pipeline(**given, generator=generator(8)).images[0])
    assert not same(ours[0], ours[1])


@pytest.mark.parametrize("nets", [1, 2])
@pytest.mark.parametrize("kind", ["ControlNet", "ControlNetImg2Img", "ControlNetInpaint"])
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_controlnets_equal_stock(bench: Bench, family: str, kind: str, nets: int) -> None:
    name, given = pipeline_name(family, kind), parameters(family, kind)
    names = [f"control-{family}", f"other-control-{family}"][:nets]
    loaded = [diffusers.ControlNetModel.from_pretrained(bench.models / each) for each in names]
    picture = "image" if kind == "ControlNet" else "control_image"
    if nets == 2:
        given |= {picture: [CONTROL, OTHER_CONTROL], "controlnet_conditioning_scale": [0.7, 0.3]}
    models = [bench.model(each) for each in names]
    [ours] = bench.ours(name, family, given, [7], controlnets=models)
    pipeline = bench.stock(name, family, controlnet=loaded if nets == 2 else loaded[0])
    assert same(ours, pipeline(**given, generator=generator(7)).images[0])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_another_vae_equals_stock_and_leaves_the_next_request_alone(
    bench: Bench, family: str
) -> None:
    name, given = pipeline_name(family, ""), parameters(family, "")
    [before] = bench.ours(name, family, given, [7])
    [ours] = bench.ours(name, family, given, [7], vae=bench.model(f"vae-{family}"))
    [after] = bench.ours(name, family, given, [7])
    vae = diffusers.AutoencoderKL.from_pretrained(bench.models / f"vae-{family}")
    pipeline = bench.stock(name, family, vae=vae)
    assert same(ours, pipeline(**given, generator=generator(7)).images[0])
    assert not same(ours, before)
    assert same(before, after)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_loras_equal_stock_and_leave_the_next_request_alone(
    bench: Bench, model_dir: Path, family: str, layout: str
) -> None:
    name, given = pipeline_name(family, ""), parameters(family, "")
    files = [model_dir / "lora" / f"{family}-{layout}-{letter}.safetensors" for letter in "ab"]
    loras = [
        m.Lora(model=m.Model(name=file.name, path=str(file), family=family), scale=scale)  # type: ignore[arg-type]
        for file, scale in zip(files, (0.8, 0.5), strict=True)
    ]
    [before] = bench.ours(name, family, given, [7])
    [ours] = bench.ours(name, family, given, [7], loras=loras)
    [after] = bench.ours(name, family, given, [7])
    pipeline = bench.stock(name, family)
    for adapter, file in zip("ab", files, strict=True):
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=adapter)
    pipeline.set_adapters(["a", "b"], [0.8, 0.5])
    pipeline.fuse_lora(adapter_names=["a", "b"])
    stock = np.array(pipeline(**given, generator=generator(7)).images[0])
    # Weights are summed up in another order than in PEFT, which can turn a pixel's last bit.
    assert np.abs(ours.astype(int) - stock).max() <= 1
    assert np.mean(ours != stock) < 0.01
    assert not same(ours, before)
    assert same(before, after)


def test_residency_names_the_loras_that_are_merged(bench: Bench, model_dir: Path) -> None:
    path = model_dir / "lora" / "sd15-kohya-a.safetensors"
    lora = m.Lora(model=m.Model(name=path.name, path=str(path), family="sd15"))
    received = bench.worker.generate(
        pipeline="StableDiffusionPipeline",
        checkpoint=bench.model("sd15"),
        parameters=parameters("sd15", ""),
        loras=[lora],
    )
    assert pictures(received)
    told = [each for each in received if isinstance(each, m.Residency)][-1]
    assert [each.loras for each in told.models if each.checkpoint == "sd15"] == [[path.name]]


def test_a_lora_of_another_family_is_refused_and_nothing_stays_merged(
    bench: Bench, model_dir: Path
) -> None:
    path = model_dir / "lora" / "sdxl-diffusers-a.safetensors"
    given = parameters("sd15", "")
    [before] = bench.ours("StableDiffusionPipeline", "sd15", given, [7])
    received = bench.worker.generate(
        pipeline="StableDiffusionPipeline",
        checkpoint=bench.model("sd15"),
        parameters=given,
        loras=[m.Lora(model=m.Model(name="other", path=str(path), family="sdxl"))],
    )
    told = received[-1]
    assert isinstance(told, m.Rejected)
    assert (told.code, told.field) == ("incompatible_model", "loras")
    [after] = bench.ours("StableDiffusionPipeline", "sd15", given, [7])
    assert same(before, after)


def test_a_scheduler_by_name_and_settings_equals_stock(bench: Bench) -> None:
    given = parameters("sd15", "")
    wanted = m.Scheduler(
        class_name="DPMSolverMultistepScheduler", settings={"use_karras_sigmas": True}
    )
    [ours] = bench.ours("StableDiffusionPipeline", "sd15", given, [7], scheduler=wanted)
    pipeline = bench.stock("StableDiffusionPipeline", "sd15")
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, use_karras_sigmas=True
    )
    assert same(ours, pipeline(**given, generator=generator(7)).images[0])


def test_sizes_given_as_lists_equal_stock_with_tuples(bench: Bench) -> None:
    sizes = {
        "original_size": [128, 128],
        "crops_coords_top_left": [8, 0],
        "target_size": [64, 64],
        "negative_original_size": [32, 32],
        "negative_target_size": [64, 64],
    }
    given = parameters("sdxl", "")
    [ours] = bench.ours("StableDiffusionXLPipeline", "sdxl", given | sizes, [7])
    tuples = {name: tuple(value) for name, value in sizes.items()}
    pipeline = bench.stock("StableDiffusionXLPipeline", "sdxl")
    assert same(ours, pipeline(**given, **tuples, generator=generator(7)).images[0])


def refiner(bench: Bench, **given: Any) -> m.Refiner:
    return m.Refiner(checkpoint=bench.model("sdxl_refiner"), parameters=given)


def test_a_refiner_takes_over_latents_where_the_base_stops(bench: Bench) -> None:
    given = parameters("sdxl", "") | {"negative_prompt": "a dog"}
    halfway = given | {"denoising_end": 0.5}
    name = "StableDiffusionXLPipeline"
    [ours] = bench.ours(name, "sdxl", halfway, [7], refiner=refiner(bench))
    base = bench.stock(name, "sdxl")
    latents = base(**halfway, output_type="latent", generator=generator(7)).images
    taken = {key: value for key, value in given.items() if key not in SIZE}
    refining = bench.stock("StableDiffusionXLImg2ImgPipeline", "sdxl_refiner")
    stock = refining(**taken, image=latents, denoising_start=0.5, generator=generator(7))
    assert same(ours, stock.images[0])


def test_a_refiner_refines_the_finished_picture_with_its_own_strength(bench: Bench) -> None:
    given = parameters("sdxl", "") | {"negative_prompt": "a dog"}
    own = {"strength": 0.5, "aesthetic_score": 5.0, "negative_prompt": "a bird"}
    name = "StableDiffusionXLPipeline"
    [ours] = bench.ours(name, "sdxl", given, [7], refiner=refiner(bench, **own))
    picture = bench.stock(name, "sdxl")(**given, generator=generator(7)).images[0]
    taken = {key: value for key, value in given.items() if key not in SIZE} | own
    refining = bench.stock("StableDiffusionXLImg2ImgPipeline", "sdxl_refiner")
    assert same(ours, refining(**taken, image=picture, generator=generator(7)).images[0])


@pytest.mark.parametrize("flags", [True, False])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_safety_checker_blackens_what_it_flags_in_every_pipeline(
    bench: Bench, family: str, flags: bool
) -> None:
    folder = tiny.build_safety_checker(bench.models / f"safety-{flags}", flags)
    name, given = pipeline_name(family, ""), parameters(family, "")
    received = bench.worker.generate(
        pipeline=name,
        checkpoint=bench.model(family),
        parameters=given,
        safety_checker=m.Model(name="safety", path=str(folder)),
    )
    [told] = [each for each in received if isinstance(each, m.Picture)]
    unchecked = bench.stock(name, family)(**given, generator=generator(1)).images[0]
    assert told.nsfw is flags
    picture = Image.open(io.BytesIO(told.data))
    assert same(picture, np.zeros((64, 64, 3)) if flags else unchecked)


def test_pictures_of_odd_sizes_are_made_smaller_to_multiples_of_eight(bench: Bench) -> None:
    given = parameters("sd15", "Img2Img") | {"image": PICTURE.resize((77, 71))}
    [ours] = bench.ours("StableDiffusionImg2ImgPipeline", "sd15", given, [7])
    given["image"] = given["image"].resize((72, 64), Image.Resampling.LANCZOS)
    pipeline = bench.stock("StableDiffusionImg2ImgPipeline", "sd15")
    assert same(ours, pipeline(**given, generator=generator(7)).images[0])


def test_previews_come_between_the_steps(bench: Bench) -> None:
    received = bench.worker.generate(
        pipeline="StableDiffusionXLPipeline",
        checkpoint=bench.model("sdxl"),
        parameters=parameters("sdxl", ""),
        previews=3,
    )
    previews = [each for each in received if isinstance(each, m.Preview)]
    assert len(previews) == 3
    assert all(Image.open(io.BytesIO(each.data)).format == "JPEG" for each in previews)
    assert all(each.index == 0 for each in previews)


def test_texts_travel_inside_the_picture_and_leave_its_pixels_alone(bench: Bench) -> None:
    texts = {"parameters": "a cat\nSteps: 4, Größe: 64", "job": "1"}
    given = parameters("sd15", "")
    received = bench.worker.generate(
        pipeline="StableDiffusionPipeline",
        checkpoint=bench.model("sd15"),
        parameters=given,
        calls=[m.Call(seed=7, metadata=texts)],
    )
    picture = Image.open(io.BytesIO(pictures(received)[0]))
    assert {key: picture.info[key] for key in texts} == texts
    [plain] = bench.ours("StableDiffusionPipeline", "sd15", given, [7])
    assert same(picture, plain)
