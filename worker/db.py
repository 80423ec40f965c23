"""Connections to Postgres: how they are opened, what limits they carry, and what an error may say in a log."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import psycopg

Connection = psycopg.Connection[Any]

SCHEMA_VERSION: Final = "0009"
"""The last step in `migrations/versions` that this code was written for."""

# What a row's own content can cause. Everything else (a lost connection, a lock, a missing table or privilege) is
# not the fault of the user or the event: it is tried again later.
ROWS_FAULT: Final = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded)

# A dead peer is noticed within some 15 s instead of the kernel's hours.
_CONNECT: Final[dict[str, Any]] = {
    "connect_timeout": 3,
    "keepalives_idle": 5,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}

# Whoever is cut off in mid-transaction without Postgres hearing of it holds its locks for 10 s at most.
# An acknowledgement means that the commit is on disk, whatever the database's own default says. Sent after the
# connection is made, not as start-up options: connection poolers refuse those.
# Ours names every schema. Were `public` in the path, an operator that somebody else made there for just our types would
# run with our privileges.
LIMITS = """
select
  set_config('statement_timeout', %(statement_ms)s::text, false),
  set_config('lock_timeout', %(lock_ms)s::text, false),
  set_config('idle_in_transaction_session_timeout', '10000', false),
  set_config('synchronous_commit',
    case current_setting('synchronous_commit') when 'off' then 'on' else current_setting('synchronous_commit') end,
    false),
  set_config('search_path', '', false)
"""

ANSWER_SECONDS: Final = 5.0
"""How long a fresh connection's first answers may take: its Postgres may fall silent after it was made."""


def connect(
    database_url: str,
    name: str,
    *,
    statement_ms: int = 30_000,
    lock_ms: int = 10_000,
    answer_seconds: float = ANSWER_SECONDS,
) -> Connection:
    """Open a connection in autocommit, named `clerk-sync NAME` in pg_stat_activity.

    `statement_ms` and `lock_ms` limit every statement and every wait for a lock. Raises psycopg.OperationalError.
    """
    connection = psycopg.connect(database_url, autocommit=True, application_name=f"clerk-sync {name}", **_CONNECT)
    try:
        with deadline(connection, answer_seconds):
            connection.execute(LIMITS, {"statement_ms": statement_ms, "lock_ms": lock_ms})
    except BaseException:
        connection.close()
        raise
    return connection


# to_regclass: a database that was never migrated has no such table, which is an answer and not an error.
SCHEMA_EXISTS = "select to_regclass('clerk.schema_version') is not null"
SCHEMA_CURRENT = "select version_num from clerk.schema_version"


def schema_version(connection: Connection) -> str | None:
    """The schema's version in the database; None before the first migration."""
    (exists,) = connection.execute(SCHEMA_EXISTS).fetchone() or (False,)
    if not exists:
        return None
    row = connection.execute(SCHEMA_CURRENT).fetchone()
    return None if row is None else str(row[0])


def schema_problem(version: str | None) -> str | None:
    """What is wrong with a schema of this version, and what to do; None where it is the one this code needs."""
    if version == SCHEMA_VERSION:
        return None
    if version is None:
        return "the database has no clerk schema yet: run clerk-sync migrate"
    if version < SCHEMA_VERSION:
        return f"the schema is at {version}, this code needs {SCHEMA_VERSION}: run clerk-sync migrate"
    return f"the schema is at {version}, newer than this code ({SCHEMA_VERSION}): deploy the newer code"


def describe(error: psycopg.Error) -> str:
    """A database error without anything that could quote data: its class, its SQLSTATE, and for an error that came
    with no SQLSTATE (the connection itself) the first line of its message."""
    name = type(error).__name__
    if error.sqlstate:
        return f"{name} ({error.sqlstate})"
    if not isinstance(error, psycopg.OperationalError):
        return name  # a DATABASE_URL that can't be read is quoted, password and all
    lines = str(error).splitlines()
    return f"{name}: {lines[0]}" if lines else name


def abandon(connection: Connection) -> None:
    """Cut a connection from another thread: whoever waits on it gets an OperationalError now.

    No time limit of Postgres helps where Postgres itself, or the network before it, has gone silent.
    """
    with (
        contextlib.suppress(OSError, psycopg.Error),
        socket.socket(fileno=os.dup(connection.pgconn.socket)) as duplicate,
    ):
        duplicate.shutdown(socket.SHUT_RDWR)


class _Deadlines:
    """One thread for all deadlines of a process: a thread for each would take longer than most statements do."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[object, tuple[float, Connection]] = {}
        self._wakes_at = 0.0
        threading.Thread(target=self._run, name="deadlines", daemon=True).start()

    def begin(self, connection: Connection, seconds: float) -> object:
        due = time.monotonic() + seconds
        key = object()
        with self._changed:
            self._due[key] = (due, connection)
            if due < self._wakes_at:
                self._changed.notify()
        return key

    def end(self, key: object) -> None:
        with self._changed:
            self._due.pop(key, None)

    def _run(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                for key, (due, connection) in list(self._due.items()):
                    if due <= now:
                        del self._due[key]
                        with contextlib.suppress(Exception):  # the thread goes on for the others
                            abandon(connection)
                wait = min((due for due, _ in self._due.values()), default=now + threading.TIMEOUT_MAX / 2) - now
                self._wakes_at = now + wait
                self._changed.wait(wait)


_deadlines: dict[int, _Deadlines] = {}
"""By process: a fork takes neither the thread nor its deadlines along."""


@contextlib.contextmanager
def deadline(connection: Connection, seconds: float) -> Iterator[None]:
    """Abandon the connection if the block takes longer than this."""
    deadlines = _deadlines.get(os.getpid()) or _deadlines.setdefault(os.getpid(), _Deadlines())
    key = deadlines.begin(connection, seconds)
    try:
        yield
    finally:
        deadlines.end(key)
