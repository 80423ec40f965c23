"""What `/readyz` and `/metrics` ask of Postgres: each time over a connection of its own, within a few seconds."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, Final

import psycopg

from worker import inbox, metrics, minutes, roles, runs
from worker.db import Connection, deadline, describe

log = logging.getLogger(__name__)

LIMIT_SECONDS: Final = 3.0

COMPLAIN_SECONDS: Final = 30.0
"""How often the log tells of the same problem: `/readyz` may be asked each second."""

SILENT: Final = "Postgres doesn't answer: the receiver's log says more"
"""All that a caller, who may be anybody, is told of a connection that fails: the error names hosts and logins."""


class Health:
    """Asks over connections that `connect` opens."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._complained = -COMPLAIN_SECONDS
        self._complaint = ""

    def problems(self) -> list[str]:
        """Why the service isn't ready, each with what to do; empty when it is."""
        try:
            with self._connect() as connection, deadline(connection, LIMIT_SECONDS):
                problems = roles.problems(connection, roles.RECEIVER)
        except psycopg.Error as error:
            self._complain(f"Postgres doesn't answer: {describe(error)}")
            return [SILENT]
        if problems:
            self._complain("; ".join(problems))
        return problems

    def counts(self) -> dict[str, Any] | None:
        """What the inbox counts, how the `runs` stand, and the minutes that workers counted of late; None where
        Postgres doesn't answer."""
        try:
            with self._connect() as connection, deadline(connection, LIMIT_SECONDS):
                counts = inbox.counts(connection)
                counts |= {"runs": [], "last_minutes": None, "recent_minutes": None}
                with contextlib.suppress(psycopg.errors.UndefinedTable):  # deployed before the migration
                    counts["runs"] = runs.overview(connection)
                    counts["last_minutes"] = minutes.since(connection, metrics.LAST)
                    counts["recent_minutes"] = minutes.since(connection, metrics.RECENT)
                return counts
        except psycopg.Error:
            return None

    def _complain(self, complaint: str) -> None:
        """Log why this isn't ready, the same reason not each time."""
        if complaint != self._complaint or time.monotonic() - self._complained >= COMPLAIN_SECONDS:
            self._complained, self._complaint = time.monotonic(), complaint
            log.error("not ready", extra={"reason": complaint})
