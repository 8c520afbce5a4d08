"""Speaks with a worker from the event loop itself: to wake tasks up for each message would cost
more than most messages do."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, Self

from ipc.channel import CutFrame, NonBlockingChannel, PeerGone
from ipc.messages import FromWorker, ToWorker


class Conversation:
    """`received` is called with each message of the worker, from `with` until its end or until
    `ended` raises. After that nothing is said either."""

    def __init__(
        self,
        channel: NonBlockingChannel[ToWorker, FromWorker],
        received: Callable[[FromWorker], None],
        frame_seconds: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[NoReturn] = self._loop.create_future()
        self._channel = channel
        self._received = received
        self._frame_seconds = frame_seconds
        self._late: asyncio.TimerHandle | None = None
        self._is_deaf = False
        """The worker reads no more; it may still have said something."""

    def __enter__(self) -> Self:
        self._loop.add_reader(self._channel.read_fd, self._readable)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._end()

    async def ended(self) -> NoReturn:
        """Raises PeerGone, a ProtocolError, also for a frame that is not whole after
        `frame_seconds`, or what `received` raises."""
        await self._over

    def say(self, message: ToWorker) -> None:
        """What a worker that is gone does not hear is lost: `ended` tells. Raises
        OversizedFrame."""
        if self._over.done() or self._is_deaf:
            return
        try:
            if not self._channel.send(message):
                self._loop.add_writer(self._channel.write_fd, self._writable)
        except PeerGone:
            self._is_deaf = True

    def _readable(self) -> None:
        try:
            for message in self._channel.read():
                self._on_time()
                self._received(message)
        except Exception as error:
            self._end(error)
        else:
            if self._late is None and self._channel.is_within_frame:
                self._late = self._loop.call_later(self._frame_seconds, self._overdue)

    def _writable(self) -> None:
        try:
            if not self._channel.flush():
                return
        except PeerGone:
            self._is_deaf = True
        self._loop.remove_writer(self._channel.write_fd)

    def _end(self, error: Exception | None = None) -> None:
        self._on_time()
        self._loop.remove_reader(self._channel.read_fd)
        self._loop.remove_writer(self._channel.write_fd)
        if error is None:
            self._over.cancel()
        elif not self._over.done():
            self._over.set_exception(error)

    def _overdue(self) -> None:
        self._end(CutFrame(f"a frame was not whole after {self._frame_seconds:g} s"))

    def _on_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
