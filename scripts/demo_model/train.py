"""Trains the demo checkpoint and its companions, stage by stage.

    python -m scripts.demo_model.train --work build/demo --out gpu_worker/demo

Each stage leaves a folder in the work folder and is skipped where that exists; an interrupted
diffusion stage goes on where it was saved. On one GPU everything takes about ten minutes, with the
stages that can overlap started as processes of their own (`--stages`): each waits for its needs.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from scripts.demo_model.autoencoder import adopt_autoencoder, train_autoencoder, train_paper
from scripts.demo_model.companions import train_edges, train_outline
from scripts.demo_model.diffusion import train_diffusion
from scripts.demo_model.export import export
from scripts.demo_model.layout import train_text
from scripts.demo_model.training import Context, Plan

STAGES: Final[dict[str, Callable[[Context, Plan], None]]] = {
    "autoencoder": train_autoencoder,
    "text": train_text,
    "diffusion": train_diffusion,
    "paper": train_paper,
    "outline": train_outline,
    "edges": train_edges,
}

_HOUR: Final = 3600.0
PLANS: Final = {
    # An H200 and ten minutes. The seconds are ceilings for a slower device.
    "gpu": {
        "autoencoder": Plan(batch=128, rate=1e-3, steps=6000, seconds=150, scenes=65536),
        "text": Plan(batch=1024, rate=1e-3, steps=4000, seconds=50, scenes=300_000),
        "diffusion": Plan(batch=512, rate=1e-3, steps=16000, seconds=300, scenes=300_000),
        "paper": Plan(batch=128, rate=5e-4, steps=1500, seconds=80, scenes=32768),
        "outline": Plan(batch=256, rate=1e-3, steps=1500, seconds=65, scenes=65536),
        "edges": Plan(batch=256, rate=1e-3, steps=3000, seconds=80, scenes=131072),
    },
    # About a day on eight cores.
    "cpu": {
        "autoencoder": Plan(batch=16, rate=5e-4, steps=20000, seconds=6 * _HOUR, scenes=16384),
        "text": Plan(batch=128, rate=1e-3, steps=8000, seconds=_HOUR, scenes=50_000, tokens=40),
        "diffusion": Plan(batch=64, rate=5e-4, steps=40000, seconds=16 * _HOUR, scenes=100_000),
        "paper": Plan(batch=16, rate=3e-4, steps=2000, seconds=_HOUR, scenes=8192),
        "outline": Plan(batch=64, rate=5e-4, steps=1500, seconds=_HOUR, scenes=16384),
        "edges": Plan(batch=64, rate=3e-4, steps=3000, seconds=2 * _HOUR, scenes=32768),
    },
    # Seconds: shows that every stage runs, learns nothing.
    "rehearsal": {
        name: Plan(batch=8, rate=1e-3, steps=3, seconds=60, scenes=64) for name in STAGES
    },
}


def main() -> None:
    """Run the stages asked for, then export what there is."""
    arguments = _parse()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    arguments.work.mkdir(parents=True, exist_ok=True)
    context = Context(
        work=arguments.work,
        device=torch.device(arguments.device),
        seed=arguments.seed,
        compiled=arguments.compile,
        start=arguments.start,
    )
    if arguments.frozen_vae:
        adopt_autoencoder(context)
    for name in arguments.stages:
        if (arguments.work / name).exists():
            print(f"[{name}] is there already", flush=True)
            continue
        STAGES[name](context, _plan(arguments, name))
    if arguments.out:
        export(arguments.work, arguments.out)


def _plan(arguments: argparse.Namespace, name: str) -> Plan:
    wanted = {
        field: getattr(arguments, field)
        for field in ("batch", "rate", "steps", "seconds", "scenes", "tokens", "until")
        if getattr(arguments, field) is not None
    }
    return dataclasses.replace(PLANS[arguments.plan][name], **wanted)


def _parse() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate results")
    parser.add_argument("--out", type=Path, help="folder to export to, when the stages are done")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--plan", choices=PLANS, default="gpu" if cuda else "cpu")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the networks first")
    parser.add_argument("--start", type=Path, help="checkpoint whose UNet and VAE to begin with")
    parser.add_argument(
        "--frozen-vae", action="store_true", help="take the VAE of --start instead of training one"
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--batch", type=int, help="overrides the plan, like the six below")
    parser.add_argument("--rate", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--scenes", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--until", type=float, help="when to end, in seconds since the epoch")
    return parser.parse_args()


if __name__ == "__main__":
    main()
