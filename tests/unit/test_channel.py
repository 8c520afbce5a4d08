"""Frames over real pipes, both ends, and each way in which a peer can go wrong."""

import os
import threading
import time
from collections.abc import Callable, Iterator

import anyio
import anyio.lowlevel
import msgspec
import pytest

from ipc import messages as m
from ipc.channel import (
    BlockingChannel,
    Codec,
    CutFrame,
    MalformedMessage,
    NonBlockingChannel,
    OversizedFrame,
    PeerGone,
    ProtocolError,
    UnknownMessage,
)
from supervisor.conversation import Conversation

CAP = 4 * 2**20
PROGRESS = m.Progress(job="j", phase="denoising", step=1, steps=2)
LARGE = m.Picture(job="j", index=0, data=b"x" * 10_000)


class Ends:
    """A pair of pipes: the worker's descriptors and the supervisor's."""

    def __init__(self) -> None:
        self.worker_reads, self.supervisor_writes = os.pipe()
        self.supervisor_reads, self.worker_writes = os.pipe()

    def worker(self) -> BlockingChannel[m.FromWorker, m.ToWorker]:
        return BlockingChannel(self.worker_reads, self.worker_writes, Codec(m.ToWorker, CAP))

    def supervisor(self) -> NonBlockingChannel[m.ToWorker, m.FromWorker]:
        return NonBlockingChannel(
            self.supervisor_reads,
            self.supervisor_writes,
            Codec(m.FromWorker, CAP),
        )

    def close(self, *descriptors: int) -> None:
        for descriptor in descriptors:
            os.close(descriptor)


@pytest.fixture
def ends() -> Iterator[Ends]:
    pair = Ends()
    yield pair
    for descriptor in (pair.worker_reads, pair.supervisor_writes,
                       pair.supervisor_reads, pair.worker_writes):  # fmt: skip
        try:
            os.close(descriptor)
        except OSError:
            continue  # the test closed it


def test_messages_pass_in_both_directions(ends: Ends) -> None:
    worker, supervisor = ends.worker(), ends.supervisor()
    worker.send(PROGRESS)
    assert list(supervisor.read()) == [PROGRESS]
    assert list(supervisor.read()) == []
    assert supervisor.send(m.Cancel(job="j"))
    assert worker.receive() == m.Cancel(job="j")


Channel = NonBlockingChannel[m.ToWorker, m.FromWorker]


async def listen(
    channel: Channel, received: Callable[[m.FromWorker], None], seconds: float
) -> None:
    with Conversation(channel, received, seconds) as conversation:
        await conversation.ended()


async def heard(channel: Channel, count: int) -> list[m.FromWorker]:
    """So many messages, as the supervisor hears them."""
    messages: list[m.FromWorker] = []

    def received(message: m.FromWorker) -> None:
        messages.append(message)
        if len(messages) == count:
            raise EOFError

    with pytest.raises(EOFError):
        await listen(channel, received, 5)
    return messages


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


WRONG: list[tuple[str, bytes, type[Exception]]] = [
    ("clean end", b"", PeerGone),
    ("cut header", b"\x00\x00", CutFrame),
    ("cut payload", frame(b"12345")[:-2], CutFrame),
    ("no payload", frame(b"12345")[:4], CutFrame),
    ("one byte over the cap", (CAP + 1).to_bytes(4, "big"), OversizedFrame),
    ("4 GiB", b"\xff\xff\xff\xff", OversizedFrame),
    ("garbage", frame(b"\xc1\xff\x00garbage"), MalformedMessage),
    ("no MessagePack map", frame(msgspec.msgpack.encode([1, 2])), MalformedMessage),
    ("deep nesting", frame(b"\x91" * 100_000), MalformedMessage),
    ("bad UTF-8", frame(b"\x81\xa4type\xa2\xff\xfe"), MalformedMessage),
    ("unknown type", frame(msgspec.msgpack.encode({"type": "later"})), UnknownMessage),
    ("unknown field", frame(msgspec.msgpack.encode({"type": "cancelled", "job": "j", "x": 1})),
     MalformedMessage),
    ("missing field", frame(msgspec.msgpack.encode({"type": "cancelled"})), MalformedMessage),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sent", "expected"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG]
)
def test_the_supervisor_tells_each_wrong_end_apart(
    ends: Ends, sent: bytes, expected: type[Exception]
) -> None:
    def write() -> None:
        os.write(ends.worker_writes, frame(msgspec.msgpack.encode(PROGRESS)) + sent)
        os.close(ends.worker_writes)

    writer = threading.Thread(target=write)  # a frame of 100 kB does not fit a pipe at once
    writer.start()
    messages: list[m.FromWorker] = []
    with pytest.raises(expected) as raised:
        anyio.run(listen, ends.supervisor(), messages.append, 5)
    writer.join()
    assert type(raised.value) is expected
    assert messages == [PROGRESS], "what came before it was heard"


