"""What a bench of a whole host runs on: its devices, its checkpoints, servers started on them."""

import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import psutil

from scripts.host_load import Answer, Load, zipf
from supervisor import monitoring
from tests.tools.server import SERVE, RunningServer, running

ROOT = Path(__file__).resolve().parents[1]
GB = 2**30
MIXED = "sd15"
COPIES_PER_DEVICE = 3
COMPILE_SECONDS = 360.0
RECOVERY_SECONDS = 150.0
POLL_SECONDS = 0.1
LOG_LINES = 15
SETTINGS = ("CUDA_GRAPH", "COMPILE_BACKEND", "DTYPE")

# Run in processes of their own: the bench keeps no device context and none of their memory.
WRITE_TRUE = """
import pathlib, sys
from scripts.true_architectures import write_checkpoint
write_checkpoint(pathlib.Path(sys.argv[1]), sys.argv[2], 0, "cuda")
"""
WRITE_TINY = """
import pathlib, sys
from tests.tools.tiny import build_checkpoint
build_checkpoint(pathlib.Path(sys.argv[1]), sys.argv[2])
"""


@dataclass(frozen=True)
class Model:
    """What is asked of one architecture; `callers` are those per device."""

    family: str
    pixels: int
    steps: int
    callers: int

    def body(self, checkpoint: str, draws: random.Random) -> dict[str, Any]:
        """A picture of its own; step counts differ, so that jobs join and leave one by one."""
        parameters = {
            "prompt": f"a painting of a harbour, number {draws.randrange(10**6)}",
            "seed": draws.randrange(2**31),
            "num_inference_steps": self.steps + draws.choice((-2, -1, 0, 1, 2)),
            "guidance_scale": 7.5,
            "width": self.pixels,
            "height": self.pixels,
        }
        scheduler = "EulerDiscreteScheduler"
        return {"checkpoint": checkpoint, "parameters": parameters, "scheduler": scheduler}


class Compilations(NamedTuple):
    """How often the workers have said so."""

    begun: int
    ended: int
    loaded: int

    @classmethod
    def told_in(cls, log: Path) -> "Compilations":
        text = log.read_text()
        ended = text.count("compiled ") + text.count("cannot compile ")
        return cls(text.count("compiling "), ended, text.count("loaded code "))

    @property
    def under_way(self) -> bool:
        return self.begun > self.ended


TRUE = (Model("sd15", 512, 20, 8), Model("sdxl", 1024, 20, 4))
TINY = (Model("sd15", 64, 10, 4), Model("sdxl", 64, 10, 2))


