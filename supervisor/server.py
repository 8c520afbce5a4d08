"""The whole server: fleet, service and HTTP in one event loop, from start to drained."""

import asyncio
import ctypes
import gc
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
from hypercorn.asyncio import serve as hypercorn_serve
from hypercorn.config import Config

from ipc import messages
from supervisor import app, monitoring, sockets
from supervisor.deliverer import Deliverer
from supervisor.fleet import Fleet
from supervisor.hub import Hub
from supervisor.keeper import Keeper
from supervisor.lives import Lives
from supervisor.models import Models
from supervisor.outbox import Outbox
from supervisor.preparation import Preparation, model_paths
from supervisor.quota import Quota
from supervisor.service import Service
from supervisor.settings import Settings, SettingsError
from supervisor.start_checks import check_compilation, is_open_to_all
from supervisor.storage import Storage
from supervisor.worker import Worker
from supervisor.worker_process import COMMAND

log = logging.getLogger(__name__)

OUTBOX_SECONDS = 5.0
DRAIN_POLL_SECONDS = 0.05
CLOSE_SECONDS = 1.0
TASK_PAUSE_SECONDS = 1.0
COLLECT_AFTER_OBJECTS = 5000
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h
KEPT_BYTES = 64 * 2**20
"""Of freed memory in each of two arenas, for the next pictures."""


