"""Puts verified deliveries into the inbox, and lets nobody wait longer than Svix would.

Whoever asks first for the outcome of a delivery commits all that this thread has taken since its last commit, in one
statement: a thread that takes whatever waits shares the commit among them, and a single delivery has one of its own.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

import psycopg

from worker import inbox
from worker.db import ROWS_FAULT, Connection, abandon, describe
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

ONES_FAULT: Final = (*ROWS_FAULT, psycopg.errors.LockNotAvailable)
"""What one delivery may bring upon those that are committed with it: its content, or a row that somebody holds."""

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
        # The one that was used last comes first: one is enough for a trickle.
        self._idle: queue.LifoQueue[Connection] = queue.LifoQueue()
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
        while (connection := self._at_hand()) is not None:
            connection.close()

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
        try:
            self._watch()
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
        except ONES_FAULT as error:
            if len(deliveries) == 1:
                return self._refusals(deliveries, error)
            # It ends with the batch's time: then `_record` refuses the rest.
            return [outcome for delivery in deliveries for outcome in self._commit(batch, [delivery])]
        except psycopg.Error as error:
            return self._refusals(deliveries, error)
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
            except ROWS_FAULT:
                raise
            except psycopg.Error as error:
                # A dead session can look whole for a moment (the server says that it ends it before it hangs up), and
                # a server that takes no more writes has a successor. Not again what took its whole time: nobody would
                # wait for it a second time.
                if batch.cut or isinstance(error, TOOK_TOO_LONG):
                    raise
        return self._record_over(self._connected(batch), batch, deliveries)

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
        self._idle.put(connection)
        self._down = self._down and batch.cut
        return recorded

    def _at_hand(self) -> Connection | None:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return None

    def _connected(self, batch: Batch) -> Connection:
        """A new connection; where there is none to be had but others are at work, the next one that is free."""
        opening = self._open(batch)
        error: psycopg.OperationalError | None = None
        try:
            return opening.result(batch.deadline - time.monotonic())
        except TimeoutError:
            opening.add_done_callback(self._keep)
        except psycopg.OperationalError as found:
            error = found
        if self._idle.empty() and not any(other.connection for other in list(self._busy)):
            self._down = True
            raise error or Unavailable(AWAY)
        try:
            return self._idle.get(timeout=max(batch.deadline - time.monotonic(), 0))
        except queue.Empty:
            raise Unavailable(AWAY) from None

    def _open(self, batch: Batch | None = None) -> Future[Connection]:
        """Connect in a thread of its own: to look up a name, and to try each of its addresses, may take longer than
        anybody has, and can't be cut."""
        if batch is not None and (batch.cut or self._down):
            raise Unavailable(SILENT if batch.cut else AWAY)
        opening: Future[Connection] = Future()

        def connect() -> None:
            try:
                opening.set_result(self._connect())
            except BaseException as error:  # noqa: BLE001 - whoever waits for it is told
                opening.set_exception(error)

        threading.Thread(target=connect, name="connecting", daemon=True).start()
        return opening

    def _keep(self, opening: Future[Connection]) -> None:
        """Keep a connection that came too late for whoever asked for it."""
        if opening.exception() is None:
            self._idle.put(opening.result())

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
                    watcher = threading.Thread(target=self._run, name="recorder", daemon=True)
                    watcher.start()
                    self._watcher = watcher

    def _run(self) -> None:
        pause = threading.Event()  # never set: a wait that can be seen in a stack trace
        opening: Future[Connection] | None = None
        tried = 0.0
        while True:
            self._work.wait()
            self._work.clear()
            while self._busy or self._down:
                try:
                    for batch in list(self._busy):
                        self._look_at(batch)
                    if self._down and opening is None and time.monotonic() - tried >= TRY_SECONDS:
                        tried = time.monotonic()
                        opening = self._open()
                    if opening is not None and opening.done():
                        opened, opening = opening, None
                        self._find_out(opened)
                except Exception:
                    log.critical("watching commits failed", exc_info=True)
                pause.wait(WATCH_SECONDS)

    def _look_at(self, batch: Batch) -> None:
        """Cut a commit whose time is up; where another one's was, those that have had a while too."""
        now = time.monotonic()
        if batch.deadline > now and not (self._down and now - batch.began > LEAST_SECONDS):
            return
        batch.cut = True
        if now - batch.began > self._limit * 0.9:
            # That was Postgres, and not our own queue. What is idle goes the same way, more often than not.
            self._down = True
            self.close()
        if (connection := batch.connection) is not None:
            abandon(connection)

    def _find_out(self, opening: Future[Connection]) -> None:
        """Whether Postgres is back. Until then every delivery is refused at once, and holds no thread."""
        error = opening.exception()
        if error is None:
            self._idle.put(opening.result())
            self._down = False
        elif not isinstance(error, psycopg.Error):
            log.critical("connecting failed", exc_info=error)
