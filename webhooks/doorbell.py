"""Rings the worker's doorbell without making anyone wait.

A request only sets a flag; one thread of each process publishes. Rings that come while it is busy are one ring, and
none is sent while a wake-up already waits in the queue. A broker that is down or silent holds up that thread alone,
and the worker's own sweep finds the events.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from celery import Celery
from kombu import Connection as BrokerConnection
from kombu import Producer

from worker import tasks
from worker.app import QUEUE, hang_up, queue_length, quick_connection, reaching
from worker.errors import BrokerDown

log = logging.getLogger(__name__)

PAUSE_SECONDS: Final = 0.25
"""The least time between two wake-ups from one process: a burst is one ring. The worker that heard it looks for more by
itself for longer than this (`LINGER_SECONDS`)."""

BROKEN_SECONDS: Final = 1.0
"""How long the broker is left alone after an error."""

COMPLAIN_SECONDS: Final = 30.0


class Doorbell:
    """`ring()` from any thread; the sending thread is started by the first ring, so a fork before it does no harm."""

    def __init__(self, publish: Callable[[], None]) -> None:
        self._publish = publish
        self._rung = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def ring(self) -> None:
        """Say that there is work. Returns at once."""
        self._rung.set()
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name="doorbell", daemon=True)
                    thread.start()
                    self._thread = thread

    def _run(self) -> None:
        complained = -COMPLAIN_SECONDS
        pause = threading.Event()  # never set: a wait that can be seen in a stack trace
        while True:
            self._rung.wait()
            self._rung.clear()
            try:
                self._publish()
                pause.wait(PAUSE_SECONDS)
            except BrokerDown as error:
                if time.monotonic() - complained >= COMPLAIN_SECONDS:
                    complained = time.monotonic()
                    log.warning(
                        "the broker doesn't answer; events are still accepted, and found by the worker's sweep",
                        extra={"error": str(error)},
                    )
                pause.wait(BROKEN_SECONDS)


class Publisher:
    """Sends one wake-up over a connection that it keeps, unless one is waiting. For one thread."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._connection: BrokerConnection | None = None
        self._producer: Producer | None = None
        self._channel: Any = None  # to look through: making one for each look costs a web process a quarter of its time

    def __call__(self) -> None:
        """Publish. Raises BrokerDown; the next call connects anew."""
        connection = self._connection or quick_connection(self._app)
        try:
            with reaching():
                if self._producer is None:
                    connection.connect()
                    self._producer = self._app.amqp.Producer(connection.channel())
                    self._connection = connection
                # A broker that isn't Redis may close it, where there is no queue yet.
                if self._channel is None or not getattr(self._channel, "is_open", True):
                    self._channel = connection.channel()
                if queue_length(self._channel) == 0:
                    self._app.send_task(
                        tasks.DRAIN, queue=QUEUE, producer=self._producer, retry=False, ignore_result=True
                    )
        except BrokerDown:
            self._connection = self._producer = self._channel = None
            hang_up(connection)
            raise
