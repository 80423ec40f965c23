"""How every process logs: one line an event, as key=value or JSON, on standard output.

A constant sentence plus fields (`extra={…}`): ids, types, sizes, counts and durations. Never a metadata value, a
name, an address, a body or a secret, at any level.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final

import structlog

# Libraries that say at DEBUG what they send and receive. Ours say what an operator needs; theirs stay at WARNING.
_QUIET: Final = (
    "httpx",
    "httpcore",
    "kombu",
    "amqp",
    "redis",
    "celery",
    "urllib3",
    "psycopg",
    "alembic",
    "svix",
)


def configure(log_format: str, log_level: str) -> None:
    """Send every logger of this process to standard output; `log_format` is `logfmt` or `json`."""
    renderer: Any
    if log_format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.processors.LogfmtRenderer(
            key_order=["time", "level", "logger", "event"], drop_missing=True, bool_as_flag=False
        )
    stamps: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=stamps,
        processors=[
            _no_broker_tracebacks,
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            _one_line,
            renderer,
        ],
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(log_level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(log_level)))


def _no_broker_tracebacks(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Celery's own loops report each failed attempt to reach the broker with its stack: the class says enough."""
    record = event.get("_record")
    if record is not None and record.name.startswith(("celery.beat", "celery.worker.consumer")):
        error = event.pop("exc_info", None)
        if isinstance(error, tuple) and error[0] is not None:
            event["error"] = error[0].__name__
    return event


def _one_line(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A line stays a line: what a sender chose (an id, a type) can't forge another one."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = value.strip().encode("unicode_escape").decode("ascii")
    return event
