"""Where a pipeline is: its progress bar and its step callback, turned into calls of a watch."""

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Protocol


class Watch(Protocol):
    """Told of each step of one picture; raises JobCancelled to end it there."""

    def begins(self, steps: int) -> None:
        """A denoising loop of about `steps` steps begins."""

    def stepped(self, done: int, steps: int, latents: Any) -> None:
        """`done` of `steps` steps of that loop are done; latents is a tensor or None."""


class Bar:
    """Stands in for a pipeline's progress bar, and is its step callback too.

    Steps are counted by the callback (one per timestep: Heun has 19 for 10 steps), and
    by the bar only in pipelines that have no callback.
    """

    def __init__(self, watch: Watch) -> None:
        self.begun = False
        self._watch = watch
        self._called_back = False
        self._done = 0
        self._total = 0

    def opened(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """Called by pipelines as their `progress_bar`, just before their denoising loop."""
        self.begun = True
        self._called_back = False
        self._done = 0
        self._total = len(iterable) if isinstance(iterable, Sized) else total or 0
        self._watch.begins(self._total)
        return self if iterable is None else self._through(iterable)

    def step_ended(self, pipeline: Any, step: int, timestep: Any, tensors: Any) -> Any:
        """Called by pipelines as their `callback_on_step_end`."""
        self._called_back = True
        steps = getattr(pipeline, "_num_timesteps", None) or self._total
        self._watch.stepped(step + 1, steps, tensors.get("latents"))
        return tensors

    def update(self, count: int = 1) -> None:
        self._done += count
        if not self._called_back:
            self._watch.stepped(self._done, self._total, None)

    def _through(self, iterable: Iterable[Any]) -> Iterator[Any]:
        for each in iterable:
            yield each
            self.update()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        """The rest of a progress bar, such as set_postfix, which nobody sees here."""
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None
