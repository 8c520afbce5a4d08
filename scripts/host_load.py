"""Callers of a server: each asks for a picture, waits for it and asks again.

They share one thread and its event loop; what they were answered is kept with the times,
in seconds of the monotonic clock.
"""

import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic
from types import TracebackType
from typing import Any

import anyio
import httpx

Body = dict[str, Any]
Draw = Callable[[random.Random], Body]

ANSWER_SECONDS = 600.0
PAUSE_SECONDS = 0.2
"""After a refusal, so that a server that takes nothing is not flooded."""


@dataclass(frozen=True)
class Answer:
    """One request and what became of it; `status` 0 where the connection broke."""

    checkpoint: str
    sent: float
    done: float
    status: int
    meta: dict[str, Any]
    problem: str

    @property
    def seconds(self) -> float:
        return self.done - self.sent

    @property
    def dispatched(self) -> float:
        """When a worker was given the job, but for the time that its request took to check."""
        return self.sent + float(self.meta["queue_time"])


class Load:
    """So many callers at once, from `with` until its end; the last answers are waited for."""

    def __init__(self, url: str, callers: int, draw: Draw) -> None:
        self.answers: list[Answer] = []
        self._url = url
        self._callers = callers
        self._draw = draw
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: anyio.run(self._run), name="callers")

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=ANSWER_SECONDS, limits=limits) as client,
            anyio.create_task_group() as group,
        ):
            for number in range(self._callers):
                group.start_soon(self._call, client, random.Random(number))

    async def _call(self, client: httpx.AsyncClient, draws: random.Random) -> None:
        while not self._over.is_set():
            answer = await ask(client, self._draw(draws))
            self.answers.append(answer)
            if answer.status != 200:
                await anyio.sleep(PAUSE_SECONDS)


async def ask(client: httpx.AsyncClient, body: Body) -> Answer:
    sent = monotonic()
    try:
        response = await client.post("/generate", json=body)
    except httpx.HTTPError as error:
        return Answer(body["checkpoint"], sent, monotonic(), 0, {}, type(error).__name__)
    done, content = monotonic(), response.json()
    meta, problem = content.get("meta", {}), str(content.get("detail", ""))
    return Answer(body["checkpoint"], sent, done, response.status_code, meta, problem)


def rate(answers: Iterable[Answer], begin: float, end: float) -> float:
    """Pictures a second between two times: of each, the share of its time that lies there."""
    served = [answer for answer in answers if answer.status == 200]
    shares = (
        max(0.0, min(answer.done, end) - max(answer.sent, begin)) / answer.seconds
        for answer in served
    )
    return sum(shares) / (end - begin)


def percentile(values: Iterable[float], percent: float) -> float:
    """The least value that so many percent are not above; NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def zipf(names: list[str], draws: random.Random) -> str:
    """The first name twice as often as the second, three times as often as the third, …"""
    return draws.choices(names, [1 / rank for rank in range(1, len(names) + 1)])[0]
