"""What `/readyz` and `/metrics` ask of Postgres: each time over a connection of its own, within a few seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import psycopg

from worker import inbox, runs
from worker.db import Connection, deadline, describe, schema_problem, schema_version

LIMIT_SECONDS: Final = 3.0


class Health:
    """Asks over connections that `connect` opens."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect

    def problems(self) -> list[str]:
        """Why the service isn't ready, each with what to do; empty when it is."""
        try:
            with self._connect() as connection, deadline(connection, LIMIT_SECONDS):
                problem = schema_problem(schema_version(connection))
        except psycopg.Error as error:
            return [f"Postgres doesn't answer: {describe(error)}"]
        return [problem] if problem else []

    def counts(self) -> dict[str, Any] | None:
        """What the inbox counts, and how the `runs` stand; None where Postgres doesn't answer."""
        try:
            with self._connect() as connection, deadline(connection, LIMIT_SECONDS):
                counts = inbox.counts(connection)
                try:
                    return counts | {"runs": runs.overview(connection)}
                except psycopg.errors.UndefinedTable:  # deployed before the migration
                    return counts | {"runs": []}
        except psycopg.Error:
            return None
