"""Keeps one worker process draining, with or without a broker.

The doorbell (a Celery message) only shortens the wait. A thread of the worker's main process looks into the inbox
every two seconds by itself, so what is pending is applied while the broker is down, wiped or silent, and while
Celery's own connection to it hangs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Final

import psycopg

from worker import metrics, roles, tracing, users
from worker.db import Connection, describe
from worker.errors import SyncError
from worker.policy import Policy
from worker.sync import BATCH, Batch, drain

log = logging.getLogger(__name__)

SWEEP_SECONDS: Final = 2.0
BACKOFF_SECONDS: Final = (0.5, 4.0)
"""The first and the longest wait after a failure; each wait is halved or kept at random, so that workers spread."""

REST_SECONDS: Final = (0.02, 0.2)
"""The least and the longest time from a batch that took all there was to the next: so that many events share a commit.
Between these, twice as long as the batch took: where everything is busy, acknowledging comes before applying."""

LINGER_SECONDS: Final = 0.5
"""How long a drain looks on after the last event, as they seldom come alone: that takes no wake-up for each."""

COMPLAIN_SECONDS: Final = 30.0
"""How often the log tells of the same reason for not draining: it is looked for every few seconds."""

HELD: Final = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)

WATCH_SECONDS: Final = 5.0
DEAF_SECONDS: Final = 20.0
"""How long a wake-up may wait in the broker while this worker is idle, before it counts as deaf and is replaced."""


class NotReady(SyncError):
    """The database isn't one that this code may and can work on; somebody has to mend that."""


