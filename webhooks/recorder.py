"""Puts verified deliveries into the inbox, and lets nobody wait longer than Svix would.

One thread of each process holds one connection. It commits whatever has arrived since its last commit in one
statement, so that a burst shares its commits, and requests wait for theirs with a limit.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

import psycopg

from worker import inbox
from worker.db import Connection, abandon, describe
from worker.errors import Unavailable
from worker.inbox import Incoming

log = logging.getLogger(__name__)

LIMIT_SECONDS: Final = 4.0
"""How long a request waits for its commit before it is answered 503. Svix itself gives up after 15 s."""

GROUP: Final = 100
"""The most deliveries in one commit."""

COMPLAIN_SECONDS: Final = 10.0

TOOK_TOO_LONG: Final = (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable)

Waiting = tuple[Incoming, "Future[bool]"]

CLOSE_SECONDS: Final = 5.0


class Recorder:
    """`record()` from any thread; the thread and its connection come with the first one, after any fork."""

    def __init__(self, connect: Callable[[], Connection], limit_seconds: float = LIMIT_SECONDS) -> None:
        self._connect = connect
        self._limit = limit_seconds
        self._queue: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._connection: Connection | None = None
        self._busy_since: float | None = None
        self._down = False
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._complained = -COMPLAIN_SECONDS

    def record(self, delivery: Incoming) -> bool:
        """Commit one delivery to the inbox: True when it was recorded, False when it is pending there already.

        Raises Unavailable where Postgres can't do it in time. It may be recorded all the same then, which does no
        harm: Svix delivers it again and it is a duplicate.
        """
        self._start()
        if self._stuck(self._limit):
            self._abandon()
            raise Unavailable("Postgres doesn't answer")
        # While it is known to be away, one delivery at a time finds out whether it is back. Were all to wait, they
        # would hold every thread of this process, and the next ones would wait for those.
        if self._down and (self._busy_since is not None or not self._queue.empty()):
            raise Unavailable("Postgres doesn't answer")
        future: Future[bool] = Future()
        self._queue.put((delivery, future))
        try:
            return future.result(timeout=self._limit)
        except TimeoutError:
            future.cancel()
            if self._stuck(self._limit * 0.9):
                self._down = True
                self._abandon()
            raise Unavailable("Postgres doesn't answer in time") from None

    def close(self) -> None:
        """Commit what waits, and close the connection."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(CLOSE_SECONDS)

    def _start(self) -> None:
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
                    self._thread.start()

    def _stuck(self, seconds: float) -> bool:
        since = self._busy_since
        return since is not None and time.monotonic() - since > seconds

    def _abandon(self) -> None:
        connection = self._connection
        if connection is not None:
            abandon(connection)

    def _run(self) -> None:
        closing = False
        while not closing:
            arrived = [self._queue.get()]
            self._busy_since = time.monotonic()
            while len(arrived) < GROUP and not self._queue.empty():
                arrived.append(self._queue.get())
            closing = None in arrived
            # Whoever gave up has been answered.
            group = [waiting for waiting in arrived if waiting and waiting[1].set_running_or_notify_cancel()]
            if group:
                self._commit_or_refuse(group)
            self._busy_since = None
        self._disconnect()

    def _commit_or_refuse(self, group: list[Waiting]) -> None:
        """Commit; an error that nobody thought of must not end the thread that every request waits for."""
        try:
            self._commit(group)
        except Exception:
            log.critical("recording failed", exc_info=True)
            self._disconnect()
            for _, future in group:
                if not future.done():
                    future.set_exception(Unavailable("recording failed"))

    def _commit(self, group: list[Waiting]) -> None:
        """Record a group. The same id twice in one group is once a delivery and then its duplicates."""
        first: dict[str, Incoming] = {}
        for delivery, _ in group:
            first.setdefault(delivery.svix_id, delivery)
        try:
            recorded = self._record(list(first.values()))
        except psycopg.OperationalError as error:
            self._refuse(group, error)
        except psycopg.Error as error:
            if len(group) == 1:
                self._refuse(group, error)
            else:
                for waiting in group:
                    self._commit([waiting])
        else:
            self._down = False
            for delivery, future in group:
                future.set_result(delivery.svix_id in recorded)
                recorded.discard(delivery.svix_id)

    def _record(self, deliveries: list[Incoming]) -> set[str]:
        """Record over the connection at hand; where it has died since its last use, once more over a new one."""
        if self._connection is not None:
            try:
                return inbox.record(self._connection, deliveries)
            except psycopg.OperationalError as error:
                # A dead session can look whole for a moment (the server says that it ends it before it hangs up).
                # Not again what took its whole time: nobody would wait for it a second time.
                self._disconnect()
                if isinstance(error, TOOK_TOO_LONG):
                    raise
            except psycopg.Error:
                self._disconnect()
                raise
        try:
            self._connection = self._connect()
        except psycopg.OperationalError:
            self._down = True
            raise
        try:
            return inbox.record(self._connection, deliveries)
        except psycopg.Error:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        # Also after an error that leaves the connection whole: a server that became read-only has a successor, and
        # only a new connection finds it.
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _refuse(self, group: list[Waiting], error: psycopg.Error) -> None:
        if time.monotonic() - self._complained >= COMPLAIN_SECONDS:
            self._complained = time.monotonic()
            log.error(
                "Postgres doesn't take events; answering 503, and Svix delivers them again",
                extra={"error": describe(error)},
            )
        for _, future in group:
            future.set_exception(Unavailable("Postgres doesn't take events"))
