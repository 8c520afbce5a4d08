"""Workers that die or run out of memory under load: what becomes of jobs, device and memory."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from time import monotonic

from scripts.host_load import Answer, Load
from scripts.host_probe import Sample, Watch, used_bytes, watching
from scripts.host_scene import ROOT, Scene, refused, row, until
from supervisor import monitoring
from tests.tools.server import RunningServer

ASSERTING = (sys.executable, str(ROOT / "tests/tools/asserting_server.py"))
LARGE_PIXELS = 2048
SPARED_BYTES = 2**29
# Takes what is free on a device but for so many bytes, and keeps it.
HOG = """
import sys, time, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(max(0, free - int(sys.argv[1])), dtype=torch.uint8, device="cuda")
print("held", flush=True)
time.sleep(300)
"""


def faults(scene: Scene) -> None:
    count, due = len(scene.devices), scene.work / "assert"
    baseline = used_bytes()
    with scene.server(count, ASSERTING, IGI_ASSERT_FILE=str(due)) as server:
        with (
            watching(server.url, scene.work / "samples") as watch,
            scene.load(server, scene.mixed, [scene.copies[0]], count) as load,
        ):
            time.sleep(scene.warm_up_seconds)
            last = server.placement()[-1]
            kill = Fault("killed worker", watch, load, baseline)
            os.kill(last["pid"], signal.SIGKILL)
            kill.outlived(count)
            assertion = Fault("device-side assert", watch, load, baseline)
            due.touch()
            assertion.outlived(count)
            if baseline:
                out_of_memory(scene, server, load)
        attempts = max((a.meta["attempts"] for a in load.answers if a.meta), default=0)
        row(count, f"jobs lost, of {len(load.answers)} (most attempts of one)",
            f"{refused(load.answers)} ({attempts})", "0")  # fmt: skip


def out_of_memory(scene: Scene, server: RunningServer, load: Load) -> None:
    """A picture that the device has no room for, among the others."""
    body = scene.mixed.body(scene.copies[0], random.Random(0))
    body["parameters"] |= {"width": LARGE_PIXELS, "height": LARGE_PIXELS, "num_inference_steps": 4}
    with little_memory(scene):
        sent = monotonic()
        answer = server.generate(body).json()
        ended = monotonic()
        until(lambda: served_after(load, ended, answer) is not None)
    rung = answer.get("meta", {}).get("memory_fallback") or answer.get("code", "none")
    served = served_after(load, ended, answer)
    again = "not seen" if served is None else f"{served.done - ended:.1f} s"
    row(len(scene.devices), "out of memory: answered after; rung; serves again after",
        f"{ended - sent:.1f} s; {rung}; {again}")  # fmt: skip


def served_after(load: Load, ended: float, answer: dict[str, object]) -> Answer | None:
    """The next picture of the worker that answered, begun after it did; of any that failed."""
    meta = answer.get("meta")
    worker = meta["worker"] if isinstance(meta, dict) else None
    later = [a for a in list(load.answers) if a.status == 200 and a.dispatched > ended]
    return next((a for a in later if worker in (None, a.meta["worker"])), None)


@contextlib.contextmanager
def little_memory(scene: Scene) -> Iterator[None]:
    """Others take nearly all of every device's memory that is free."""
    command = [sys.executable, "-c", HOG, str(SPARED_BYTES)]
    hogs = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": device.removeprefix("cuda:")},
        )
        for device in scene.devices
    ]
    try:
        for hog in hogs:
            assert hog.stdout is not None
            hog.stdout.readline()
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


class Fault:
    """One worker's death, which is about to be brought about."""

    def __init__(self, name: str, watch: Watch, load: Load, baseline: list[int]) -> None:
        self._name, self._watch, self._load, self._baseline = name, watch, load, baseline
        until(lambda: any(sample.workers for sample in watch.samples()))
        self._at = monotonic()
        self._before = [s for s in watch.samples() if s.workers][-1].workers

    def outlived(self, count: int) -> None:
        """Waits until the device serves again; tells after how long, and what its memory did."""
        row(count, f"{self._name}: its device serves again after", self._recovery(), "-")
        row(count, f"{self._name}: memory above baseline before it", self._memory())

    def _recovery(self) -> str:
        until(lambda: self._served_again() is not None)
        answer = self._served_again()
        if answer is None:
            return "not seen"
        began, ready = (when - self._at for when in self._stages())
        served = answer.done - self._at
        return f"{served:.1f} s (process {began:.1f}, ready {ready:.1f})"

    def _stages(self) -> tuple[float, float]:
        """When the next process was seen, and when it was ready."""
        id, died = self._died()
        after = [(s.at, s.worker(id)) for s in self._after() if id is not None and s.at >= died]
        old = {worker["pid"] for worker in self._before} | {None}
        began = next((at for at, worker in after if worker["pid"] not in old), float("nan"))
        ready = next((at for at, w in after if at >= began and w["state"] == "ready"), began)
        return began, ready

    def _served_again(self) -> Answer | None:
        worker, died = self._died()
        again = [a for a in list(self._load.answers) if a.status == 200 and a.dispatched > died]
        return next((a for a in again if a.meta["worker"] == worker), None)

    def _died(self) -> tuple[int | None, float]:
        """The worker that has another process now or none, and when that was first seen."""
        pids = {worker["id"]: worker["pid"] for worker in self._before}
        for sample in self._after():
            for worker in sample.workers:
                if worker["pid"] != pids[worker["id"]]:
                    return int(worker["id"]), sample.at
        return None, float("inf")

    def _after(self) -> list[Sample]:
        return [s for s in self._watch.samples() if s.workers and s.at > self._at]

    def _memory(self) -> str:
        """The least that was in use until the next process was there."""
        id, died = self._died()
        if id is None or not self._baseline:
            return "-"
        index = int(self._before[id]["device"].removeprefix("cuda:"))
        between: list[Sample] = []
        for sample in (s for s in self._after() if s.at >= died):
            between.append(sample)
            if sample.worker(id)["pid"] is not None:
                break
        above = min(s.used_bytes[index] for s in between) - self._baseline[index]
        verdict = "back" if above <= monitoring.HELD_BYTES else "NOT BACK"
        return f"{above / 2**20:.0f} MB, {verdict}"
