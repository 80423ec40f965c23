"""What a worker hears of the broker: which of our tasks is to run, and nothing else.

Whoever owns Redis can ring the doorbell and no more. So every message is made anew before Celery sees it: of what
came, only the task's name counts, where it is one of ours, and until when it is worth anything. Arguments, encodings,
callbacks, times and limits are ours. What is no wake-up is dropped; nothing is lost with it, since the worker sweeps.
"""

from __future__ import annotations

import functools
import logging
import time
import uuid
from datetime import datetime
from queue import Empty
from typing import Any, Final

from celery import signals
from celery.worker.consumer import Consumer
from kombu import Connection as BrokerConnection
from kombu.transport import redis, virtual

from worker.errors import BrokerDown
from worker.tasks import DRAIN, RECONCILE, RETIRED

log = logging.getLogger(__name__)

OURS: Final = frozenset({DRAIN, RECONCILE, RETIRED})
NO_ARGUMENTS: Final = "[[], {}, {}]"

PAUSE_SECONDS: Final = 1.0
"""The wait after an error that a broker gives again and again, such as a key of ours that is of another type."""

COMPLAIN_SECONDS: Final = 30.0


class NotOurs(Exception):
    """A message that is no wake-up."""


def wake_up(sent: object, queue: str) -> dict[str, Any]:
    """A wake-up as Celery would have sent it, for the task that a message names. Raises NotOurs."""
    headers = sent.get("headers") if isinstance(sent, dict) else None
    task = headers.get("task") if isinstance(headers, dict) else None
    if not isinstance(headers, dict) or not isinstance(task, str) or task not in OURS:
        raise NotOurs
    task_id = str(uuid.uuid4())
    return {
        "body": NO_ARGUMENTS,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {
            "lang": "py",
            "task": task,
            "id": task_id,
            "root_id": task_id,
            "expires": _expires(headers.get("expires")),
            "ignore_result": True,
        },
        "properties": {
            "correlation_id": task_id,
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": queue, "routing_key": queue},
            "priority": 0,
        },
    }


def _expires(value: object) -> str | None:
    try:
        expires = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    # Without a zone it can't be compared.
    return expires.isoformat() if expires and expires.tzinfo else None


class Listener(Consumer):
    """Celery's consumer, whom no message and nothing in the broker's keys makes end the worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Whatever else goes wrong with the broker, a new connection is the answer; the sweep needs none.
        self._lost: tuple[type[BaseException], ...] = self.app.connection_for_read().connection_errors
        self.connection_errors = (Exception,)

    def connection_for_read(self, heartbeat: float | None = None) -> BrokerConnection:
        """A connection that lets only wake-ups through."""
        # A connection of our class from the start: one that fails over to another broker sets its transport anew.
        self.app.amqp.Connection = _hearing(self.app.conf.task_default_queue)
        ensured: BrokerConnection = self.ensure_connected(self.app.connection_for_read(heartbeat=heartbeat))
        return ensured

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        super().on_connection_error_before_connected(_nameless(exc))
        self._pause(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        super().on_connection_error_after_connected(_nameless(exc))
        self._pause(exc)

    def _pause(self, exc: Exception) -> None:
        if not isinstance(exc, self._lost):
            time.sleep(PAUSE_SECONDS)


def _nameless(exc: Exception) -> BrokerDown:
    """What Celery may log of an error: its text may quote what it choked on."""
    return BrokerDown(type(exc).__name__)


@functools.cache
def _hearing(queue: str) -> type[BrokerConnection]:
    """Connections that let only wake-ups through, whichever of several brokers they fail over to."""

    class Hearing(BrokerConnection):
        def get_transport_cls(self) -> Any:
            transport = super().get_transport_cls()
            return _only_wake_ups(transport, queue) if issubclass(transport, redis.Transport) else transport

    return Hearing


def _only_wake_ups(transport: type[redis.Transport], queue: str) -> type[redis.Transport]:
    """The same transport, be it by Sentinel or not, which drops what is no wake-up."""

    class Message(virtual.Message):
        def __init__(self, payload: object, channel: Any = None, **kwargs: Any) -> None:
            super().__init__(wake_up(payload, queue), channel=channel, **kwargs)

    class QoS(virtual.QoS):
        """Without the copies of what is being worked on that kombu keeps in Redis, and puts into queues again: others
        could write them, and ours are worth nothing."""

        restore_at_shutdown = False

        def restore_visible(self, *_: object, **__: object) -> None:
            pass

    class Channel(transport.Channel):  # type: ignore[name-defined,misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._dropped = Dropped()

        def _brpop_read(self, **options: Any) -> Any:
            try:
                return super()._brpop_read(**options)
            except (Empty, *self.connection_errors, *self.connection.channel_errors):
                raise
            except Exception:  # noqa: BLE001 - whatever a parser makes of it; by now it is out of the queue
                self._dropped.add()
                return True

    Channel.Message, Channel.QoS = Message, QoS
    return type("WakeUps", (transport,), {"Channel": Channel})


class Dropped:
    """Counts messages that were dropped, and says so now and then."""

    def __init__(self) -> None:
        self._count = 0
        self._told = -COMPLAIN_SECONDS

    def add(self) -> None:
        """Note one more."""
        self._count += 1
        # The worker isn't deaf: it hears, but nothing that it knows.
        signals.task_rejected.send(sender=None, message=None, exc=None)
        if time.monotonic() - self._told >= COMPLAIN_SECONDS:
            log.warning(
                "messages in the broker's queue are no wake-ups and were dropped; find out who puts them there",
                extra={"dropped": self._count},
            )
            self._told = time.monotonic()
            self._count = 0
