"""How every process logs: one line an event, as key=value or JSON, on standard output.

A constant sentence plus fields (`extra={…}`): ids, types, sizes, counts and durations. Never a metadata value, a
name, an address, a body or a secret, at any level.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator, MutableMapping
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

_OURS: Final = frozenset({"webhooks", "worker", "migrations"})


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
            _where_not_what,
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
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


def _where_not_what(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Of an exception, the classes and where it happened: our own lines and the one that raised it.

    Never its text, nor a cause's: a database's or a library's message can quote what it choked on.
    """
    found = event.pop("exc_info", None)
    error = found[1] if isinstance(found, tuple) else None
    if error is not None:
        event["error"] = " < ".join(type(link).__name__ for link in _chain(error))
        event["at"] = " > ".join(_places(error))
    return event


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _places(error: BaseException) -> Iterator[str]:
    frames = list(traceback.walk_tb(error.__traceback__))
    for position, (frame, line) in enumerate(frames, 1):
        module = str(frame.f_globals.get("__name__", "?"))
        if position == len(frames) or module.partition(".")[0] in _OURS:
            yield f"{module}:{line}"


def _one_line(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A line stays a line: what a sender chose (an id, a type) can't forge another one."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = value.strip().encode("unicode_escape").decode("ascii")
    return event
