"""Puts verified deliveries into the inbox, and lets nobody wait longer than Svix would.

Whoever asks first for the outcome of a delivery commits all that this thread has taken since its last commit, in one
statement: a thread that takes whatever waits shares the commit among them, and a single delivery has one of its own.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import psycopg

from worker import inbox
from worker.db import Connection, abandon, describe
from worker.errors import Unavailable
from worker.inbox import Incoming

log = logging.getLogger(__name__)

LIMIT_SECONDS: Final = 4.0
"""From a delivery's last byte until it is answered 503. Svix itself gives up after 15 s."""

LEAST_SECONDS: Final = 1.0
"""What a commit may take however long its deliveries have waited for it."""

GROUP: Final = 100
"""The most deliveries in one commit."""

COMPLAIN_SECONDS: Final = 10.0

WATCH_SECONDS: Final = 0.1
"""How often commits under way are looked at."""

TRY_SECONDS: Final = 0.5
"""How often Postgres is tried while it is away."""

TOOK_TOO_LONG: Final = (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable)

SILENT: Final = "Postgres doesn't answer in time"
AWAY: Final = "Postgres doesn't answer"
REFUSED: Final = "Postgres doesn't take events"

Outcome = bool | Unavailable


@dataclass(slots=True, eq=False)
class Batch:
    """Deliveries of one thread that are committed together."""

    deliveries: list[Incoming] = field(default_factory=list)
    since: float = float("inf")
    began: float = 0.0
    deadline: float = 0.0
    connection: Connection | None = None
    cut: bool = False
    outcomes: list[Outcome] | None = None


