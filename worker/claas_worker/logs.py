"""JSON logs on stderr: one object a line. What is logged are uids, names, counts and times; never a sample's text."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from claas_worker.job import place

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """`extra={…}` becomes fields. An exception becomes its type and place: its own message may quote a sample."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _STANDARD},
        }
        if record.exc_info and record.exc_info[1] is not None:
            entry["error"] = place(record.exc_info[1])
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure() -> None:
    """Sends our records (info and up), and others' warnings, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for package in ("claas_worker", "claas_store", "claas_teacher"):
        logging.getLogger(package).setLevel(logging.INFO)