def devices_of(settings: Settings) -> list[str]:
    """Torch devices, one worker each. Raises SettingsError for a GPU that is not there."""
    count = monitoring.gpu_count(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if settings.devices == ("auto",):
        return [f"cuda:{index}" for index in range(count)] or ["cpu"]
    missing = [word for word in settings.devices if word != "cpu" and int(word) >= count]
    if missing:
        raise SettingsError(f"cannot use DEVICES={','.join(settings.devices)}: "
                            f"this host has {count} GPUs")  # fmt: skip
    return [word if word == "cpu" else f"cuda:{word}" for word in settings.devices]


class Server:
    """Everything of one running server; `run` returns when it has stopped."""

    def __init__(
        self,
        settings: Settings,
        listening: list[socket.socket],
        command: Sequence[str] = COMMAND,
    ) -> None:
        """`command` starts a worker or, with `--fork-server`, what forks them."""
        self.settings = settings
        self._sockets = listening
        devices = devices_of(settings)
        check_compilation(settings, devices, monitoring.packages()["stable_fast"])
        half = settings.dtype == "float16" or (settings.dtype == "auto" and devices != ["cpu"])
        models = Models(settings, Hub(settings, half=half))
        preparation = Preparation(settings, models)
        launch = None
        if settings.launch_checkpoint:
            launch = preparation.load(settings.launch_checkpoint, settings.launch_vae, "launch")
        self.fleet = Fleet(settings, devices, launch)
        self._lives = Lives(self.fleet, self._start_message, command, forks=True)
        self._quota = Quota(settings.data_dir, settings.max_data_dir_bytes, self._paths_in_use)
        self._outbox = Outbox(settings.data_dir / "outbox.sqlite3")
        self._storage = Storage(settings.image_dir, self._quota)
        self._deliverer = Deliverer(self._outbox, settings)
        self._keeper = Keeper(settings, self._storage, self._deliverer, self._quota)
        self.fleet.observers.append(self._keeper)
        self.service = Service(settings, self.fleet, preparation, self._keeper)
        self._app = app.build(self.service, models, self._storage)

    def _paths_in_use(self) -> set[Path]:
        """What workers hold and jobs need; asked from threads."""
        workers = list(self.fleet.workers.values())
        held = {Path(model.path) for worker in workers for model in list(worker.models)}
        jobs = [job for worker in workers for job in list(worker.running.values())]
        jobs += list(self.fleet.queued.values())
        return held | {Path(path) for job in jobs for path in model_paths(job.message)}

    def _start_message(self, worker: Worker) -> messages.Start:
        settings = self.settings
        return messages.Start(
            protocol=messages.PROTOCOL_VERSION,
            device="cpu" if worker.device == "cpu" else "cuda:0",
            dtype=settings.dtype,
            device_memory_bytes=settings.device_memory_bytes,
            host_memory_bytes=settings.host_memory_bytes,
            compile_backend=settings.compile_backend,
            cuda_graph=settings.cuda_graph,
            cache_dir=str(settings.data_dir / "cache"),
        )

    async def run(self) -> None:
        """Serves until SIGTERM or SIGINT, then drains; a second signal ends it at once."""
        # What is there by now stays: no collection has to look at it. And requests leave few
        # cycles: most of what 700 new objects make a collection look at is still in use.
        gc.freeze()
        gc.set_threshold(COLLECT_AFTER_OBJECTS)
        keep_freed_memory()
        async with anyio.create_task_group() as group:
            await self._storage.start()
            group.start_soon(self.service.run)
            group.start_soon(self._deliverer.run)
            for task in (self._keeper.run, self._quota.watch):
                group.start_soon(tended, task)
            closing, workers_gone = anyio.Event(), anyio.Event()
            group.start_soon(self._keep_workers, workers_gone)
            group.start_soon(self._serve_http, closing)
            if is_open_to_all(self.settings):
                log.warning("anyone who reaches this port may use it: set API_KEY or HOST")
            log.info("serving", extra={"addresses": sockets.addresses(self._sockets)})
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                await anext(signals)
                group.start_soon(self._stop, group.cancel_scope, closing, workers_gone)
                await anext(signals)
                log.warning("stopping at once")
                group.cancel_scope.cancel()

    async def _keep_workers(self, gone: anyio.Event) -> None:
        await self._lives.run()
        gone.set()

    async def _serve_http(self, closing: anyio.Event) -> None:
        async with anyio.create_task_group() as group:

            async def close_late() -> None:
                """Hypercorn waits for idle connections without end; this does not."""
                await closing.wait()
                await anyio.sleep(CLOSE_SECONDS)
                group.cancel_scope.cancel()

            group.start_soon(close_late)
            application: Any = self._app  # Hypercorn's types are narrower than ASGI's
            config = http_config(self._sockets, self.settings.header_timeout_seconds)
            # Hypercorn's own error, when it is cancelled while connections are open.
            with suppress(asyncio.InvalidStateError):
                await hypercorn_serve(application, config, shutdown_trigger=closing.wait)
            group.cancel_scope.cancel()

    async def _idle(self) -> None:
        while not (self.fleet.is_idle and self.service.is_idle):  # noqa: ASYNC110 - two owners
            await anyio.sleep(DRAIN_POLL_SECONDS)

    async def _stop(
        self, scope: anyio.CancelScope, closing: anyio.Event, workers_gone: anyio.Event
    ) -> None:
        """Drains, ends the workers, answers whoever still waits, flushes the outbox."""
        log.info("draining", extra={"seconds": self.settings.drain_seconds})
        self.fleet.drain()
        with anyio.move_on_after(self.settings.drain_seconds):
            await self._idle()
        self.service.stop()
        self.fleet.stop()
        await workers_gone.wait()
        await self._deliverer.aclose(OUTBOX_SECONDS)
        log.info("stopped")
        closing.set()  # last: Hypercorn ends its own stop by cancelling whoever runs it
        await anyio.sleep(CLOSE_SECONDS)
        scope.cancel()


def keep_freed_memory() -> None:
    """Otherwise each picture is new memory, a page fault for each 4 KiB of its five copies."""
    with suppress(OSError, AttributeError):  # another C library
        allocator = ctypes.CDLL(None)
        allocator.mallopt(M_ARENA_MAX, 2)
        allocator.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES // 2)
        allocator.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


async def tended(task: Callable[[], Awaitable[None]]) -> None:
    """Begins a task anew that a defect has ended, where no request depends on it."""
    while True:
        try:
            return await task()
        except Exception:
            log.exception("cannot go on with %s, which begins anew", task.__qualname__)
            await anyio.sleep(TASK_PAUSE_SECONDS)


def http_config(listening: list[socket.socket], header_seconds: float) -> Config:
    config = Config()
    config.bind = [f"fd://{bound.fileno()}" for bound in listening]
    config.include_server_header = False
    config.keep_alive_timeout = header_seconds  # also how long a request's head may take
    config.read_timeout = None  # it would end long jobs with a false disconnect
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn")
    return config
