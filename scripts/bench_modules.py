"""What scripts/bench measures of modules beside the denoiser, alone: decoders and text encoders."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gpu_worker.compilers.cuda_graph import CudaGraphs
from gpu_worker.compilers.inductor import Inductor
from gpu_worker.compilers.none import Uncompiled
from gpu_worker.interposer import LAYOUTS, Target
from gpu_worker.slots import lay_out
from scripts.bench_engine import timed
from scripts.bench_rig import SIZES, Results, psnr, true_vae
from scripts.true_architectures import CLIP_L, OPENCLIP_BIG_G

TOKENS = 77
TIMES = 5
ENCODERS: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "sd15": [(CLIPTextModel, CLIP_L)],
    "sdxl": [(CLIPTextModel, CLIP_L), (CLIPTextModelWithProjection, OPENCLIP_BIG_G)],
}


def decoder(results: Results, name: str, device: torch.device, work: Path) -> None:
    dtype = torch.float16 if device.type == "cuda" and "xl" not in name else torch.float32
    vae = true_vae(name, device).to(dtype)
    latents = torch.randn(1, 4, SIZES[name] // 8, SIZES[name] // 8, device=device, dtype=dtype)
    target = Target(vae, "decode", LAYOUTS[("AutoencoderKL", "decode")])
    kwargs = {"z": latents, "return_dict": False}
    inductor = Inductor(work / "inductor", device)
    expected = target.run(**kwargs)[0]
    base, _ = timed(lambda: [target.run(**kwargs) for _ in range(TIMES)])
    lay_out(vae, inductor.memory_format)
    for _ in range(5):
        inductor.run(target, (), kwargs)
    began = time.monotonic()
    inductor.wait()
    took = time.monotonic() - began
    made = inductor.run(target, (), kwargs)[0]
    seconds, _ = timed(lambda: [inductor.run(target, (), kwargs) for _ in range(TIMES)])
    results.add(f"{name} decoder, compiled", f"{seconds / TIMES * 1000:.1f} ms", base / seconds, "",
                f"stock {base / TIMES * 1000:.1f} ms, {psnr(made, expected):.1f} dB, "
                f"compiled in {took:.1f} s, "
                f"{str(dtype).removeprefix('torch.')}")  # fmt: skip


def text_encoders(results: Results, name: str, device: torch.device) -> None:
    """One prompt, as pipelines have it encoded; as a graph where there can be one."""
    if device.type == "cuda":
        for kind, config in ENCODERS[name]:
            with device:
                module = kind(CLIPTextConfig(**config)).eval().half()
            label = f"{name} text encoder of {config['num_hidden_layers']} layers, as a graph"
            encoding(results, label, module, hidden_states=name == "sdxl")


def encoding(results: Results, label: str, module: Any, hidden_states: bool) -> None:
    target = Target(module, "forward", LAYOUTS[(type(module).__name__, "forward")])
    ids = torch.randint(0, module.config.vocab_size, (1, TOKENS), device=module.device)
    kwargs = {"input_ids": ids, "output_hidden_states": hidden_states}
    base, expected = timed(lambda: [target.run(**kwargs) for _ in range(TIMES)])
    graphs = CudaGraphs(Uncompiled(), module.device)
    run = partial(graphs.run, target, (), kwargs)
    for _ in range(3):
        run()
    seconds, made = timed(lambda: [run() for _ in range(TIMES)])
    same = psnr(made[0].last_hidden_state, expected[0].last_hidden_state)
    results.add(label, f"{seconds / TIMES * 1000:.2f} ms", base / seconds, "",
                f"stock {base / TIMES * 1000:.2f} ms, {same:.1f} dB, "
                f"{graphs.graphs} graph")  # fmt: skip
