"""The runs of the commands that pull from Clerk, `clerk.runs`: how far each came, and that one runs at a time."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import psycopg
from psycopg.types.json import Jsonb

from worker.db import Connection
from worker.errors import SyncError
from worker.events import Unusable

MOST_LISTED: Final = 100
"""How many unusable users a run names."""

REASON_LENGTH: Final = 500


@dataclass(slots=True)
class Run:
    """One run; `counters` are outcomes of users, `unusable` the first of those that couldn't be used."""

    id: int
    state: str
    started_at: datetime
    cursor: dict[str, Any] | None
    counters: Counter[str] = field(default_factory=Counter)
    unusable: list[dict[str, Any]] = field(default_factory=list)
    calls: int = 0

    @property
    def users(self) -> int:
        """How many users it has been through."""
        return self.counters.total()

    def note(self, unusable: Unusable) -> None:
        """Count a user that can't be used, and name the first ones."""
        self.counters["unusable"] += 1
        if len(self.unusable) < MOST_LISTED:
            self.unusable.append({"user_id": unusable.user_id, "reason": unusable.reason})


LOCK = """
select pg_try_advisory_lock(hashtext('clerk-sync run'), hashtext(%(kind)s))
"""

UNLOCK = """
select pg_advisory_unlock(hashtext('clerk-sync run'), hashtext(%(kind)s))
"""


@contextlib.contextmanager
def alone(connection: Connection, kind: str) -> Iterator[None]:
    """Keep other runs of this kind out for as long as the block and the connection last. The run must write over this
    connection alone: who has lost the lock can't write either. Raises SyncError where another one runs."""
    if connection.execute(LOCK, {"kind": kind}).fetchone() != (True,):
        raise SyncError(_running(latest(connection, kind), kind))
    try:
        yield
    finally:
        with contextlib.suppress(psycopg.Error):
            connection.execute(UNLOCK, {"kind": kind})


def _running(run: Run | None, kind: str) -> str:
    if run is None or run.state != "running":
        return f"another {kind} is just starting"
    since = run.started_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return f"another {kind} is running: run {run.id}, since {since}, {run.users:,} users so far"


LATEST = """
select id, state, started_at, cursor, counters, unusable, calls from clerk.runs
where kind = %(kind)s
order by id desc
limit 1
"""


def latest(connection: Connection, kind: str) -> Run | None:
    """The last run of a kind."""
    row = connection.execute(LATEST, {"kind": kind}).fetchone()
    if row is None:
        return None
    run_id, state, started_at, cursor, counters, unusable, calls = row
    return Run(run_id, state, started_at, cursor, Counter(counters), unusable, calls)


BEGIN = """
insert into clerk.runs (kind) values (%(kind)s)
returning id, state, started_at
"""


def begin(connection: Connection, kind: str) -> Run:
    """A new run, at the beginning."""
    ((run_id, state, started_at),) = connection.execute(BEGIN, {"kind": kind}).fetchall()
    return Run(run_id, state, started_at, None)


GO_ON = """
update clerk.runs set state = 'running', finished_at = null, error = null
where id = %(id)s
"""


def go_on(connection: Connection, run: Run) -> None:
    """Continue a run that was cut short."""
    run.state = "running"
    connection.execute(GO_ON, {"id": run.id})


SAVE = """
update clerk.runs set
  cursor = %(cursor)s, counters = %(counters)s, unusable = %(unusable)s, calls = %(calls)s, state = %(state)s,
  finished_at = case when %(state)s = 'done' then now() end
where id = %(id)s
"""


def save(connection: Connection, run: Run) -> None:
    """Save how far a run came, in the transaction of what it did."""
    connection.execute(
        SAVE,
        {
            "id": run.id,
            "cursor": None if run.cursor is None else Jsonb(run.cursor),
            "counters": Jsonb(dict(run.counters)),
            "unusable": Jsonb(run.unusable),
            "calls": run.calls,
            "state": run.state,
        },
    )


FAIL = """
update clerk.runs set state = 'failed', finished_at = now(), error = %(error)s, calls = %(calls)s
where id = %(id)s and state = 'running'
"""


def fail(connection: Connection, run: Run, reason: str) -> None:
    """Record that a run was cut short; what it saved stays."""
    connection.execute(FAIL, {"id": run.id, "error": reason[:REASON_LENGTH], "calls": run.calls})
