"""A fleet without processes: a clock that is set by hand, and workers that only listen."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ipc import messages as m
from supervisor.errors import Problem
from supervisor.fleet import Fleet
from supervisor.jobs import Job
from supervisor.observer import Observer
from supervisor.settings import Settings
from supervisor.states import WorkerState
from supervisor.worker import Cause, Worker
from supervisor.worker_process import Exit

SETTINGS = Settings(max_queue=3, step_timeout_seconds=60, load_timeout_seconds=600)
MEMORY = m.Memory(total=8, used=1, free=7)


def model(name: str = "cat") -> m.Model:
    return m.Model(name=name, path=f"/models/{name}", family="sd15")


def generate(id: str, checkpoint: str = "cat", calls: int = 1, **changes: Any) -> m.Generate:
    defaults: dict[str, Any] = {
        "pipeline": "StableDiffusionPipeline",
        "parameters": {"prompt": id, "num_inference_steps": 10},
        "calls": [m.Call(seed=seed) for seed in range(calls)],
    }
    return m.Generate(job=id, checkpoint=model(checkpoint), **defaults | changes)


def job(id: str = "job", now: float = 0.0, deadline: float = 1e9, **changes: Any) -> Job:
    """`changes` are the message's; `caller` and `pinned_worker` the job's."""
    own = {name: changes.pop(name) for name in ("caller", "pinned_worker") if name in changes}
    return Job(id, generate(id, **changes), now, deadline, **own)


def resident(name: str = "cat", tier: m.Tier = "device") -> m.Resident:
    return m.Resident(checkpoint=name, path=f"/models/{name}", family="sd15", vae=None,
                      loras=[], tier=tier, bytes=1, last_used=0.0)  # fmt: skip


def picture(id: str, index: int = 0) -> m.Picture:
    return m.Picture(job=id, index=index, data=b"picture %d" % index)


class FakeProcess:
    """Remembers what is done to it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.signals: list[str] = []

    def terminate(self) -> None:
        self.signals.append("terminate")

    def kill(self) -> None:
        self.signals.append("kill")


class FakeFleet:
    """A fleet, its clock, and what its workers were sent."""

    def __init__(
        self,
        workers: int = 2,
        capacity: int = 1,
        settings: Settings = SETTINGS,
        launch: m.Load | None = None,
        ready: bool = True,
    ) -> None:
        self.now = 0.0
        self.capacity = capacity
        devices = ["cpu"] * workers
        self.fleet = Fleet(settings, devices, launch, clock=lambda: self.now, draw=lambda: 0.0)
        self.sent: dict[int, list[m.ToWorker]] = {id: [] for id in self.fleet.workers}
        self.processes: dict[int, FakeProcess] = {}
        for worker in self.fleet.workers.values():
            self.spawn(worker)
            if ready:
                self.report_ready(worker)

    def worker(self, id: int = 0) -> Worker:
        return self.fleet.workers[id]

    def states(self) -> list[WorkerState]:
        return [worker.state for worker in self.fleet.workers.values()]

    def spawn(self, worker: Worker) -> None:
        self.processes[worker.id] = FakeProcess(worker.id)
        self.sent[worker.id] = []
        self.fleet.worker_spawned(worker, self.processes[worker.id], self.sent[worker.id].append)

    def report_ready(self, worker: Worker, protocol: int = m.PROTOCOL_VERSION) -> None:
        message = m.Ready(protocol=protocol, device_name="fake", memory=MEMORY, packages={},
                          capacity=self.capacity)  # fmt: skip
        self.fleet.received(worker, message)

    def hold(self, id: int, *names: str, tier: m.Tier = "device") -> None:
        models = [resident(name, tier) for name in names]
        self.fleet.received(self.worker(id), m.Residency(models=models, memory=MEMORY))

    def submit(self, *jobs: Job) -> None:
        for each in jobs:
            self.fleet.submit(each)

    def receive(self, message: m.FromWorker, worker: int = 0) -> None:
        self.fleet.received(self.worker(worker), message)

    def finish(self, one: Job, **figures: Any) -> None:
        """Its worker sends all pictures and says that it is done."""
        assert one.worker is not None
        for index in range(one.expected_pictures):
            self.receive(picture(one.id, index), one.worker)
        self.receive(m.Finished(job=one.id, **figures), one.worker)

    def die(self, id: int = 0, code: int = 1) -> None:
        self.fleet.worker_exited(self.worker(id), Exit(code))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.fleet.ticked()

    def revive(self, id: int = 0) -> None:
        """After a death: the delay passes, a process comes and is ready."""
        while self.worker(id).state is WorkerState.BACKING_OFF:
            self.pass_time(0.1)
        assert self.worker(id).state is WorkerState.STARTING, self.worker(id).state
        self.spawn(self.worker(id))
        self.report_ready(self.worker(id))

    def running(self, id: int = 0) -> list[str]:
        return list(self.worker(id).running)


def code_of(one: Job) -> str | None:
    """The code of the problem that a job ended with."""
    assert one.outcome is not None
    return one.outcome.problem.code if one.outcome.problem else None


@contextmanager
def refused(code: str) -> Iterator[Callable[[], Problem]]:
    """What is done inside raises a Problem of this code."""
    problems: list[Problem] = []
    try:
        yield lambda: problems[0]
    except Problem as problem:
        problems.append(problem)
    assert [problem.code for problem in problems] == [code]


def kinds(sent: list[m.ToWorker]) -> list[str]:
    return [type(message).__name__ for message in sent]


def crash_before_ready(fake: FakeFleet, id: int, times: int = 5) -> None:
    worker = fake.worker(id)
    for _ in range(times):
        if worker.state is WorkerState.BACKING_OFF:
            while worker.state is WorkerState.BACKING_OFF:
                fake.pass_time(1)
            fake.spawn(worker)
        fake.die(id, 7)


class Diary(Observer):
    def __init__(self) -> None:
        self.entries: list[str] = []

    def job_refused(self, code: str) -> None:
        self.entries.append(f"refused {code}")

    def job_dispatched(self, job: Job, worker: Worker) -> None:
        self.entries.append(f"dispatched {job.id}")

    def job_answered(self, job: Job, worker: Worker, finished: m.Finished) -> None:
        self.entries.append(f"answered {job.id}")

    def job_ended(self, job: Job) -> None:
        self.entries.append(f"ended {job.id}")

    def worker_exited(self, worker: Worker, cause: Cause) -> None:
        self.entries.append(f"{cause.kind} {cause.words}")

    def models_changed(
        self, worker: Worker, loaded: list[m.Resident], unloaded: list[m.Resident]
    ) -> None:
        names = [[model.checkpoint for model in models] for models in (loaded, unloaded)]
        self.entries.append(f"models {names}")
