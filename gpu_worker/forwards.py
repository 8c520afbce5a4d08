"""Runs a group of parked calls as one forward and gives each its own outcome.

A failure stays with the call that causes it: what runs out of memory is run again
in halves, anything else is run again call by call.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gpu_worker import batching
from gpu_worker.batching import Arguments, NotBatchFirst
from gpu_worker.failures import is_device_failure, is_out_of_memory
from gpu_worker.interposer import Target, described
from gpu_worker.limits import Limits

Execute = Callable[[Target, tuple[Any, ...], dict[str, Any]], Any]


def run_eagerly(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return target.run(*args, **kwargs)


@dataclass(eq=False, slots=True)
class Call:
    """What a parked body wants: a target's method with these arguments.

    `arguments` is None for a call that runs as it is, never merged. A `plain` one runs
    uncompiled and unpadded: what it gives depends on nothing but itself.
    """

    target: Target
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    arguments: Arguments | None
    rows: int
    key: Hashable
    shape: Hashable
    plain: bool = False

    @classmethod
    def of(
        cls, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any], plain: bool = False
    ) -> "Call":
        kind = (target.architecture, target.method)
        description = described(target, args, kwargs)
        if description is None or target.layout is None:
            return cls(target, args, kwargs, None, 1, object(), kind, plain)
        arguments, rows, key = description
        tensor = arguments[target.layout.rows]
        shape = (kind, tensor.shape[1:], tensor.dtype)
        return cls(target, args, kwargs, arguments, rows, key, shape, plain)

    def halves(self) -> "list[Call]":
        """This call as two with half of its rows each; empty where it cannot be cut."""
        if self.arguments is None or self.target.layout is None or self.rows < 2:
            return []
        parts = batching.halves(self.arguments, self.target.layout, self.rows)
        return [
            Call(self.target, (), arguments, arguments, rows, self.key, self.shape, self.plain)
            for arguments, rows in parts
        ]


@dataclass(slots=True)
class Outcome:
    """What becomes of a call: its value, or the error to raise in its body."""

    value: Any = None
    error: Exception | None = None
    memory_fallback: str | None = None


@dataclass
class Forwards:
    """`execute` is where a compiler slots in; `evict` frees idle models and says whether
    it freed any; `pace` is called after each step. Outcomes stand in the calls' order."""

    limits: Limits = field(default_factory=Limits)
    execute: Execute = run_eagerly
    evict: Callable[[], bool] = lambda: False
    pace: Callable[[], None] = lambda: None

    def max_rows(self, call: Call) -> int:
        layout = call.target.layout
        return self.limits.max_rows(call.shape, layout.max_rows if layout else None)

    def run(self, calls: Sequence[Call]) -> list[Outcome]:
        try:
            return [Outcome(value) for value in self._merged(calls)]
        except NotBatchFirst:
            # Only seen in its output: this architecture is not what its layout says.
            if len(calls) == 1:
                return [self._untouched(calls[0])]
            calls[0].target.layout = None
            error = None
        except Exception as caught:
            error = caught
        # Outside the except block, whose frames hold the failed forward's tensors.
        if error is not None:
            error.__traceback__ = None
        if error is not None and is_out_of_memory(error):
            return self._in_less_memory(calls, error)
        if error is not None and (len(calls) == 1 or is_device_failure(error)):
            return [Outcome(error=error) for _ in calls]
        return [self._untouched(call) for call in calls]

    def _merged(self, calls: Sequence[Call]) -> list[Any]:
        first = calls[0]
        rows = [call.rows for call in calls]
        layout = first.target.layout
        if first.arguments is None or layout is None:
            return [self._executed(first, first.args, first.kwargs, 1)]
        size = batching.padded_size(sum(rows), self.limits.buckets)
        if first.plain or (len(calls) == 1 and self.limits.buckets is None):
            # Alone and as it came: bit for bit what the pipeline alone computes.
            arguments = batching.with_scalars_sent(first.arguments, layout)
            return [self._executed(first, (), arguments, first.rows)]
        padding = size - sum(rows)
        everyone = [call.arguments for call in calls if call.arguments is not None]
        merged = batching.merge(everyone, layout, rows, padding)
        output = self._executed(first, (), merged, size)
        return batching.split(output, [*rows, padding])[: len(calls)]

    def _executed(
        self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int
    ) -> Any:
        with self.limits.measured(call.shape, rows):
            execute = run_eagerly if call.plain else self.execute
            output = execute(call.target, args, kwargs)
        if call.target.is_denoiser:
            self.pace()
        return output

    def _untouched(self, call: Call) -> Outcome:
        try:
            return Outcome(self._executed(call, call.args, call.kwargs, call.rows))
        except Exception as error:
            return Outcome(error=error)

    def _last_resort(self, call: Call) -> Outcome:
        with in_tiles(call.target.module) as tiled:
            outcome = self._untouched(call)
        return _through(outcome, "tiling" if tiled else "retried")

    def _in_less_memory(self, calls: Sequence[Call], error: Exception) -> list[Outcome]:
        """The ladder: evict idle models, then halve the batch, down to a single row, which a
        VAE does in tiles and anything else once more."""
        if self.evict():
            return [_through(outcome, "evicted") for outcome in self.run(calls)]
        self.limits.refuse(calls[0].shape, sum(call.rows for call in calls))
        if len(calls) > 1:
            middle = len(calls) // 2
            outcomes = [*self.run(calls[:middle]), *self.run(calls[middle:])]
            return [_through(outcome, "split_batch") for outcome in outcomes]
        halves = calls[0].halves()
        if not halves:
            return [self._last_resort(calls[0])]
        parts = [self.run([half])[0] for half in halves]
        failed = next((part.error for part in parts if part.error is not None), None)
        if failed is not None:
            return [Outcome(error=failed)]
        value = batching.concatenate([part.value for part in parts])
        return [Outcome(value, memory_fallback="split_batch")]


@contextmanager
def in_tiles(module: Any) -> Iterator[bool]:
    """Has a VAE work in tiles for a while; false where it cannot."""
    able = hasattr(module, "enable_tiling") and not getattr(module, "use_tiling", False)
    if able:
        module.enable_tiling()
    try:
        yield able
    finally:
        if able:
            module.disable_tiling()


def _through(outcome: Outcome, rung: str) -> Outcome:
    return Outcome(outcome.value, outcome.error, outcome.memory_fallback or rung)
