"""What happens to pictures after a job and before its answer: files, then webhooks.

Also tells the webhooks of models that come and go. Nothing here waits for an endpoint.
"""

import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import anyio
from anyio import to_thread

from ipc import messages
from supervisor import monitoring, webhooks
from supervisor.deliverer import Deliverer
from supervisor.errors import Problem
from supervisor.fleet import Observer
from supervisor.jobs import Outcome
from supervisor.outbox import Event
from supervisor.quota import Quota
from supervisor.records import Record
from supervisor.settings import Settings
from supervisor.storage import Storage
from supervisor.worker import Worker

log = logging.getLogger(__name__)

EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}


class Change(NamedTuple):
    """Models that a worker has loaded and unloaded, at a time in Unix seconds."""

    worker: int
    at: float
    loaded: list[messages.Resident]
    unloaded: list[messages.Resident]


class Keeper(Observer):
    """Stores pictures by the chosen strategy and writes events into the outbox."""

    def __init__(
        self, settings: Settings, storage: Storage, deliverer: Deliverer, quota: Quota
    ) -> None:
        self._settings = settings
        self._storage = storage
        self._deliverer = deliverer
        self._quota = quota
        self._tells_of_pictures = _is_told(settings, "image.stored", "image.generated")
        self._tells_of_models = _is_told(settings, "model.loaded", "model.unloaded")
        self._changes, self._changed = anyio.create_memory_object_stream[Change](float("inf"))

    async def reserve(self, batch_id: str, store: bool) -> None:
        """Raises Problem when pictures of this batch id cannot be stored."""
        if not store:
            return
        if self._settings.image_storage_strategy == "post":
            if self._settings.webhook_image_stored is None:
                raise Problem("not_supported", "cannot store pictures by POST: "
                              "WEBHOOK_IMAGE_STORED is not set", field="store_images")  # fmt: skip
            return
        await self._storage.reserve(batch_id)

    def release(self, batch_id: str) -> None:
        self._storage.release(batch_id)

    async def keep(self, record: Record, outcome: Outcome, meta: dict[str, Any]) -> list[str]:
        """The stored pictures' names; empty when none were to be stored. Raises Problem."""
        store = record.body.store_images
        by_post = self._settings.image_storage_strategy == "post"
        names = [_name(record, index) for index in range(len(outcome.pictures))] if store else []
        if store and not by_post:
            await self._write(record, outcome)
        if not self._tells_of_pictures:  # a thread costs more than there is to do
            return names
        events = await to_thread.run_sync(self._events, record, outcome, meta, names, by_post)
        if names and by_post:
            await self._put_pictures(events)
        else:
            await self._put_or_log(events)
        return names

    async def _put_pictures(self, events: list[Event]) -> None:
        """With the post strategy an event is the picture: it counts, and it must not be lost."""
        size_bytes = sum(len(event.payload) for event in events)
        with self._quota.room(self._settings.data_dir, size_bytes):
            await self._deliverer.put(events)

    async def _write(self, record: Record, outcome: Outcome) -> None:
        extension = EXTENSIONS[record.body.output_format]
        try:
            for index, picture in enumerate(outcome.pictures):
                await self._storage.store(record.batch_id, index, extension, picture.data)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._storage.discard(record.batch_id)
            raise

    def _events(
        self,
        record: Record,
        outcome: Outcome,
        meta: dict[str, Any],
        names: list[str],
        by_post: bool,
    ) -> list[Event]:
        """Runs in a thread: pictures may go as base64."""
        stored = webhooks.endpoint(self._settings, "image.stored")
        generated = webhooks.endpoint(self._settings, "image.generated")
        if not (generated or (stored and names)):
            return []
        now, node, events = time.time(), self._node(), []
        for index, name in enumerate(names if stored else []):
            image = outcome.pictures[index].data if by_post else str(self._storage.path(name))
            body = webhooks.image_stored(image, record.batch_id, index, now, node)
            events.append(Event("image.stored", str(stored), body))
        if generated:
            message = record.prepared.message
            body = webhooks.image_generated(
                record.batch_id, message.checkpoint.name, message.pipeline,
                record.prepared.seeds, meta, now, node,
            )  # fmt: skip
            events.append(Event("image.generated", generated, body))
        return events

    def _node(self) -> dict[str, object]:
        stats = monitoring.system_stats(self._settings.data_dir, self._quota)
        return webhooks.node_info(self._settings, stats)

    # Models that come and go: told in order by a task, because the fleet does not wait.

    def models_changed(
        self,
        worker: Worker,
        loaded: list[messages.Resident],
        unloaded: list[messages.Resident],
    ) -> None:
        # Else nobody hears of it, and nothing is evicted by when it was used last.
        if self._tells_of_models or self._quota.limit_bytes:
            self._changes.send_nowait(Change(worker.id, time.time(), loaded, unloaded))

    async def run(self) -> None:
        """Tells of models until it is cancelled."""
        async for change in self._changed:
            events = await to_thread.run_sync(self._model_events, change)
            await self._put_or_log(events)

    def _model_events(self, change: Change) -> list[Event]:
        """Runs in a thread. What was just loaded is also the last to make room for others."""
        for model in change.loaded:
            self._quota.touch(Path(model.path))
        told: list[tuple[webhooks.ModelEvent, list[messages.Resident]]] = [
            ("model.loaded", change.loaded),
            ("model.unloaded", change.unloaded),
        ]
        events = []
        for kind, models in told:
            url = webhooks.endpoint(self._settings, kind)
            node = self._node() if url and models else None
            for model in models if url else ():
                body = webhooks.model_event(
                    kind, "checkpoint", model.checkpoint, change.worker, change.at, node
                )
                events.append(Event(kind, str(url), body))
        return events

    async def _put_or_log(self, events: list[Event]) -> None:
        try:
            if events:
                await self._deliverer.put(events)
        except Problem as problem:  # a full disk; what happened has happened all the same
            log.error("cannot tell webhooks", extra={"reason": problem.detail})


def _is_told(settings: Settings, *events: str) -> bool:
    """Whether somebody hears of any of them."""
    return any(webhooks.endpoint(settings, event) for event in events)


def _name(record: Record, index: int) -> str:
    return f"{record.batch_id}-{index}.{EXTENSIONS[record.body.output_format]}"
