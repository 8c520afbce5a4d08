"""The thread that the library lives on: loads models for jobs while others denoise.

A job whose models do not fit beside those in use is put off until some are let go.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

from gpu_worker.failures import MemoryShort
from gpu_worker.library import Library
from gpu_worker.models import Models

Result = TypeVar("Result")
PutOff = Callable[[int], None]
"""Is told how many bytes are missing, on the library's thread."""


@dataclass(eq=False)
class Held:
    """Models that a job uses; they stay until it is given back."""

    models: Models
    use: ExitStack


@dataclass(eq=False)
class Request:
    """`read` loads models; `put_off` is called when they have to wait for room."""

    read: Callable[[], Models]
    put_off: PutOff
    future: "Future[Held]" = field(default_factory=Future)


class Loader:
    """`make` builds the library on its thread; its methods may be called on any thread."""

    def __init__(self, make: Callable[[], Library]) -> None:
        self._thread = ThreadPoolExecutor(1, "library")
        self._library = self._thread.submit(make).result()
        self._held: set[Held] = set()
        self._put_off: list[Request] = []

    @property
    def library(self) -> Library:
        """To be used in calls and reads only."""
        return self._library

    def call(self, function: Callable[[], Result]) -> "Future[Result]":
        """Runs a function on the library's thread."""
        return self._thread.submit(function)

    def hold(self, read: Callable[[], Models], put_off: PutOff) -> "Future[Held]":
        """Loads models and keeps them. Whoever gets or drops the future gives them back."""
        request = Request(read, put_off)
        self._thread.submit(self._attempt, request)
        return request.future

    def give_back(self, holding: "Future[Held]") -> None:
        """The models are not used any more; if they are still being loaded, not wanted."""
        if not holding.cancel() and holding.exception() is None:
            self._thread.submit(self._let_go, holding.result())

    def _attempt(self, request: Request) -> None:
        if request.future.cancelled():
            return
        try:
            held = self._read(request)
        except MemoryShort as error:
            if self._held:
                request.put_off(error.missing_bytes)
                self._put_off.append(request)
            else:
                _settle(request.future, error)
        except BaseException as error:
            _settle(request.future, error)
        else:
            self._held.add(held)
            if not _settle(request.future, held):
                self._let_go(held)

    def _read(self, request: Request) -> Held:
        with ExitStack() as stack:
            models = request.read()
            stack.enter_context(self._library.use(*models))
            return Held(models, stack.pop_all())

    def _let_go(self, held: Held) -> None:
        held.use.close()
        self._held.remove(held)
        again, self._put_off = self._put_off, []
        for request in again:
            self._attempt(request)


def _settle(future: "Future[Held]", result: Held | BaseException) -> bool:
    """Gives a future its result, unless nobody wants it any more."""
    if not future.set_running_or_notify_cancel():
        return False
    if isinstance(result, Held):
        future.set_result(result)
    else:
        future.set_exception(result)
    return True
