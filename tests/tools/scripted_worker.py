"""A worker without a model: it speaks the protocol, and does wrong when it is told to.

Started like the real one (`--read-fd N --write-fd M --parent PID`) and held to the
same contract by tests/process/test_worker_contract.py. It makes a picture of one
colour, which follows from the seed, and imports no torch.

A prompt (or each of a job's calls' prompts) that begins with `fault:`, or is JSON
with a "fault", names what goes wrong, with settings after it:

    fault:exit code=3 step=2            {"fault": "exit", "code": 3, "step": 2}

exit (code), abort, stop (SIGSTOP), hang (no progress, still alive), garbage (a
frame that is no message), unknown_message, half_frame (then=exit|silence),
oversized_frame (announces 4 GiB), out_of_memory (memory_fallback=RUNG finishes
with it; without it the job fails, and with worn=1 the worker then asks to be
replaced), cuda_error (Fatal, exit 70), reject and fail
(code, detail, field), ignore_term, grandchild (seconds; a sleep, its process id
in pid_file), flood_stderr (bytes), print (bytes, to stdout), slow (nothing but
its settings).

Settings of any fault: step=K (before step K, counted over the whole job from 1;
0: before loading), step_seconds, load_seconds, encode_seconds, picture_bytes (each
picture's least size), times=N with count_file=PATH (only the first N times).

The environment variable IGI_SCRIPT holds the same words for the worker as a whole:
die_before_ready (code), hang_before_ready, ignore_term, or none, with start_seconds,
capacity, max_models, and defaults of the settings above; visible_device=1 limits it to
the worker whose CUDA_VISIBLE_DEVICES is that.
"""

import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[2]))

from gpu_worker import __main__ as process
from gpu_worker import guard, loop
from ipc import messages as m
from ipc.channel import BlockingChannel, Codec

Script = dict[str, Any]


def parsed(text: str) -> Script:
    """`fault:exit code=3`, `exit code=3` or JSON as settings; numbers become numbers."""
    if text.startswith("{"):
        return dict(json.loads(text))
    words = text.removeprefix("fault:").split()
    script: Script = {} if not words or "=" in words[0] else {"fault": words.pop(0)}
    return script | {key: value(word) for key, _, word in (w.partition("=") for w in words)}


def value(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


def prompt_script(parameters: Script) -> Script:
    prompt = parameters.get("prompt")
    scripted = isinstance(prompt, str) and (
        prompt.startswith("fault:") or (prompt.startswith("{") and '"fault"' in prompt)
    )
    return parsed(prompt) if scripted else {}  # type: ignore[arg-type]


def still_due(script: Script) -> bool:
    """Whether a fault limited to its first `times` is due, counted in a file across processes."""
    if "count_file" not in script:
        return True
    with open(script["count_file"], "ab") as file:
        if file.tell() >= script.get("times", 1):
            return False
        file.write(b".")
    return True


def environment_script() -> Script:
    script = parsed(os.environ.get("IGI_SCRIPT", ""))
    limited = "visible_device" in script
    here = os.environ.get("CUDA_VISIBLE_DEVICES", "") == str(script.get("visible_device"))
    return {} if limited and not here else script


def picture(width: int, height: int, seed: int, output_format: str, least_bytes: int) -> bytes:
    """A picture of the seed's colour; PNG needs no library."""
    colour = bytes(zlib.crc32(b"%d %d" % (seed, channel)) & 255 for channel in range(3))
    if output_format == "png":
        return solid_png(width, height, colour, least_bytes)
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (width, height), tuple(colour)).save(file, output_format)
    return file.getvalue().ljust(least_bytes, b"\0")


def solid_png(width: int, height: int, colour: bytes, least_bytes: int = 0) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + colour * width) * height, 1))
    padding = chunk(b"tEXt", b"padding\0".ljust(least_bytes, b"x")) if least_bytes else b""
    return b"\x89PNG\r\n\x1a\n" + header + padding + pixels + chunk(b"IEND", b"")


class Cancelled(Exception):
    """The job was cancelled."""


class Ended(Exception):
    """A fault has answered the job."""