class Drainer:
    """Drains the inbox over one connection; at most one drain runs in a process at any time, but for a second lane:
    while there are more events than a batch takes, another thread drains them too, over a connection of its own, since
    Python and Postgres take turns in each lane.

    `linger` is for how many seconds after the last event a drain looks on.
    """

    def __init__(self, connect: Callable[[], Connection], policy: Policy, *, linger: float = 0.0) -> None:
        self._connect = connect
        self._policy = policy
        self._linger = linger
        self._first = BATCH
        self._behind = 0
        self._connection: Connection | None = None
        self._parents: Connection | None = None
        self._complained = -COMPLAIN_SECONDS
        self._complaint = ""
        self.reset()

    def reset(self) -> None:
        """Start anew in a forked process, which must not touch the parent's connection or lock."""
        # Kept, or collecting it would say goodbye to Postgres in the parent's name.
        self._parents, self._connection = self._connection, None
        self._running = threading.Lock()
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._second: threading.Thread | None = None
        self._latest = 0.0
        self._resting = False

    def stop(self) -> None:
        """End after the batches in progress. What is pending then is another worker's, or waits for the next start."""
        self._stopping.set()

    def ring(self, cause: str) -> bool:
        """Drain until nothing is pending; False where Postgres can't be had just now, or isn't ready for us, such as a
        schema that this code doesn't know: so that one tries later.

        Where a drain is running already, that one looks once more before it ends. Raises SyncError for what nobody
        thought of.
        """
        self._wanted.set()
        while self._wanted.is_set() and not self._stopping.is_set() and self._running.acquire(blocking=False):
            try:
                while self._wanted.is_set() and not self._stopping.is_set():
                    self._wanted.clear()
                    if not self._drain(cause):
                        return False
            finally:
                self._running.release()
        return True

    def _drain(self, cause: str) -> bool:
        first, done = 0, 0

        def observe(batch: Batch) -> None:
            nonlocal done
            done += 1
            self._observe(batch, cause)
            if batch.full and batch.asked >= BATCH and not self._behind:
                self._open_second_lane(cause)

        try:
            connection = self._connected()
            # After a failure one event at a time, then more and more: a few that take very long together, as whoever
            # writes the metadata may bring about, would fail together for ever.
            first, self._first = self._first, 1
            drain(connection, self._policy, batch=first, behind=self._behind, observe=observe, go_on=self._goes_on)
            if self._behind:
                # Everybody else's are done: once more those that were left out; or soon, if there was nobody else.
                self._behind = 0
                if not done:
                    return False
                self._wanted.set()
            else:
                self._first = BATCH
        except HELD as error:
            # An application may hold its users' rows for long. Whoever isn't held is looked for at once.
            self._pass_over(alone=first == 1 and not done)
            self._wanted.set()
            told = "somebody holds a user's row; other users' events go first"
            self._complain(logging.WARNING, told, error=describe(error))
        except NotReady as error:
            self._complain(logging.ERROR, "the database isn't ready; what is pending stays so", reason=str(error))
            return False
        except psycopg.OperationalError as error:
            self._pass_over(alone=first == 1 and not done)
            self._disconnect()
            self._complain(
                logging.WARNING, "Postgres is not to be had; what is pending stays so", error=describe(error)
            )
            return False
        except psycopg.Error as error:
            self._pass_over(alone=first == 1 and not done)
            self._disconnect()
            # Without the original: its text can quote data.
            raise SyncError(f"draining failed: {describe(error)}") from None
        return True

    def _goes_on(self, batch: Batch) -> bool:
        """Whether to look for more: at once after a batch that was full or half so, else a moment later."""
        now = time.monotonic()
        if batch.claimed + batch.left:
            self._latest = now
        if self._stopping.is_set():
            return False
        if not self._linger or batch.full or batch.claimed * 2 >= batch.asked:
            return batch.claimed + batch.left > 0
        least, longest = REST_SECONDS
        rest = min(max(least, 2 * batch.seconds), longest)
        self._resting = True
        try:
            return now - self._latest < self._linger and not self._stopping.wait(rest)
        finally:
            self._resting = False

    def _open_second_lane(self, cause: str) -> None:
        if self._second is None or not self._second.is_alive():
            self._second = threading.Thread(target=self._drain_beside, args=(cause,), name="second lane", daemon=True)
            self._second.start()

    def _drain_beside(self, cause: str) -> None:
        """Take full batches as long as there are any. Whatever is wrong here, the first lane tells, and waits for."""
        try:
            with contextlib.closing(self._connect()) as connection:
                drain(
                    connection,
                    self._policy,
                    batch=BATCH,
                    observe=lambda batch: self._observe(batch, cause),
                    go_on=lambda batch: batch.full and not self._stopping.is_set(),
                )
        except psycopg.Error as error:
            log.info("the second lane ended; what it had is pending", extra={"error": describe(error)})
        except Exception:
            log.critical("the second lane failed", exc_info=True)

    def _pass_over(self, *, alone: bool) -> None:
        """Let others go before an event that failed `alone` over a connection that is whole: its user's row may be
        locked for long, and nobody else's events are to wait for that."""
        if alone and self._connection is not None and not self._connection.closed:
            self._behind += 1

    def _complain(self, level: int, event: str, **fields: str) -> None:
        """Log why nothing is drained, the same not each time: every wake-up tries it again."""
        complaint = event + fields.get("reason", "") + fields.get("error", "").partition(":")[0]
        if complaint != self._complaint or time.monotonic() - self._complained >= COMPLAIN_SECONDS:
            self._complained, self._complaint = time.monotonic(), complaint
            log.log(level, event, extra=fields)

    def _observe(self, batch: Batch, cause: str) -> None:
        metrics.observe_batch(batch)
        metrics.DRAINS.labels(cause).inc()
        for svix_id, reason in batch.dead.items():
            log.error("event set aside", extra={"svix_id": svix_id, "reason": reason})
        told = {
            "cause": cause,
            "claimed": batch.claimed,
            "dead": len(batch.dead),
            **batch.outcomes,
            "ms": round(batch.seconds * 1000, 1),
            "oldest_s": round(max(batch.freshness, default=0.0), 1),
        }
        log.info("batch applied", extra=told)
        tracing.span("batch", batch.seconds, told)

    def busy(self) -> bool:
        """Whether a drain is at work, and not resting."""
        return self._running.locked() and not self._resting

    def close(self) -> None:
        """Close the connections, once the drain in progress has ended."""
        if self._second is not None:
            self._second.join()
        with self._running:
            self._disconnect()

    def _connected(self) -> Connection:
        if self._connection is None or self._connection.closed:
            connection = self._connect()
            try:
                problems = roles.problems(connection, roles.WORKER)
                if not problems:
                    users.record_policy(connection, self._policy)
            except psycopg.Error:
                connection.close()
                raise
            if problems:
                connection.close()
                raise NotReady("; ".join(problems))
            self._connection = connection
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Sweeper(threading.Thread):
    """Rings the drainer every two seconds. Whatever the broker does, this thread has nothing to do with it.

    `replace` ends this process, for whatever started it to start another; nothing is lost, since the truth is in
    Postgres.
    """

    def __init__(self, drainer: Drainer, replace: Callable[[], None] = lambda: os._exit(70)) -> None:
        super().__init__(name="sweeper", daemon=True)
        self._drainer = drainer
        self._replace = replace
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End after the drain in progress."""
        self._stopped.set()

    def run(self) -> None:
        """Sweep until stopped. An error nobody thought of ends the process, not silently this thread."""
        try:
            wait = SWEEP_SECONDS
            while not self._stopped.is_set():
                wait = self._wait_after(wait, swept=self._sweep())
                self._stopped.wait(wait)
        except Exception:
            log.critical("the sweeper failed; ending this worker so that it is replaced", exc_info=True)
            self._replace()
        self._drainer.close()

    def _sweep(self) -> bool:
        try:
            return self._drainer.ring("sweep")
        except SyncError as error:
            log.error(str(error))  # noqa: TRY400 - the reason is in the sentence; a traceback could quote data
            return False

    @staticmethod
    def _wait_after(wait: float, *, swept: bool) -> float:
        first, longest = BACKOFF_SECONDS
        if swept:
            return SWEEP_SECONDS
        doubled = first if wait == SWEEP_SECONDS else min(wait * 2, longest)
        return doubled * random.uniform(0.5, 1)  # noqa: S311 - jitter, not a secret


class Watch(threading.Thread):
    """Replaces a worker that no longer hears the broker: Celery can stay deaf after a connection went half-open.

    `waiting` asks the broker over a fresh connection how many wake-ups wait (None: it doesn't answer); `busy` tells
    whether this worker drains just now, and so may leave one waiting. Whoever hears a message calls `heard()`.
    """

    def __init__(
        self,
        waiting: Callable[[], int | None],
        busy: Callable[[], bool],
        replace: Callable[[], None] = lambda: os._exit(70),
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self._waiting = waiting
        self._busy = busy
        self._replace = replace
        self._stopped = threading.Event()
        self._heard = threading.Event()

    def heard(self) -> None:
        """Note that a message arrived."""
        self._heard.set()

    def stop(self) -> None:
        """End, at the latest once the broker has answered or not."""
        self._stopped.set()

    def run(self) -> None:
        """Watch until stopped."""
        unheard_since: float | None = None
        while not self._stopped.wait(WATCH_SECONDS):
            now = time.monotonic()
            heard = self._heard.is_set()
            self._heard.clear()
            if heard or self._busy() or not self._waiting():
                unheard_since = None
            elif unheard_since is None:
                unheard_since = now
            elif now - unheard_since > DEAF_SECONDS:
                log.critical("wake-ups wait in the broker and Celery doesn't hear them; ending this worker")
                self._replace()
                return
