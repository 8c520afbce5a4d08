"""Frames over a pair of private pipes: a blocking end and an asynchronous end.

A frame is its payload's length as four bytes, big-endian, then one MessagePack
message. A frame that says it is longer than the cap is refused before any of it
is held in memory. Each way in which a peer can go wrong has one exception.
"""

import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar, get_args

import msgspec

HEADER_BYTES = 4
PAUSE_BYTES = 4096
READ_AHEAD_BYTES = 4096
"""Read at once, so that small frames need no read each for their header and their payload."""
MAX_FRAME_BYTES = 256 * 2**20
MAX_NAME = 80

Outgoing = TypeVar("Outgoing")
Incoming = TypeVar("Incoming")


class PeerGone(Exception):
    """The peer closed its end between two frames."""


class ProtocolError(Exception):
    """The peer sent what is not a message; nothing more can be read from it."""


class CutFrame(ProtocolError):
    """The peer closed its end within a frame."""


class OversizedFrame(ProtocolError):
    """A frame announces more bytes than the cap allows."""


class MalformedMessage(ProtocolError):
    """A whole frame holds something that is not a valid message."""


class UnknownMessage(ProtocolError):
    """A well-formed message of a type that this side does not know."""


class Codec(Generic[Outgoing, Incoming]):
    """Turns messages into frames, and payloads into messages of the `incoming` union."""

    def __init__(self, incoming: Any, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(incoming)
        self._known = {str(kind.__struct_config__.tag) for kind in get_args(incoming)}

    def encode(self, message: Outgoing) -> bytearray:
        """Header and payload in one buffer. Raises OversizedFrame past the cap."""
        frame = bytearray(HEADER_BYTES)
        self._encoder.encode_into(message, frame, HEADER_BYTES)
        length = self._checked(len(frame) - HEADER_BYTES)
        frame[:HEADER_BYTES] = length.to_bytes(HEADER_BYTES, "big")
        return frame

    def length(self, header: bytes | bytearray) -> int:
        """The payload's length in bytes. Raises OversizedFrame past the cap."""
        return self._checked(int.from_bytes(header, "big"))

    def decode(self, payload: bytes | bytearray) -> Incoming:
        """Raises UnknownMessage or MalformedMessage; never anything else."""
        try:
            return self._decoder.decode(payload)  # type: ignore[no-any-return]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._diagnosis(payload, error) from error

    def _checked(self, length: int) -> int:
        if length > self.max_frame_bytes:
            raise OversizedFrame(
                f"cannot carry a frame of {length} bytes: the cap is {self.max_frame_bytes}"
            )
        return length

    def _diagnosis(self, payload: bytes | bytearray, error: Exception) -> ProtocolError:
        try:
            content = msgspec.msgpack.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return MalformedMessage(f"cannot decode a frame of {len(payload)} bytes: {error}")
        name = content.get("type") if isinstance(content, dict) else None
        if isinstance(name, str) and name not in self._known:
            return UnknownMessage(f"cannot understand a message of type {name[:MAX_NAME]!r}")
        return MalformedMessage(f"cannot accept a message: {error}")


class BlockingChannel(Generic[Outgoing, Incoming]):
    """The worker's end. One thread receives; any thread may send."""

    def __init__(self, read_fd: int, write_fd: int, codec: Codec[Outgoing, Incoming]) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._codec = codec
        self._sending = threading.Lock()

    def send(self, message: Outgoing) -> None:
        """Blocks until the frame is in the pipe. Raises PeerGone or OversizedFrame."""
        view = memoryview(self._codec.encode(message))
        with self._sending:
            while view:
                try:
                    view = view[os.write(self._write_fd, view) :]
                except BrokenPipeError as error:
                    raise PeerGone("cannot send: the peer closed its end") from error

    def receive(self) -> Incoming:
        """Blocks for the next message. Raises PeerGone or a ProtocolError."""
        header = bytearray(HEADER_BYTES)
        self._fill(header, begun=False)
        payload = bytearray(self._codec.length(header))
        self._fill(payload, begun=True)
        return self._codec.decode(payload)

    def _fill(self, buffer: bytearray, begun: bool) -> None:
        filled = 0
        while filled < len(buffer):
            count = os.readv(self._read_fd, [memoryview(buffer)[filled:]])
            if count == 0:
                raise _ended(begun or filled > 0)
            filled += count


Wait = Callable[[int], Awaitable[None]]


class AsyncChannel(Generic[Outgoing, Incoming]):
    """The supervisor's end: non-blocking, one task receives and one task sends.

    `wait_readable` and `wait_writable` suspend until a descriptor is ready;
    `pause` lets other tasks run, called after every few small frames or a large one so that
    a fast peer cannot keep the event loop to itself. A send that is cancelled leaves the pipe
    unusable: close the channel after it.
    """

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        codec: Codec[Outgoing, Incoming],
        *,
        wait_readable: Wait,
        wait_writable: Wait,
        pause: Callable[[], Awaitable[None]],
    ) -> None:
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._codec = codec
        self._wait_readable = wait_readable
        self._wait_writable = wait_writable
        self._pause = pause
        self._bytes_since_pause = 0
        self._ahead = bytearray()
        self._drained = False

    async def send(self, message: Outgoing) -> None:
        """Returns when the frame is in the pipe. Raises PeerGone or OversizedFrame."""
        view = memoryview(self._codec.encode(message))
        while view:
            try:
                view = view[os.write(self._write_fd, view) :]
            except BlockingIOError:
                await self._wait_writable(self._write_fd)
            except BrokenPipeError as error:
                raise PeerGone("cannot send: the peer closed its end") from error

    async def receive_length(self) -> int:
        """Waits for the next frame's header: the payload's length in bytes."""
        while len(self._ahead) < HEADER_BYTES:
            await self._read_ahead()
        return self._codec.length(self._ahead[:HEADER_BYTES])

    def is_whole(self, length: int) -> bool:
        """Whether the frame of this length needs no more waiting."""
        return len(self._ahead) >= HEADER_BYTES + length

    async def receive_payload(self, length: int) -> Incoming:
        """The rest of a frame that has begun; callers put a deadline on it."""
        end = HEADER_BYTES + length
        payload = self._ahead[HEADER_BYTES:end]
        del self._ahead[:end]
        if len(payload) < length:
            payload = await self._filled(payload, length)
        self._bytes_since_pause += end
        if self._bytes_since_pause >= PAUSE_BYTES:
            self._bytes_since_pause = 0
            await self._pause()
        return self._codec.decode(payload)

    async def receive(self) -> Incoming:
        """The next message. Raises PeerGone or a ProtocolError."""
        return await self.receive_payload(await self.receive_length())

    def close(self) -> None:
        os.close(self._read_fd)
        os.close(self._write_fd)

    async def _read_ahead(self) -> None:
        if self._drained:
            await self._wait_readable(self._read_fd)
        try:
            data = os.read(self._read_fd, READ_AHEAD_BYTES)
        except BlockingIOError:
            self._drained = True
            return
        if not data:
            raise _ended(within_frame=bool(self._ahead))
        self._ahead += data
        self._drained = len(data) < READ_AHEAD_BYTES

    async def _filled(self, begun: bytearray, length: int) -> bytearray:
        """A payload of this length, of which the beginning is there."""
        buffer = begun.ljust(length, b"\0")
        filled = len(begun)
        while filled < length:
            try:
                count = os.readv(self._read_fd, [memoryview(buffer)[filled:]])
            except BlockingIOError:
                await self._wait_readable(self._read_fd)
                continue
            if count == 0:
                raise _ended(within_frame=True)
            filled += count
        return buffer


def _ended(within_frame: bool) -> PeerGone | CutFrame:
    if within_frame:
        return CutFrame("cannot read on: the peer closed its end within a frame")
    return PeerGone("cannot receive: the peer closed its end")
