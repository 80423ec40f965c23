"""Tells Sentry of errors, where SENTRY_DSN is set; else the package isn't even imported.

What is sent is what the log tells of an error less its fields: our own sentence, the classes of the exceptions, and the
places in our own code. Never a message of somebody else's, a value of a variable, a header, an id, or a host's name.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from worker import log
from worker.errors import ConfigError

if TYPE_CHECKING:
    from sentry_sdk.client import BaseClient
    from sentry_sdk.transport import Transport
    from sentry_sdk.types import Event

AGAIN_SECONDS: Final = 60.0
"""How often the same error is told: Sentry counts what it gets, and the log has them all."""

FLUSH_SECONDS: Final = 2.0

# Of what its library adds to an event by itself, such as the host's name, nothing else is sent.
_SENT: Final = (
    *("event_id", "timestamp", "platform", "level", "logger", "logentry", "exception", "fingerprint"),
    *("release", "environment", "sdk"),
)


def reporters(dsn: str) -> list[logging.Handler]:
    """What the log is to be sent to besides: one handler, or none where there is no DSN.

    Raises ConfigError where the package isn't installed.
    """
    return [Reporter(dsn)] if dsn else []


class Reporter(logging.Handler):
    """Sends errors, from a thread that each process starts with its first one. A worker that says CRITICAL may be about
    to end, and waits until that is sent, FLUSH_SECONDS at most."""

    def __init__(self, dsn: str, transport: type[Transport] | None = None) -> None:
        super().__init__(logging.ERROR)
        self._client = _client(dsn, transport)
        self._told: dict[tuple[str, ...], float] = {}
        self._counting = threading.Lock()
        atexit.register(self._client.close, timeout=FLUSH_SECONDS)

    def emit(self, record: logging.LogRecord) -> None:
        """Send what may be told of a record."""
        if record.name.partition(".")[0] in ("sentry_sdk", "urllib3"):
            return  # it would tell of itself, again and again
        try:
            event = _event(record)
            if self._is_due(tuple(event["fingerprint"])):
                self._client.capture_event(event)
                if record.levelno >= logging.CRITICAL and record.name.startswith("worker."):
                    self._client.flush(timeout=FLUSH_SECONDS)
        except Exception:  # noqa: BLE001 - as every handler: nobody who logs is to fail of it
            self.handleError(record)

    def _is_due(self, fingerprint: tuple[str, ...]) -> bool:
        with self._counting:
            now = time.monotonic()
            if now - self._told.get(fingerprint, -AGAIN_SECONDS) < AGAIN_SECONDS:
                return False
            self._told[fingerprint] = now
            return True


def _client(dsn: str, transport: type[Transport] | None) -> BaseClient:
    """A client of our own, which nothing else finds, so that nothing else adds to its events."""
    try:
        from sentry_sdk import Client  # noqa: PLC0415 - only where it is wanted
    except ImportError:
        raise ConfigError(
            "SENTRY_DSN is set, but sentry-sdk isn't installed: pip install 'clerk-sync[sentry]', or unset it"
        ) from None
    return Client(
        dsn,
        transport=transport,
        release=f"clerk-sync@{version('clerk-sync')}",
        default_integrations=False,
        auto_enabling_integrations=False,
        auto_session_tracking=False,
        send_client_reports=False,
        include_local_variables=False,
        include_source_context=False,
        max_request_body_size="never",
        max_breadcrumbs=0,
        enable_backpressure_handling=False,
        spotlight=False,
        server_name="",
        before_send=_only_ours,
        before_breadcrumb=lambda _crumb, _hint: None,
        before_send_transaction=lambda _event, _hint: None,
    )


def _only_ours(event: Event, _hint: dict[str, Any]) -> Event:
    return {name: event[name] for name in _SENT if name in event}  # type: ignore[return-value]


def _event(record: logging.LogRecord) -> Event:
    """What may be told of a record, as Sentry reads it."""
    # Ours are constant sentences. Somebody else's may have a path in it, or a row.
    ours = record.name.partition(".")[0] in log.OURS
    sentence = str(record.msg) if ours else record.name
    error = record.exc_info[1] if record.exc_info else None
    classes = [type(link).__name__ for link in log.chain(error)]
    places = list(log.places(error)) if error else []
    event: Event = {
        "level": "fatal" if record.levelno >= logging.CRITICAL else "error",
        "logger": record.name,
        "logentry": {"message": sentence},
        "fingerprint": [record.name, sentence, *classes, *places],
    }
    if error:
        frames = [_frame(place) for place in places]
        values: list[dict[str, Any]] = [{"type": name} for name in reversed(classes)]  # the latest one last
        values[-1]["stacktrace"] = {"frames": frames}
        event["exception"] = {"values": values}
    return event


def _frame(place: str) -> dict[str, Any]:
    module, _, line = place.rpartition(":")
    return {
        "module": module,
        "filename": module.replace(".", "/") + ".py",
        "lineno": int(line),
        "in_app": module.partition(".")[0] in log.OURS,
    }
