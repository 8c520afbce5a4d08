"""What a worker says and when: signs of progress may be late, and come with others then."""

import os
import select
import time
from collections.abc import Iterator

import pytest

from gpu_worker.loop import Sender
from ipc import messages as m
from ipc.channel import BlockingChannel, Codec

FINISHED = m.Finished(job="a")


def progress(job: str, step: int) -> m.Progress:
    return m.Progress(job=job, phase="denoising", step=step, steps=9)


class Line:
    """A sender, and what comes out at the other end."""

    def __init__(self, reads: int, writes: int) -> None:
        self.send = Sender(BlockingChannel(reads, writes, Codec(m.ToWorker)))
        end: BlockingChannel[m.ToWorker, m.FromWorker]
        end = BlockingChannel(reads, writes, Codec(m.FromWorker))
        self.receive = end.receive
        self._reads = reads

    def is_silent(self, seconds: float) -> bool:
        return not select.select([self._reads], [], [], seconds)[0]


@pytest.fixture
def line() -> Iterator[Line]:
    reads, writes = os.pipe()
    yield Line(reads, writes)
    os.close(writes)
    os.close(reads)


def test_the_newest_sign_of_each_job_goes_before_what_must_be_said(line: Line) -> None:
    for step in (1, 2, 3):
        line.send(progress("a", step), 60.0)
        line.send(progress("b", step + 1), 60.0)
    line.send(FINISHED)
    line.send(progress("a", 9))
    received = [line.receive() for _ in range(4)]
    assert received == [progress("a", 3), progress("b", 4), FINISHED, progress("a", 9)]


def test_pictures_may_be_late_too_but_none_takes_anothers_place(line: Line) -> None:
    pictures = [m.Picture(job="a", index=index, data=b"%d" % index) for index in range(2)]
    for picture in pictures:
        line.send(progress("a", 9), 60.0)
        line.send(picture, 60.0)
    line.send(FINISHED)
    assert [line.receive() for _ in range(4)] == [progress("a", 9), *pictures, FINISHED]


def test_a_sign_is_no_later_than_it_may_be(line: Line) -> None:
    for step in (1, 2):
        began = time.monotonic()
        line.send(progress("a", step), 0.05)
        assert line.receive() == progress("a", step)
        assert 0.05 <= time.monotonic() - began < 5


def test_what_came_after_others_had_gone_has_its_own_time(line: Line) -> None:
    line.send(progress("a", 1), 0.05)
    line.send(FINISHED)
    line.send(progress("b", 1), 60.0)
    assert [line.receive(), line.receive()] == [progress("a", 1), FINISHED]
    assert line.is_silent(0.2)
