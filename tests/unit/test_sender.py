"""What a worker says and when: signs of progress may be late, and come with others then."""

import os
import select
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpu_worker.loop import Sender
from ipc import messages as m
from ipc.channel import BlockingChannel, Codec, OversizedFrame

CAP = 2**20
FINISHED = m.Finished(job="a")


def progress(job: str, step: int) -> m.Progress:
    return m.Progress(job=job, phase="denoising", step=step, steps=9)


class Line:
    """A sender, and what comes out at the other end."""

    def __init__(self, reads: int, writes: int) -> None:
        self.send = Sender(BlockingChannel(reads, writes, Codec(m.ToWorker, CAP)))
        end: BlockingChannel[m.ToWorker, m.FromWorker]
        end = BlockingChannel(reads, writes, Codec(m.FromWorker, CAP))
        self.receive = end.receive
        self._reads = reads

    def is_silent(self, seconds: float) -> bool:
        return not select.select([self._reads], [], [], seconds)[0]


@pytest.fixture
def line() -> Iterator[Line]:
    reads, writes = os.pipe()
    line = Line(reads, writes)
    yield line
    line.send(FINISHED)  # nothing is left for later, when the descriptors are somebody else's
    os.close(writes)
    os.close(reads)


def test_the_newest_signs_of_all_jobs_come_together(line: Line) -> None:
    for step in (1, 2, 3):
        line.send(progress("a", step), 0.1)
        line.send(progress("b", step + 1), 60.0)
    assert [line.receive(), line.receive()] == [progress("a", 3), progress("b", 4)]


def test_a_jobs_sign_goes_before_what_must_be_said_of_it_and_others_in_their_time(
    line: Line,
) -> None:
    line.send(progress("a", 1), 60.0)
    line.send(progress("b", 1), 0.1)
    line.send(FINISHED)
    received = [line.receive() for _ in range(3)]
    assert received == [progress("a", 1), FINISHED, progress("b", 1)]


def test_pictures_may_be_late_too_but_none_takes_anothers_place(line: Line) -> None:
    pictures = [m.Picture(job="a", index=index, data=b"%d" % index) for index in range(2)]
    for picture in pictures:
        line.send(picture, 60.0)
    line.send(FINISHED)
    assert [line.receive() for _ in range(3)] == [*pictures, FINISHED]


def test_of_what_is_held_the_newest_is_told(line: Line) -> None:
    before, after = (
        m.Residency(models=[], memory=m.Memory(total=9, used=n, free=0)) for n in (1, 2)
    )
    line.send(before, 60.0)
    line.send(after, 60.0)
    line.send(FINISHED)
    assert [line.receive(), line.receive()] == [after, FINISHED]


def test_a_sign_is_no_later_than_it_may_be(line: Line) -> None:
    for step in (1, 2):
        began = time.monotonic()
        line.send(progress("a", step), 0.05)
        assert line.receive() == progress("a", step)
        assert 0.05 <= time.monotonic() - began < 5


def test_a_newer_sign_is_as_late_as_the_first_that_was_not_told(line: Line) -> None:
    began = time.monotonic()
    line.send(progress("a", 1), 0.6)
    time.sleep(0.4)
    line.send(progress("a", 2), 0.6)
    assert line.receive() == progress("a", 2)
    assert time.monotonic() - began < 0.4 + 0.6


def test_what_came_after_others_had_gone_has_its_own_time(line: Line) -> None:
    picture = m.Picture(job="b", index=0, data=b"b")
    line.send(m.Picture(job="a", index=0, data=b"a"), 0.05)
    line.send(FINISHED)
    line.send(picture, 60.0)
    line.receive()
    assert line.receive() == FINISHED
    assert line.is_silent(0.2)
    line.send(FINISHED)
    assert line.receive() == picture


def test_a_picture_that_is_too_large_is_its_own_jobs_affair(line: Line) -> None:
    with pytest.raises(OversizedFrame):
        line.send(m.Picture(job="a", index=0, data=bytes(CAP)), 60.0)
    line.send(FINISHED)
    assert line.receive() == FINISHED


def test_what_may_be_late_is_put_aside_while_others_wait_for_the_pipe(line: Line) -> None:
    large = m.Preview(job="a", index=0, data=bytes(CAP // 2))
    with ThreadPoolExecutor(1) as others:
        sent = others.submit(line.send, large)
        time.sleep(0.1)
        assert not sent.done(), "a pipe has no room for it"
        line.send(progress("a", 1), 60.0)
        assert line.receive() == large
        sent.result()
