"""Keeps one worker process reconciling now and then, with or without a broker.

Celery's beat only says when. A thread of the worker does it: a full run can take minutes, and tasks have few threads.
It looks by itself, too, whether a run is overdue by the database's clock, since the broker may be away for days.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Final

import psycopg

from worker import db, roles, runs
from worker.api_budget import key_id
from worker.clerk import reach
from worker.db import Connection
from worker.errors import ClerkUnavailable, SyncError
from worker.reconcile import reconcile
from worker.runs import AlreadyRunning
from worker.settings import Settings

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 60.0
"""How often to look whether a run is overdue; more often where runs are."""

OVERDUE_INTERVALS: Final = 2
RING_INTERVALS: Final = 0.5
"""A ring sooner after the last run does nothing: there may be several beats, and the broker's owner rings at will."""


class Stopping(SyncError):
    """The worker is stopping, and a run with it."""


class Reconciler:
    """Reconciles in a thread of its own, one run at a time, each over connections of its own. Other processes are kept
    out by the lock of `runs.alone`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._look_seconds = min(LOOK_SECONDS, settings.reconcile_seconds)
        self.reset()

    def reset(self) -> None:
        """Start anew in a forked process: the parent's thread isn't there, and its locks may never be released."""
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._rung = threading.Event()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start the thread, unless it runs."""
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._attend, name="reconciler", daemon=True)
                self._thread.start()

    def ring(self) -> None:
        """Have a run begin, and return at once. During a run it does nothing: the next ring comes soon enough."""
        self.start()
        self._rung.set()

    def stop(self) -> None:
        """End, and cut short the run in progress at its next page or wait."""
        self._stopped.set()
        self._rung.set()

    def join(self, limit_seconds: float) -> bool:
        """Wait for the end, but not for long: an answer of Clerk's may be waited for. Whether it has ended.

        A run that its process leaves behind, the next one records as cut short.
        """
        thread = self._thread
        if thread is not None:
            thread.join(limit_seconds)
        return thread is None or not thread.is_alive()

    def _attend(self) -> None:
        # At once: a worker may be started more often than a run is due.
        rung = False
        while not self._stopped.is_set():
            if self._look(rung=rung):
                self._rung.clear()
            # Looked at after that: who stops sets this one first.
            if not self._stopped.is_set():
                rung = self._rung.wait(self._look_seconds)
                self._rung.clear()

    def _look(self, *, rung: bool) -> bool:
        """Make a run where it was rung for or is overdue; whether one was tried. Whatever fails, it is only logged, and
        the next one may succeed."""
        before: int | None = None
        try:
            before = self._due(rung=rung)
            if before is None:
                return False
            self._run()
        except AlreadyRunning as error:
            log.info("no periodic reconcile now", extra={"reason": str(error)})
        except Stopping:
            log.info("the periodic reconcile was cut short: the worker is stopping")
        except Exception as error:  # noqa: BLE001 - the thread has to go on
            _tell(error)
            if before is not None:
                self._record(error, before)
        return True

    def _due(self, *, rung: bool) -> int | None:
        """The id of the run that began last, where another one is due."""
        with self._connect() as connection:
            problems = roles.problems(connection, roles.WORKER)
            if problems:
                raise SyncError("; ".join(problems))
            intervals = RING_INTERVALS if rung else OVERDUE_INTERVALS
            if runs.overdue(connection, intervals * self._settings.reconcile_seconds):
                return _newest(connection)
        return None

    def _run(self) -> None:
        started = time.perf_counter()
        with reach(self._settings, self._connect, sleep=self._sleep) as (connection, api):
            run = reconcile(
                connection,
                self._settings.policy,
                api,
                key=key_id(self._settings.secret_key),
                periodic=True,
                observe=lambda _: self._sleep(0),
                sleep=self._sleep,
            )
        ms = round((time.perf_counter() - started) * 1000, 1)
        counts = {name: number for name, number in run.counters.items() if number}
        log.info("reconciled", extra={"kind": run.kind, "cause": run.cause, **counts, "calls": run.calls, "ms": ms})

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Stopping("the worker is stopping")

    def _record(self, error: Exception, before: int) -> None:
        """Have the failure shown by status and metrics, unless a run has begun since: that one has its own record."""
        with contextlib.suppress(psycopg.Error), self._connect() as connection:
            if _newest(connection) == before:
                runs.record_failure(connection, runs.INCREMENTAL, runs.reason(error))

    def _connect(self) -> Connection:
        return db.connect(self._settings.database_url, "reconcile")


def _newest(connection: Connection) -> int:
    """The id of the run that began last, 0 where none ever did."""
    return max((kind.last.id for kind in runs.overview(connection)), default=0)


def _tell(error: Exception) -> None:
    """Log a failure, with its place in the code only where nobody thought of it."""
    if not isinstance(error, (SyncError, psycopg.Error)):
        log.critical("the periodic reconcile failed unexpectedly", exc_info=error)
        return
    passing = isinstance(error, (ClerkUnavailable, psycopg.OperationalError))
    level = logging.WARNING if passing else logging.ERROR
    log.log(level, "the periodic reconcile failed", extra={"reason": runs.reason(error)})
