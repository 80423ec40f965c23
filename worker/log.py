"""How every process logs: one line an event, as key=value or JSON, on standard output.

A constant sentence plus fields (`extra={…}`): ids, types, sizes, counts and durations. Never a metadata value, a
name, an address, a body or a secret, at any level.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
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
    "sentry_sdk",
    "opentelemetry",
)

OURS: Final = frozenset({"webhooks", "worker", "migrations"})


def configure(log_format: str, log_level: str, *others: logging.Handler) -> None:
    """Send every logger of this process to standard output, and to `others`; `log_format` is `logfmt` or `json`."""
    renderer: Any
    if log_format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.processors.LogfmtRenderer(bool_as_flag=False)
    # Nothing is written of a record's process, thread and place, so nobody need ask for them.
    # https://docs.python.org/3/howto/logging.html#optimization
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # noqa: SLF001
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Line(renderer))
    root = logging.getLogger()
    root.handlers[:] = [handler, *others]
    root.setLevel(log_level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(log_level)))


# What every record has; all else is an `extra`.
_EVERY_RECORD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _Line(logging.Formatter):
    """Renders a record by structlog. Its own way there from the standard library's records costs a quarter more for
    each line, and each delivery writes one."""

    def __init__(self, renderer: Callable[[Any, str, dict[str, Any]], str | bytes]) -> None:
        super().__init__()
        self._renderer = renderer

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end."""
        fields = vars(record)
        event: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        event |= {name: value for name, value in fields.items() if name not in _EVERY_RECORD}
        if record.exc_info:
            _tell_where_not_what(event, record.exc_info[1])
        return str(self._renderer(None, "", _on_one_line(event)))


def _tell_where_not_what(event: dict[str, Any], error: BaseException | None) -> None:
    """Of an exception, the classes and where it happened: our own lines and the one that raised it.

    Never its text, nor a cause's: a database's or a library's message can quote what it choked on.
    """
    if error is not None:
        event["error"] = " < ".join(type(link).__name__ for link in chain(error))
        event["at"] = " > ".join(places(error))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it, the latest first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def places(error: BaseException) -> Iterator[str]:
    """Where an error passed: our own lines and the one that raised it, as `module:line`, the outermost first."""
    frames = list(traceback.walk_tb(error.__traceback__))
    for position, (frame, line) in enumerate(frames, 1):
        module = str(frame.f_globals.get("__name__", "?"))
        if position == len(frames) or module.partition(".")[0] in OURS:
            yield f"{module}:{line}"


def _on_one_line(event: dict[str, Any]) -> dict[str, Any]:
    """A line stays a line: what a sender chose (an id, a type) can't forge another one."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = value.strip().encode("unicode_escape").decode("ascii")
    return event
