"""Frames over a pair of private pipes: an end that blocks and one that never does.

A frame is its payload's length as four bytes, big-endian, then one MessagePack
message. A frame that says it is longer than the cap is refused before any of it
is held in memory. Each way in which a peer can go wrong has one exception.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar, get_args

import msgspec

HEADER_BYTES = 4
READ_BYTES = 4096
"""Read at once, so that small frames need no read each for their header and their payload."""
MAX_FRAME_BYTES = 256 * 2**20
MAX_NAME = 80

Outgoing = TypeVar("Outgoing")
Incoming = TypeVar("Incoming")
Buffer = bytes | bytearray | memoryview


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

    def length(self, header: Buffer) -> int:
        """The payload's length in bytes. Raises OversizedFrame past the cap."""
        return self._checked(int.from_bytes(header, "big"))

    def decode(self, payload: Buffer) -> Incoming:
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

    def _diagnosis(self, payload: Buffer, error: Exception) -> ProtocolError:
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
        self.write(self.encode(message))

    def encode(self, message: Outgoing) -> bytearray:
        """A frame for `write`. Raises OversizedFrame."""
        return self._codec.encode(message)

    def write(self, frames: Buffer) -> None:
        """Blocks until whole frames are in the pipe. Raises PeerGone."""
        view = memoryview(frames)
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


class NonBlockingChannel(Generic[Outgoing, Incoming]):
    """The supervisor's end: never waits. Whoever watches the descriptors calls `read` and `flush`.

    What raises leaves the pipe unusable, but for an OversizedFrame of `send`: close it then.
    """

    def __init__(self, read_fd: int, write_fd: int, codec: Codec[Outgoing, Incoming]) -> None:
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)
        self.read_fd = read_fd
        self.write_fd = write_fd
        self._codec = codec
        self._buffer = bytearray(READ_BYTES)
        self._filled = 0
        self._unsent: deque[memoryview] = deque()

    def send(self, message: Outgoing) -> bool:
        """Whether all of it is in the pipe; what is not goes with `flush`, once `write_fd` is
        ready. Raises PeerGone or OversizedFrame."""
        self._unsent.append(memoryview(self._codec.encode(message)))
        return self.flush()

    def flush(self) -> bool:
        """Whether nothing is left to be sent. Raises PeerGone."""
        while self._unsent:
            try:
                count = os.write(self.write_fd, self._unsent[0])
            except BlockingIOError:
                return False
            except BrokenPipeError as error:
                raise PeerGone("cannot send: the peer closed its end") from error
            if rest := self._unsent.popleft()[count:]:
                self._unsent.appendleft(rest)
        return True

    def read(self) -> Iterator[Incoming]:
        """Messages that are whole by now, but no more than one large one and small ones of twice
        READ_BYTES, so that a fast peer cannot keep its reader to itself; to be taken to the last.
        Raises PeerGone or a ProtocolError, after the messages before it."""
        for _ in range(3):  # a large one's beginning, its rest, and what comes after it
            size = len(self._buffer)
            yield from self._read()
            if len(self._buffer) == size:
                return

    @property
    def is_within_frame(self) -> bool:
        """Whether a frame has begun that is not whole."""
        return self._filled > 0

    def close(self) -> None:
        os.close(self.read_fd)
        os.close(self.write_fd)

    def _read(self) -> Iterator[Incoming]:
        try:
            count = os.readv(self.read_fd, [memoryview(self._buffer)[self._filled :]])
        except BlockingIOError:
            return
        if count == 0:
            raise _ended(self.is_within_frame)
        self._filled += count
        rest, size = memoryview(self._buffer)[: self._filled], READ_BYTES
        while len(rest) >= HEADER_BYTES:
            end = HEADER_BYTES + self._codec.length(rest[:HEADER_BYTES])
            if len(rest) < end:
                size = max(end, READ_BYTES)
                break
            payload, rest = rest[HEADER_BYTES:end], rest[end:]
            yield self._codec.decode(payload)
        self._keep(rest, size)

    def _keep(self, rest: memoryview, size: int) -> None:
        """The beginning of a frame, in a buffer with room for all of it."""
        if len(rest) == self._filled and size <= len(self._buffer):
            return
        if rest or size != len(self._buffer):
            self._buffer = bytearray(rest).ljust(size, b"\0")
        self._filled = len(rest)


def _ended(within_frame: bool) -> PeerGone | CutFrame:
    if within_frame:
        return CutFrame("cannot read on: the peer closed its end within a frame")
    return PeerGone("cannot receive: the peer closed its end")
