"""Turns a work folder's results into the files that ship: fp16 safetensors in Diffusers' layout."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from scripts.demo_model.captions import known_words
from scripts.demo_model.companions import OUTLINE_FILE
from scripts.demo_model.models import load_autoencoder, noise_schedule
from scripts.demo_model.tokenizer import write_tokenizer

_FILE_LIMIT = 15 * 10**6
_TOTAL_LIMIT = 40 * 10**6


def export(work: Path, out: Path) -> None:
    """Write what of the checkpoint and its companions is trained so far, then check the sizes."""
    out.mkdir(parents=True, exist_ok=True)
    _export_checkpoint(work, out / "checkpoint")
    if (work / "paper").exists():
        AutoencoderKL.from_pretrained(work / "paper").half().save_pretrained(out / "vae_paper")
    if (work / "edges").exists():
        controlnet = ControlNetModel.from_pretrained(work / "edges").half()
        controlnet.save_pretrained(out / "controlnet_edges")
    if (work / "outline").exists():
        weights = load_file(work / "outline" / OUTLINE_FILE)
        halves = {name: weight.half().contiguous() for name, weight in weights.items()}
        save_file(halves, out / OUTLINE_FILE, metadata={"format": "pt"})
    _forget_origins(out)
    _check_sizes(out)


def _export_checkpoint(work: Path, folder: Path) -> None:
    trained = work / "diffusion"
    if not trained.exists():
        trained = work / "averaged"
        print("[export] the denoiser was not trained to the end", flush=True)
    pipeline = StableDiffusionPipeline(
        vae=load_autoencoder(work),
        text_encoder=CLIPTextModel.from_pretrained(trained / "text_encoder"),
        # Written anew: transformers 5 saves tokenizer.json, but not vocab.json and merges.txt.
        tokenizer=write_tokenizer(known_words(), folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(trained / "unet"),
        scheduler=noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)


def _forget_origins(out: Path) -> None:
    """Strip what Diffusers adds to a module that it loaded: the path of the work folder."""
    for path in (*out.rglob("config.json"), *out.rglob("model_index.json")):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_sizes(out: Path) -> None:
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)  # Diffusers leaves them readable for their owner alone
    sizes = {path: path.stat().st_size for path in out.rglob("*") if path.is_file()}
    for path, size in sizes.items():
        if size > _FILE_LIMIT:
            raise ValueError(f"cannot ship {path}: {size} bytes (limit {_FILE_LIMIT})")
    if (total := sum(sizes.values())) > _TOTAL_LIMIT:
        raise ValueError(f"cannot ship {out}: {total} bytes in all (limit {_TOTAL_LIMIT})")
    print(f"[export] {len(sizes)} files, {total / 1e6:.1f} MB", flush=True)
