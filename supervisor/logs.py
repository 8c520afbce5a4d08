"""Structured logs: one JSON object a line on standard error."""

import logging
import sys
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import anyio
import msgspec

from supervisor.guards import request_id_of_task

worker_log = logging.getLogger("worker")

LINES_PER_SECOND = 100
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Time, level, logger, message, the request's id, and whatever `extra` held."""

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": datetime.fromtimestamp(record.created).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := request_id_of_task.get():
            content["request_id"] = request_id
        content |= {key: value for key, value in vars(record).items() if key not in STANDARD}
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(content, enc_hook=str).decode()


def configure(level: str) -> None:
    # No line tells of these or of its place in the code, and finding them out takes half of a
    # line's time. This is how the standard library has it turned off.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


async def pass_on(lines: AsyncIterator[str], **extra: Any) -> None:
    """What a worker prints, but no more than the loop can bear: it has no limit."""
    left, until = LINES_PER_SECOND, 0.0
    async for line in lines:
        if anyio.current_time() >= until:
            if left < 0:
                worker_log.warning("%d lines left out", -left, extra=extra)
            left, until = LINES_PER_SECOND, anyio.current_time() + 1
        left -= 1
        if left >= 0:
            worker_log.info(line, extra=extra)