class ScriptedRunner:
    """Runs jobs on as many threads as its capacity."""

    def __init__(
        self, start: m.Start, send: loop.Send, write_fd: int, state: dict[str, bool]
    ) -> None:
        self.defaults = environment_script()
        self.send = send
        self.write_fd = write_fd
        self.state = state
        self.lock = threading.Lock()
        self.cancelled: dict[str, threading.Event] = {}
        self.models: dict[str, m.Resident] = {}
        self.jobs: queue.SimpleQueue[loop.Work] = queue.SimpleQueue()
        capacity = int(self.defaults.get("capacity", 1))
        self.send(ready(capacity))
        self.tell_residency()
        for _ in range(capacity):
            threading.Thread(target=self.work, daemon=True).start()

    def submit(self, work: loop.Work) -> None:
        self.cancelled[work.job] = threading.Event()
        self.jobs.put(work)

    def cancel(self, job: str) -> None:
        if job in self.cancelled:
            self.cancelled[job].set()

    def work(self) -> None:
        while True:
            work = self.jobs.get()
            try:
                self.run(work)
            except Cancelled:
                self.send(m.Cancelled(job=work.job))
            except FileNotFoundError:
                self.send(unknown(work))
            except Ended:
                pass
            self.cancelled.pop(work.job, None)

    def run(self, work: loop.Work) -> None:
        match work:
            case m.Generate():
                self.generate(work)
            case m.Load():
                self.load(work, self.defaults)
                self.send(m.Finished(job=work.job))
            case m.Unload():
                if self.models.pop(work.checkpoint.path, None):
                    self.tell_residency()
                self.send(m.Finished(job=work.job))

    def generate(self, work: m.Generate) -> None:
        script = self.defaults | prompt_script(work.calls[0].parameters | work.parameters)
        due = still_due(script)
        self.fault(work, script, 0, due)
        self.load(work, script)
        steps_each = int(work.parameters.get("num_inference_steps", 4))
        steps, step, began = steps_each * len(work.calls), 0, time.monotonic()
        for index, call in enumerate(work.calls):
            self.progress(work, "encoding", step, steps)
            for number in range(steps_each):
                self.fault(work, script, step + 1, due)
                self.pause(work.job, script.get("step_seconds", 0))
                step += 1
                self.progress(work, "denoising", step, steps)
                if number < work.previews:
                    data = picture(8, 8, call.seed + number, "jpeg", 0)
                    self.send(m.Preview(job=work.job, index=index, data=data))
            self.progress(work, "decoding", step, steps)
            self.deliver(work, index, call, script)
        self.send(finished(work.job, script if due else {}, time.monotonic() - began, step))

    def deliver(self, work: m.Generate, index: int, call: m.Call, script: Script) -> None:
        parameters = work.parameters | call.parameters
        width, height = (int(parameters.get(side) or 64) for side in ("width", "height"))
        self.pause(work.job, script.get("encode_seconds", 0))
        least_bytes = int(script.get("picture_bytes", 0))
        data = picture(width, height, call.seed, work.output_format, least_bytes)
        self.send(m.Picture(job=work.job, index=index, data=data), work.progress_seconds)

    def load(self, work: m.Generate | m.Load, script: Script) -> None:
        self.progress(work, "loading", 0, 0)
        model = work.checkpoint
        size = sum(file.stat().st_size for file in files(Path(model.path)))
        with self.lock:
            known = model.path in self.models
            if not known:
                self.pause(work.job, script.get("load_seconds", 0))
            self.models.pop(model.path, None)
            self.models[model.path] = resident(model, work.vae, size)
            while len(self.models) > int(script.get("max_models", 1000)):
                del self.models[next(iter(self.models))]
        if not known:
            self.tell_residency()

    def progress(self, work: m.Generate | m.Load, phase: m.Phase, step: int, steps: int) -> None:
        self.pause(work.job, 0)
        late_seconds = work.progress_seconds if isinstance(work, m.Generate) else 0.0
        told = m.Progress(job=work.job, phase=phase, step=step, steps=steps)
        self.send(told, late_seconds)

    def pause(self, job: str, seconds: float) -> None:
        if self.cancelled[job].wait(seconds):
            raise Cancelled

    def tell_residency(self) -> None:
        self.send(m.Residency(models=list(self.models.values()), memory=MEMORY))

    def fault(self, work: m.Generate, script: Script, step: int, due: bool) -> None:
        if due and step == script.get("step", 1):
            self.do(work.job, script)

    def do(self, job: str, script: Script) -> None:
        match script.get("fault"):
            case "exit":
                os._exit(script.get("code", 1))
            case "abort":
                os.abort()
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                threading.Event().wait()
            case "garbage":
                self.write(b"\0\0\0\4\xc1\xc1\xc1\xc1")
            case "unknown_message":
                self.write(b"\0\0\0\x0f\x81\xa4type\xa8surprise")
            case "half_frame":
                self.half_frame(script)
            case "oversized_frame":
                self.write(b"\xff\xff\xff\xff" + b"x" * 1000)
                threading.Event().wait()
            case "out_of_memory" if "memory_fallback" not in script:
                detail = script.get("detail", "cannot hold the job in the device's memory")
                self.send(m.Failed(job=job, code="out_of_memory", detail=detail))
                if script.get("worn"):
                    self.send(m.Worn(reason="memory", detail="cannot get 1.50 GB back"))
                raise Ended
            case "cuda_error":
                self.send(m.Fatal(reason="device", detail="cannot go on: a CUDA error"))
                os._exit(loop.EXIT_FATAL)
            case "reject":
                code, field = script.get("code", "invalid_request"), script.get("field")
                detail = script.get("detail", "cannot do that")
                self.answer(m.Rejected(job=job, code=code, detail=detail, field=field))
            case "fail":
                code = script.get("code", "generation_failed")
                self.answer(m.Failed(job=job, code=code, detail=script.get("detail", "cannot")))
            case "ignore_term":
                self.state["ignore_term"] = True
            case "grandchild":
                child = subprocess.Popen(["sleep", str(script.get("seconds", 600))])
                if "pid_file" in script:
                    Path(script["pid_file"]).write_text(str(child.pid))
            case "flood_stderr":
                os.write(2, b"a flood of words on stderr\n" * (script.get("bytes", 2**20) // 27))
            case "print":
                os.write(1, b"a library prints\n" * (script.get("bytes", 17) // 17))

    def answer(self, message: m.Rejected | m.Failed) -> NoReturn:
        self.send(message)
        raise Ended

    def half_frame(self, script: Script) -> None:
        self.write(b"\0\0\1\0half of it")
        if script.get("then", "exit") == "exit":
            os._exit(script.get("code", 1))
        threading.Event().wait()

    def write(self, data: bytes) -> None:
        os.write(self.write_fd, data)


MEMORY = m.Memory(total=8 * 2**30, used=2**30, free=7 * 2**30)


def ready(capacity: int) -> m.Ready:
    return m.Ready(
        protocol=m.PROTOCOL_VERSION,
        device_name="scripted",
        memory=MEMORY,
        packages={"torch": None},
        capacity=capacity,
    )


def finished(job: str, script: Script, seconds: float, steps: int) -> m.Finished:
    return m.Finished(
        job=job,
        generation_seconds=seconds,
        step_seconds=seconds / max(steps, 1),
        memory_fallback=script.get("memory_fallback"),
    )


def unknown(work: loop.Work) -> m.Rejected:
    detail = f"cannot load {work.checkpoint.name!r}: its files are not there"
    return m.Rejected(job=work.job, code="unknown_model", detail=detail, field="checkpoint")


def resident(model: m.Model, vae: m.Model | None, size: int) -> m.Resident:
    return m.Resident(
        checkpoint=model.name,
        path=model.path,
        family=model.family,
        vae=vae.name if vae else None,
        loras=[],
        tier="device",
        bytes=size,
        last_used=time.time(),
    )


def files(path: Path) -> list[Path]:
    """The file itself or a folder's files. Raises FileNotFoundError where there is nothing."""
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    path.stat()
    return [path]


def work(parent: int | None, read_fd: int, write_fd: int) -> NoReturn:
    process.die_with_parent(parent)
    guard.start(read_fd, write_fd)
    script = environment_script()
    state = {"ignore_term": script.get("fault") == "ignore_term"}
    signal.signal(signal.SIGTERM, lambda *_: None if state["ignore_term"] else process.end(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def make_runner(start: m.Start, send: loop.Send) -> ScriptedRunner:
        time.sleep(script.get("start_seconds", 0))
        if script.get("fault") == "die_before_ready" and still_due(script):
            os._exit(script.get("code", 1))
        if script.get("fault") == "hang_before_ready" and still_due(script):
            threading.Event().wait()
        return ScriptedRunner(start, send, write_fd, state)

    channel: loop.Channel = BlockingChannel(read_fd, write_fd, Codec(m.ToWorker))
    code = loop.serve(channel, make_runner)
    if state["ignore_term"] and code == 0 and os.getppid() == parent:
        threading.Event().wait()
    process.end(code)


if __name__ == "__main__":
    process.begin(work, lambda: None)
