"""Messages in, calls of the runner out. Knows no torch, and no more of the work than its names.

The thread that receives does nothing else, so a Cancel, a Shutdown or the end of
the pipe is seen at once, whatever the device is busy with.
"""

import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol, assert_never

from ipc.channel import BlockingChannel, PeerGone, ProtocolError
from ipc.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Fatal,
    FromWorker,
    Generate,
    Load,
    Picture,
    Progress,
    Shutdown,
    Start,
    ToWorker,
    Unload,
)

EXIT_FATAL = 70
EXIT_PROTOCOL = 76

Channel = BlockingChannel[FromWorker, ToWorker]
Work = Generate | Load | Unload


class Runner(Protocol):
    """Does the work. It has sent Ready and Residency when it is made, and sends answers itself."""

    def submit(self, work: Work) -> None:
        """Take a job on; returns at once."""

    def cancel(self, job: str) -> None:
        """End a job at its next step; nothing happens where there is no such job."""


class Send(Protocol):
    """Any thread may call it. What may be late, for so many seconds, is sent together."""

    def __call__(self, message: FromWorker, late_seconds: float = 0.0, /) -> None: ...


MakeRunner = Callable[[Start, Send], Runner]


def serve(channel: Channel, make_runner: MakeRunner) -> int:
    """Runs until Shutdown, the end of the pipe or a broken frame. Returns the exit code."""
    try:
        start = channel.receive()
        problem = refusal(start)
        if problem is not None:
            channel.send(Fatal(reason="protocol", detail=problem))
            return EXIT_PROTOCOL
        assert isinstance(start, Start)
        return _serve(channel, make_runner(start, Sender(channel)))
    except PeerGone:
        return 0
    except ProtocolError as error:
        print(f"the worker stops: {error}", file=sys.stderr)
        return EXIT_PROTOCOL
    except Exception as error:
        traceback.print_exc()
        channel.send(Fatal(reason="start", detail=f"cannot start: {type(error).__name__}"))
        return EXIT_FATAL


def refusal(first: ToWorker) -> str | None:
    """Why a first message cannot be worked with, or None."""
    if not isinstance(first, Start):
        return f"cannot begin with a {type(first).__name__}: the first message is Start"
    if first.protocol != PROTOCOL_VERSION:
        return f"cannot speak protocol {first.protocol}: this worker speaks {PROTOCOL_VERSION}"
    return None


class Sender:
    """A send for the runner's threads: without a supervisor there is nothing left to do.

    Each message wakes the supervisor up, so what may be late waits for one that may not, or for the
    end of its time. Of signs of progress and of what is held the newest is enough; the signs of
    other jobs wait for their time.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._writing = threading.Lock()
        self._changed = threading.Condition()  # never held while the pipe is waited for
        self._late: dict[object, tuple[float, bytearray]] = {}
        """When it is due, and its frame."""
        threading.Thread(target=self._keep_time, name="late", daemon=True).start()

    def __call__(self, message: FromWorker, late_seconds: float = 0.0, /) -> None:
        frame, place = self._channel.encode(message), _place(message)
        if late_seconds == 0:
            return self._flush(frame, getattr(message, "job", ""))
        with self._changed:
            if place in self._late:
                due, _ = self._late[place]
            else:
                due = time.monotonic() + late_seconds
                self._changed.notify()
            self._late[place] = due, frame

    def _keep_time(self) -> None:
        while True:
            with self._changed:
                while (left := self._due() - time.monotonic()) > 0:
                    self._changed.wait(min(left, threading.TIMEOUT_MAX))
            self._flush()

    def _due(self) -> float:
        return min((due for due, _ in self._late.values()), default=math.inf)

    def _flush(self, said: bytearray | None = None, job: str = "") -> None:
        """All that is late, or before what is said of a job all but the signs of others."""
        with self._writing:
            with self._changed:
                late = self._late
                stays = [each for each in late if isinstance(each, str) and each != job]
                self._late = {} if said is None else {place: late.pop(place) for place in stays}
            frames = [frame for _, frame in late.values()]
            try:
                self._channel.write(b"".join([*frames, said or b""]))
            except PeerGone:
                os._exit(0)


def _place(message: FromWorker) -> object:
    """What it shares with those that it takes the place of; a sign of progress, its job's id."""
    match message:
        case Picture():
            return message.job, message.index
        case Progress():
            return message.job
        case _:
            return type(message)


def _serve(channel: Channel, runner: Runner) -> int:
    while True:
        message: Any = channel.receive()
        received: ToWorker = message
        match received:
            case Generate() | Load() | Unload():
                runner.submit(received)
            case Cancel():
                runner.cancel(received.job)
            case Shutdown():
                return 0
            case Start():
                raise ProtocolError("cannot start twice")
            case _:
                assert_never(received)
