"""The supervisor's end of one worker's pipes, blocking: for tests that speak the protocol."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ipc import messages as m
from ipc.channel import BlockingChannel, Codec

ROOT = Path(__file__).parents[2]
REAL = ("-m", "gpu_worker")
SCRIPTED = (str(ROOT / "tests/tools/scripted_worker.py"),)
ASSERTING = (str(ROOT / "tests/tools/asserting_worker.py"),)
LEAKING = (str(ROOT / "tests/tools/leaking_worker.py"),)
ENDS = (m.Finished, m.Rejected, m.Failed, m.Cancelled, m.Fatal)


class WorkerClient:
    """Starts a worker and talks to it. Leave it as a context manager to end the worker."""

    def __init__(self, command: Iterable[str] = REAL, start: m.Start | None = None) -> None:
        from_us, to_worker = os.pipe()
        to_us, from_worker = os.pipe()
        descriptors = ["--read-fd", str(from_us), "--write-fd", str(from_worker)]
        self.process = subprocess.Popen(
            [sys.executable, *command, *descriptors, "--parent", str(os.getpid())],
            pass_fds=(from_us, from_worker),
            start_new_session=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        os.close(from_us)
        os.close(from_worker)
        self.read_fd, self.write_fd = to_us, to_worker
        self.channel: BlockingChannel[m.ToWorker, m.FromWorker] = BlockingChannel(
            to_us, to_worker, Codec(m.FromWorker)
        )
        self.jobs = 0
        self.send(start or m.Start(protocol=m.PROTOCOL_VERSION, device="cpu"))

    def send(self, message: m.ToWorker) -> None:
        self.channel.send(message)

    def receive(self) -> m.FromWorker:
        return self.channel.receive()

    def ready(self) -> list[m.FromWorker]:
        """Ready and Residency."""
        return [self.receive(), self.receive()]

    def until_end(self) -> list[m.FromWorker]:
        """Messages up to the one that ends a job."""
        received = [self.receive()]
        while not isinstance(received[-1], ENDS):
            received.append(self.receive())
        return received

    def generate(self, **request: Any) -> list[m.FromWorker]:
        """Runs one job to its end; `prompt` and the like go into `parameters`."""
        self.jobs += 1
        defaults: dict[str, Any] = {"output_format": "png", "calls": [m.Call(seed=1)]}
        self.send(m.Generate(job=f"job-{self.jobs}", **defaults | request))
        return self.until_end()

    def close(self) -> int:
        """Closes the pipes and waits for the worker. Its exit code."""
        for descriptor in (self.read_fd, self.write_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self.read_fd = self.write_fd = -1
        return self.process.wait(30)

    def __enter__(self) -> "WorkerClient":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def pictures(received: list[m.FromWorker]) -> list[bytes]:
    """The data of the pictures, in order. Fails where the job did not finish."""
    assert isinstance(received[-1], m.Finished), received[-1]
    found = sorted(
        (each for each in received if isinstance(each, m.Picture)), key=lambda each: each.index
    )
    return [each.data for each in found]
