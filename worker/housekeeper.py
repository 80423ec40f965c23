"""Keeps the tables tidy: erases what dead events of deleted users carry, prunes applied ones past their time, counts
what happened in each minute, and weighs the users whom applications have put.

A thread of its own, over a connection of its own: under a steady load a drain goes on and on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final

import psycopg

from worker import inbox, minutes, users
from worker.db import Connection, deadline, describe
from worker.policy import Policy

log = logging.getLogger(__name__)

HOUSE_SECONDS: Final = 10.0
"""How often it looks, and how long one look may take."""

FIRST_SECONDS: Final = 1.0
"""How soon it looks first: only then whoever looks at the status page sees that there is a worker."""

WEIGH_SECONDS: Final = 5.0
"""How long one look may go on weighing users."""

PRUNE_SECONDS: Final = 60.0
"""How often it prunes; until none are left, with each look."""

COUNT_AGAIN_SECONDS: Final = 60.0
"""After what took too long to count. Else it looks each time whether a minute is over."""


class Housekeeper(threading.Thread):
    """Looks every ten seconds; applied events are kept for `keep`. A failure is told, and tried again."""

    def __init__(self, connect: Callable[[], Connection], keep: timedelta, policy: Policy) -> None:
        super().__init__(name="housekeeper", daemon=True)
        self._connect = connect
        self._policy = policy
        self._keep = keep
        self._prune_due = 0.0
        self._count_due = 0.0
        self._step = inbox.PRUNE_STEP
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End, at the latest after the look in progress."""
        self._stopped.set()

    def run(self) -> None:
        """Keep house until stopped."""
        wait = FIRST_SECONDS
        while not self._stopped.wait(wait):
            wait = HOUSE_SECONDS
            try:
                self.keep_house()
            except psycopg.Error as error:
                log.warning("housekeeping is put off", extra={"error": describe(error)})
            except Exception:
                log.critical("housekeeping failed", exc_info=True)

    def keep_house(self) -> None:
        """One look. Raises psycopg.Error."""
        with self._connect() as connection, deadline(connection, HOUSE_SECONDS):
            inbox.forget_deleted(connection)
            now = time.monotonic()
            if now >= self._count_due:
                self._count(connection, now)
            if now >= self._prune_due:
                self._prune(connection, now)
            # Another worker may have been started with other settings, and be gone.
            users.record_policy(connection, self._policy)
            while users.weigh_put(connection, self._policy) and time.monotonic() < now + WEIGH_SECONDS:
                pass

    def _count(self, connection: Connection, now: float) -> None:
        try:
            minutes.count(connection)
        except psycopg.errors.QueryCanceled:
            # A gap in what is shown is better than no pruning, and than as much work again in ten seconds.
            self._count_due = now + COUNT_AGAIN_SECONDS
            log.warning("the last minutes took too long to count: they stay without figures")

    def _prune(self, connection: Connection, now: float) -> None:
        try:
            pruned = max(
                inbox.prune(connection, self._keep, self._step),
                users.prune_changes(connection, self._keep, self._step),
            )
        except psycopg.errors.QueryCanceled:
            # Where ten thousand take too long, fewer are better than none.
            self._step = max(1, self._step // 10)
            raise
        if pruned < self._step:
            self._prune_due = now + PRUNE_SECONDS
            self._step = inbox.PRUNE_STEP