# The two with a field amiss are messages that only a worker sends.
WRONG_FOR_WORKER = [case for case in WRONG if len(case[1]) < 60_000 and "field" not in case[0]]


@pytest.mark.parametrize(
    ("sent", "expected"), [c[1:] for c in WRONG_FOR_WORKER], ids=[c[0] for c in WRONG_FOR_WORKER]
)
def test_the_worker_tells_each_wrong_end_apart(
    ends: Ends, sent: bytes, expected: type[Exception]
) -> None:
    os.write(ends.supervisor_writes, sent)
    ends.close(ends.supervisor_writes)
    with pytest.raises(expected):
        ends.worker().receive()


def test_a_message_over_the_cap_is_not_sent(ends: Ends) -> None:
    with pytest.raises(OversizedFrame, match="cap"):
        ends.worker().send(m.Preview(job="j", index=0, data=bytes(CAP)))


@pytest.mark.parametrize("send", ["worker", "supervisor"])
def test_sending_to_a_peer_that_is_gone_says_so(ends: Ends, send: str) -> None:
    if send == "worker":
        ends.close(ends.supervisor_reads)
        with pytest.raises(PeerGone):
            ends.worker().send(PROGRESS)
    else:
        supervisor = ends.supervisor()
        ends.close(ends.worker_reads)
        with pytest.raises(PeerGone):
            supervisor.send(m.Cancel(job="j"))


def test_a_protocol_error_is_never_a_clean_end() -> None:
    assert not issubclass(PeerGone, ProtocolError)
    assert not issubclass(ProtocolError, PeerGone)


def test_a_large_message_waits_for_room_in_the_pipe(ends: Ends) -> None:
    load = m.Load(job="j" * 2**20, checkpoint=m.Model(name="n", path="/n"))
    messages = [load, m.Cancel(job="j"), load]

    async def exchange() -> list[m.ToWorker]:
        worker, channel = ends.worker(), ends.supervisor()
        with Conversation(channel, print, 5) as conversation:
            for message in messages:
                conversation.say(message)
            return [await anyio.to_thread.run_sync(worker.receive) for _ in messages]

    assert anyio.run(exchange) == messages


def test_nothing_is_said_once_a_conversation_is_over(ends: Ends) -> None:
    """Its descriptors may be somebody else's by then."""

    async def exchange() -> None:
        with Conversation(ends.supervisor(), print, 5) as conversation:
            conversation.say(m.Cancel(job="heard"))
        conversation.say(m.Cancel(job="lost"))

    anyio.run(exchange)
    ends.close(ends.supervisor_writes)
    worker = ends.worker()
    assert worker.receive() == m.Cancel(job="heard")
    with pytest.raises(PeerGone):
        worker.receive()


def test_a_worker_that_is_gone_is_told_of_by_what_is_heard(ends: Ends) -> None:
    async def exchange() -> None:
        with Conversation(ends.supervisor(), print, 5) as conversation:
            ends.close(ends.worker_reads)
            conversation.say(m.Cancel(job="lost"))
            ends.close(ends.worker_writes)
            await conversation.ended()

    with pytest.raises(PeerGone, match="cannot receive"):
        anyio.run(exchange)


