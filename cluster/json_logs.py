"""Log records as lines of JSON, for machines that collect logs: time, level, logger, message, and where they are known
request id, rank, node and the exception.

Which process logs so is decided by its command line (launch.observe.log_setup) and by what starts ranks
(cluster.actors.group.worker). `REQUEST` is set where a call is served, so that whatever is logged on its behalf carries
its id.
"""

from __future__ import annotations

import json
import logging
import socket
from contextvars import ContextVar
from datetime import UTC, datetime

from cluster.safe_text import UNSAFE

REQUEST: ContextVar[str] = ContextVar("request", default="")
"""The id of the call that is being served in this task."""


class JsonLines(logging.Formatter):
    """One JSON object per record; `rank` of the process, None where it is none."""

    def __init__(self, rank: int | None = None, node: str | None = None) -> None:
        super().__init__()
        self._rank, self._node = rank, node or socket.gethostname()

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "node": self._node,
            "pid": record.process,
        }
        if self._rank is not None:
            values["rank"] = self._rank
        request = getattr(record, "request_id", "") or REQUEST.get()
        if request:
            values["request_id"] = request
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        line = json.dumps(values, ensure_ascii=False)
        return UNSAFE.sub(lambda found: json.dumps(found[0])[1:-1], line)  # also where a reader splits or shows lines