class Recorder:
    """`record()` from any thread; connections, and the thread that watches them, come with it, after any fork."""

    def __init__(self, connect: Callable[[], Connection], limit_seconds: float = LIMIT_SECONDS) -> None:
        self._connect = connect
        self._limit = limit_seconds
        self._mine = threading.local()
        self._idle: list[Connection] = []
        self._busy: set[Batch] = set()
        self._work = threading.Event()
        self._down = False
        self._starting = threading.Lock()
        self._watcher: threading.Thread | None = None
        self._complained = -COMPLAIN_SECONDS

    def record(self, delivery: Incoming, since: float | None = None) -> Callable[[], bool]:
        """Take a delivery, which was whole at `since` (time.monotonic()); what comes back is called in this thread.

        It commits, and says True when the delivery was recorded, False when it is pending there already. Both raise
        Unavailable where Postgres can't do it in time. It may be recorded all the same then, which does no harm:
        Svix delivers it again and it is a duplicate.
        """
        if self._down:
            raise Unavailable(AWAY)
        batch: Batch | None = getattr(self._mine, "batch", None)
        if batch is None or batch.began or len(batch.deliveries) == GROUP:
            batch = self._mine.batch = Batch()
        batch.deliveries.append(delivery)
        batch.since = min(batch.since, time.monotonic() if since is None else since)
        return functools.partial(self._outcome, batch, len(batch.deliveries) - 1)

    def close(self) -> None:
        """Close the connections that nobody uses."""
        while self._idle:
            self._idle.pop().close()

    def _outcome(self, batch: Batch, place: int) -> bool:
        if batch.outcomes is None:
            batch.outcomes = self._commit_or_refuse(batch)
        outcome = batch.outcomes[place]
        if isinstance(outcome, Unavailable):
            raise outcome
        return outcome

    # Committing, in the thread that asks

    def _commit_or_refuse(self, batch: Batch) -> list[Outcome]:
        """Commit; an error that nobody thought of must not leave any of them without an answer."""
        batch.began = time.monotonic()
        batch.deadline = max(batch.since + self._limit, batch.began + min(LEAST_SECONDS, self._limit))
        self._busy.add(batch)
        self._watch()
        try:
            return self._commit(batch, batch.deliveries)
        except Exception:
            log.critical("recording failed", exc_info=True)
            return [Unavailable("recording failed")] * len(batch.deliveries)
        finally:
            self._busy.discard(batch)

    def _commit(self, batch: Batch, deliveries: list[Incoming]) -> list[Outcome]:
        """Record these. The same id twice among them is once a delivery and then its duplicates."""
        first: dict[str, Incoming] = {}
        for delivery in deliveries:
            first.setdefault(delivery.svix_id, delivery)
        try:
            recorded = self._record(batch, list(first.values()))
        except Unavailable as unavailable:
            return [unavailable] * len(deliveries)
        except psycopg.OperationalError as error:
            return self._refusals(deliveries, error)
        except psycopg.Error as error:
            if len(deliveries) == 1:
                return self._refusals(deliveries, error)
            return [outcome for delivery in deliveries for outcome in self._commit(batch, [delivery])]
        outcomes: list[Outcome] = []
        for delivery in deliveries:
            outcomes.append(delivery.svix_id in recorded)
            recorded.discard(delivery.svix_id)
        return outcomes

    def _record(self, batch: Batch, deliveries: list[Incoming]) -> set[str]:
        """Record over a connection at hand; where it has died since its last use, once more over a new one."""
        if (connection := self._at_hand()) is not None:
            try:
                return self._record_over(connection, batch, deliveries)
            except psycopg.OperationalError as error:
                # A dead session can look whole for a moment (the server says that it ends it before it hangs up).
                # Not again what took its whole time: nobody would wait for it a second time.
                if batch.cut or isinstance(error, TOOK_TOO_LONG):
                    raise
        try:
            connection = self._connect()
        except psycopg.OperationalError:
            self._down = True
            raise
        return self._record_over(connection, batch, deliveries)

    def _record_over(self, connection: Connection, batch: Batch, deliveries: list[Incoming]) -> set[str]:
        batch.connection = connection
        if batch.cut:
            connection.close()
            raise Unavailable(SILENT)
        try:
            recorded = inbox.record(connection, deliveries)
        except BaseException:
            # Also after an error that leaves the connection whole: a server that became read-only has a successor,
            # and only a new connection finds it.
            connection.close()
            raise
        finally:
            batch.connection = None
        self._idle.append(connection)
        return recorded

    def _at_hand(self) -> Connection | None:
        """The connection that was used last: one is enough for a trickle."""
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _refusals(self, deliveries: list[Incoming], error: psycopg.Error) -> list[Outcome]:
        if time.monotonic() - self._complained >= COMPLAIN_SECONDS:
            self._complained = time.monotonic()
            log.error(
                "Postgres doesn't take events; answering 503, and Svix delivers them again",
                extra={"error": describe(error)},
            )
        return [Unavailable(REFUSED)] * len(deliveries)

    # Watching, in a thread of its own

    def _watch(self) -> None:
        self._work.set()
        if self._watcher is None:
            with self._starting:
                if self._watcher is None:
                    self._watcher = threading.Thread(target=self._run, name="recorder", daemon=True)
                    self._watcher.start()

    def _run(self) -> None:
        pause = threading.Event()  # never set: a wait that can be seen in a stack trace
        tried = 0.0
        while True:
            self._work.wait()
            self._work.clear()
            while self._busy or self._down:
                for batch in list(self._busy):
                    self._look_at(batch)
                # Not while commits are to be watched: connecting to a silent server takes seconds.
                if self._down and not self._busy and time.monotonic() - tried >= TRY_SECONDS:
                    self._try_again()
                    tried = time.monotonic()
                pause.wait(WATCH_SECONDS)

    def _look_at(self, batch: Batch) -> None:
        """Cut a commit whose time is up; where another one's was, those that have had a while too."""
        now = time.monotonic()
        if batch.deadline > now and not (self._down and now - batch.began > LEAST_SECONDS):
            return
        batch.cut = self._down = True
        # What is idle goes the same way, more often than not.
        self.close()
        if (connection := batch.connection) is not None:
            abandon(connection)

    def _try_again(self) -> None:
        """Find out whether Postgres is back. Until then every delivery is refused at once, and holds no thread."""
        try:
            self._idle.append(self._connect())
        except psycopg.Error:
            return
        except Exception:
            log.critical("connecting failed", exc_info=True)
            return
        self._down = False