@dataclass
class Scene:
    """`devices` as torch names them; checkpoints and the servers' data lie under `work`."""

    work: Path
    devices: list[str]
    models: Sequence[Model]
    seconds: float
    warm_up_seconds: float

    @property
    def is_rehearsal(self) -> bool:
        return "cpu" in self.devices

    @property
    def counts(self) -> list[int]:
        """All devices first, since their start fills the cold cache; then 1, 2, 4, …"""
        n = len(self.devices)
        return [n, *(1 << power for power in range(n.bit_length()) if 1 << power < n)]

    @property
    def checkpoints(self) -> Path:
        return self.work / "models" / "checkpoints"

    @property
    def mixed(self) -> Model:
        return next(model for model in self.models if model.family == MIXED)

    @property
    def copies(self) -> list[str]:
        """The checkpoints of the mix, the most wanted first."""
        return [f"{MIXED}-{n}" for n in range(COPIES_PER_DEVICE * len(self.devices))]

    @contextmanager
    def server(
        self, count: int, command: Sequence[str] = SERVE, **settings: str
    ) -> Iterator[RunningServer]:
        """On the first `count` devices; tells how long the start took."""
        data_dir, began = self.work / "data", monotonic()
        cache = "filled" if any((data_dir / "cache").glob("*")) else "empty"
        words = ",".join(device.removeprefix("cuda:") for device in self.devices[:count])
        given = {"DEVICES": words, "MAX_QUEUE": "4096", "LAUNCH_CHECKPOINT": f"{MIXED}-0"}
        given |= {"MODEL_DIR": str(self.work / "models"), "HUB_ALLOW": "nobody"}
        try:
            with running(data_dir, command, workers=count, **given | settings) as server:
                figure = f"start to ready with {MIXED}-0, cache {cache}"
                row(count, figure, f"{monotonic() - began:.1f} s", "15 s (filled)")
                yield server
        except Exception:
            lines = (data_dir / "log").read_text().splitlines()
            print("The server's last words:", *lines[-LOG_LINES:], sep="\n", flush=True)
            raise

    def load(self, server: RunningServer, model: Model, names: list[str], count: int) -> Load:
        """`names` are wanted by Zipf's law."""
        callers = model.callers * count
        return Load(server.url, callers, lambda draws: model.body(zipf(names, draws), draws))

    def warm_up(self, server: RunningServer, model: Model, names: list[str], count: int) -> None:
        """Under load, until nothing was compiled or loaded for the warm-up's seconds."""
        began = changed = monotonic()
        earlier = seen = Compilations.told_in(server.log)
        expected = os.environ.get("COMPILE_BACKEND") == "inductor"
        with self.load(server, model, names, count) as load:
            while monotonic() - began < COMPILE_SECONDS and (
                monotonic() - changed < self.warm_up_seconds
                or seen.under_way
                or (expected and seen == earlier)
            ):
                time.sleep(POLL_SECONDS)
                before, seen = seen, Compilations.told_in(server.log)
                changed = changed if seen == before else monotonic()
            seconds = monotonic() - began
        if server.process.poll() is not None:
            raise RuntimeError("the server went away under load")
        refused(load.answers)
        row(count, f"{model.family} warm-up under load", f"{seconds:.1f} s")

    def prepare(self) -> None:
        """Writes the checkpoints that are not there yet; the compile cache begins empty."""
        shutil.rmtree(self.work / "data", ignore_errors=True)
        (self.work / "data").mkdir(parents=True)
        began = monotonic()
        self._write()
        self._copy()
        size = sum(weight_bytes(folder) for folder in self.checkpoints.iterdir())
        print(f"{size / GB:.2f} GB of checkpoints, {monotonic() - began:.1f} s", flush=True)

    def _write(self) -> None:
        """One of each architecture, side by side."""
        code = WRITE_TINY if self.is_rehearsal else WRITE_TRUE
        folders = {model.family: self.checkpoints / f"{model.family}-0" for model in self.models}
        writers = [
            subprocess.Popen([sys.executable, "-c", code, str(folder), family], cwd=ROOT)
            for family, folder in folders.items()
            if not folder.exists()
        ]
        codes = [writer.wait() for writer in writers]
        if any(codes):
            sys.exit("cannot write the checkpoints")

    def _copy(self) -> None:
        from scripts.true_architectures import write_variant

        def copy(number: int) -> None:
            folder = self.checkpoints / self.copies[number]
            if not folder.exists():
                write_variant(self.checkpoints / self.copies[0], folder, number)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(copy, range(len(self.copies))))

    def describe(self) -> str:
        versions = ", ".join(f"{n} {v}" for n, v in monitoring.packages().items() if v)
        gpus = {"CPU"} if self.is_rehearsal else {str(gpu["name"]) for gpu in monitoring.gpus()}
        given = " ".join(f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ)
        memory = psutil.virtual_memory().total / GB
        return (
            f"{len(self.devices)} x {', '.join(sorted(gpus))}, {os.cpu_count()} cores, "
            f"{memory:.0f} GB; Python {platform.python_version()}, {versions}; "
            f"{given or 'default settings'}"
        )


def row(count: int, figure: str, seen: str, target: str = "-") -> None:
    print(f"| {count:2} | {figure:58} | {seen:>34} | {target:>12} |", flush=True)


def refused(answers: Iterable[Answer]) -> int:
    """How many answers are no picture; the first of them is shown."""
    lost = [answer for answer in answers if answer.status != 200]
    if lost:
        print(f"{len(lost)} failed, the first: {lost[0].status} {lost[0].problem}", flush=True)
    return len(lost)


def weight_bytes(folder: Path) -> int:
    """What a checkpoint's weights take on disk."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def until(holds: Callable[[], object], seconds: float = RECOVERY_SECONDS) -> bool:
    """Whether it came to hold in time."""
    deadline = monotonic() + seconds
    while not holds() and monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return bool(holds())
