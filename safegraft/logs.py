"""Log lines, for people or for machines: `json` is one object a line, with what the process is working on.

A process calls `setup` once. What belongs to a request or a job is bound to the current context; every line that is
written there carries it, whoever writes it.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

_bound: ContextVar[dict[str, str | int]] = ContextVar("safegraft_log", default={})  # noqa: B039 - never changed
# What libraries would otherwise say in their own way, or too often.
OWN_HANDLERS = (
    "uvicorn",
    "uvicorn.error",
    "uvicorn.asgi",
    "celery",
    "celery.task",
    "celery.redirected",
    "multiprocessing",
)
CHATTY = ("alembic", "httpx", "httpcore", "urllib3", "opentelemetry", "multiprocessing")
CONTROL = {number: f"\\x{number:02x}" for number in (*range(32), 127)} | {9: "\t", 10: "\\n", 13: "\\r"}


def setup(form: Literal["text", "json"], level: int = logging.INFO) -> None:
    """Sends every logger of this process to standard error, in this form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.captureWarnings(True)
    for name in OWN_HANDLERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # uvicorn's own lines of access hold query strings; safegraft.access writes one for every request instead.
    access = logging.getLogger("uvicorn.access")
    access.handlers.clear()
    access.propagate = False


def bind(**fields: str | int | None) -> None:
    """Adds fields to every line of this context, until it ends. None adds nothing."""
    _bound.set(_bound.get() | {name: value for name, value in fields.items() if value is not None})


@contextmanager
def bound(**fields: str | int | None) -> Iterator[None]:
    """Like `bind`, for the time of a `with`."""
    token = _bound.set(_bound.get() | {name: value for name, value in fields.items() if value is not None})
    try:
        yield
    finally:
        _bound.reset(token)


class JsonLines(logging.Formatter):
    """`extra={"fields": {…}}` adds to the object."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_bound.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """One line a record, so that nothing that a client sent can look like another one; exceptions follow it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        about = " ".join(f"{name}={value}" for name, value in _bound.get().items())
        line = super().formatMessage(record).translate(CONTROL)
        return f"{line} [{about}]" if about else line