def test_two_megabyte_frames_stream_without_holding_up_the_loop(ends: Ends) -> None:
    """At least 100 MB/s, with a ticker beside it that is never late by 50 ms."""
    frames, size = 100, 2 * 2**20
    worker, picture = ends.worker(), m.Picture(job="j", index=0, data=os.urandom(size))
    sender = threading.Thread(target=lambda: [worker.send(picture) for _ in range(frames)])

    async def receive() -> tuple[float, float]:
        supervisor, late = ends.supervisor(), [0.0]
        async with anyio.create_task_group() as group:
            group.start_soon(ticker, late)
            sender.start()
            began = time.monotonic()
            pictures = await heard(supervisor, frames)
            group.cancel_scope.cancel()
            assert all(picture.data == each.data for each in pictures)  # type: ignore[union-attr]
        return frames * size / (time.monotonic() - began), max(late)

    rate, latest = anyio.run(receive)
    sender.join()
    assert rate >= 100e6, f"{rate / 1e6:.0f} MB/s"
    assert latest < 0.05, f"late by {latest * 1000:.0f} ms"


async def ticker(late: list[float], now: Callable[[], float] = time.monotonic) -> None:
    while True:
        expected = now() + 0.005
        await anyio.sleep(0.005)
        late.append(now() - expected)


def test_frames_that_come_together_or_in_crumbs_are_each_read_whole(ends: Ends) -> None:
    small, large = (frame(msgspec.msgpack.encode(message)) for message in (PROGRESS, LARGE))
    supervisor = ends.supervisor()
    os.write(ends.worker_writes, small * 2 + large + small)
    assert list(supervisor.read()) == [PROGRESS, PROGRESS, LARGE, PROGRESS]
    assert not supervisor.is_within_frame
    os.write(ends.worker_writes, large * 2)
    assert list(supervisor.read()) == [LARGE]
    assert list(supervisor.read()) == [LARGE]
    os.write(ends.worker_writes, large[:-1])
    assert list(supervisor.read()) == []
    assert supervisor.is_within_frame
    os.write(ends.worker_writes, large[-1:])
    assert list(supervisor.read()) == [LARGE]
    os.write(ends.worker_writes, small)
    assert list(supervisor.read()) == [PROGRESS]
    for byte in small[:-1]:
        os.write(ends.worker_writes, bytes([byte]))
        assert list(supervisor.read()) == []
        assert supervisor.is_within_frame
    os.write(ends.worker_writes, small[-1:] + small[:2])
    assert list(supervisor.read()) == [PROGRESS]
    os.write(ends.worker_writes, small[2:])
    assert list(supervisor.read()) == [PROGRESS]


def test_a_frame_that_is_not_whole_in_time_is_cut(ends: Ends) -> None:
    os.write(ends.worker_writes, frame(msgspec.msgpack.encode(PROGRESS))[:-1])
    with pytest.raises(CutFrame, match=r"not whole after 0\.05 s"):
        anyio.run(listen, ends.supervisor(), print, 0.05)


def test_each_frame_has_its_own_time(ends: Ends) -> None:
    """Every write ends within a frame, and all of them take longer than one frame may."""
    whole = frame(msgspec.msgpack.encode(PROGRESS))

    def write() -> None:
        os.write(ends.worker_writes, whole[:3])
        for _ in range(10):
            time.sleep(0.1)
            os.write(ends.worker_writes, whole[3:] + whole[:3])
        os.close(ends.worker_writes)

    writer, messages = threading.Thread(target=write), list[m.FromWorker]()
    writer.start()
    with pytest.raises(CutFrame, match="closed its end"):
        anyio.run(listen, ends.supervisor(), messages.append, 0.7)
    writer.join()
    assert messages == [PROGRESS] * 10


def test_many_small_frames_do_not_hold_up_the_loop(ends: Ends) -> None:
    many = frame(msgspec.msgpack.encode(PROGRESS)) * 1000
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async def exchange() -> None:
        os.write(ends.worker_writes, many)
        async with anyio.create_task_group() as group:
            group.start_soon(count)
            assert await heard(ends.supervisor(), 1000) == [PROGRESS] * 1000
            group.cancel_scope.cancel()

    anyio.run(exchange)
    assert turns >= len(many) // 4096


def test_closing_gives_both_descriptors_back(ends: Ends) -> None:
    ends.supervisor().close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(ends.supervisor_reads)
