"""Hears what a worker says, from the event loop itself: to wake a task up for each message would
cost more than most messages do."""

import asyncio
from collections.abc import Callable
from typing import NoReturn

from ipc.channel import AsyncChannel, CutFrame
from ipc.messages import FromWorker, ToWorker

Channel = AsyncChannel[ToWorker, FromWorker]


async def listen(
    channel: Channel, received: Callable[[FromWorker], None], frame_seconds: float
) -> NoReturn:
    """Calls `received` with each message until it is cancelled. Raises PeerGone, a ProtocolError,
    also for a frame that is not whole after `frame_seconds`, or what `received` raises."""
    listener = _Listener(channel, received, frame_seconds)
    listener.loop.add_reader(channel.read_fd, listener.readable)
    try:
        await listener.over
    finally:
        listener.stop()


class _Listener:
    def __init__(
        self, channel: Channel, received: Callable[[FromWorker], None], frame_seconds: float
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.over: asyncio.Future[NoReturn] = self.loop.create_future()
        self._channel = channel
        self._received = received
        self._frame_seconds = frame_seconds
        self._late: asyncio.TimerHandle | None = None

    def readable(self) -> None:
        try:
            for message in self._channel.read():
                self._on_time()
                self._received(message)
        except Exception as error:
            self.stop(error)
        else:
            if self._late is None and self._channel.is_within_frame:
                self._late = self.loop.call_later(self._frame_seconds, self._overdue)

    def stop(self, error: Exception | None = None) -> None:
        self._on_time()
        self.loop.remove_reader(self._channel.read_fd)
        if error is not None and not self.over.done():
            self.over.set_exception(error)

    def _overdue(self) -> None:
        self.stop(CutFrame(f"a frame was not whole after {self._frame_seconds:g} s"))

    def _on_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
