"""Who listens to the fleet, such as metrics and webhooks, and telling them."""

import logging
from collections.abc import Callable

from ipc import messages
from supervisor.jobs import Job
from supervisor.worker import Cause, Worker

log = logging.getLogger(__name__)


class Observer:
    """Told of what happens, on the event loop's thread; the default does nothing."""

    def job_refused(self, code: str) -> None: ...
    def job_dispatched(self, job: Job, worker: Worker) -> None: ...
    def job_answered(self, job: Job, worker: Worker, finished: messages.Finished) -> None: ...
    def job_ended(self, job: Job) -> None: ...
    def worker_exited(self, worker: Worker, cause: Cause) -> None: ...
    def models_changed(
        self,
        worker: Worker,
        loaded: list[messages.Resident],
        unloaded: list[messages.Resident],
    ) -> None: ...


class Observers(list[Observer]):
    """Tells each of them; a defect of one harms nobody else."""

    def tell(self, saying: Callable[[Observer], None]) -> None:
        for observer in self:
            try:
                saying(observer)
            except Exception:
                log.exception("cannot tell an observer")
