"""Workers that die under load: what becomes of the jobs, the device and its memory."""

import os
import signal
import sys
import time
from time import monotonic

from scripts.host_load import Answer, Load
from scripts.host_probe import Sample, Watch, used_bytes, watching
from scripts.host_scene import ROOT, Scene, refused, row, until
from supervisor import monitoring

ASSERTING = (sys.executable, str(ROOT / "tests/tools/asserting_server.py"))


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
        attempts = max((a.meta["attempts"] for a in load.answers if a.meta), default=0)
        row(count, f"jobs lost, of {len(load.answers)} (most attempts of one)",
            f"{refused(load.answers)} ({attempts})", "0")  # fmt: skip


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
