"""The runs that pull from Clerk, `clerk.runs`: what each did and how far it came, and that one runs at a time."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from worker.db import Connection, describe
from worker.errors import SyncError
from worker.events import Unusable

BACKFILL: Final = "backfill"
FULL: Final = "full"
INCREMENTAL: Final = "incremental"

SEEN: Final = ("applied", "unchanged", "older", "tombstoned", "unusable")
"""The counters of which each user that a run has been through is in one."""

DRIFT: Final = ("missing", "outdated", "incomplete", "gone")
"""The counters of how users here differed from Clerk's: not here; older or different here; without a kind of metadata
that is to be kept; or gone at Clerk."""

OUTCOMES: Final = {"applied": "applied", "unchanged": "unchanged", "older": "older", "deleted": "tombstoned"}
"""The counters of the gate's outcomes."""

MOST_LISTED: Final = 100
"""How many unusable users a run names."""

REASON_LENGTH: Final = 500

KEPT_DAYS: Final = 30

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Run:
    """One run, a row of clerk.runs. `counters` are numbers of users by what became of them (SEEN) and of what else was
    found; `covers` is Clerk's clock in ms, `calls` how many were made to Clerk's API, `unusable` the first users that
    couldn't be used."""

    id: int
    kind: str
    cause: str
    state: str
    started_at: datetime
    finished_at: datetime | None = None
    covers: int | None = None
    cursor: dict[str, Any] | None = None
    counters: Counter[str] = field(default_factory=Counter)
    unusable: list[dict[str, Any]] = field(default_factory=list)
    calls: int = 0
    error: str | None = None

    @property
    def users(self) -> int:
        """How many users it has been through."""
        return sum(self.counters[name] for name in SEEN)

    @property
    def found(self) -> int:
        """How many users differed from Clerk's."""
        return sum(self.counters[name] for name in DRIFT)

    @property
    def drift(self) -> str:
        """The users that differed, by how: `3 missing, 1 gone`. Empty where nobody did."""
        return ", ".join(f"{self.counters[name]:,} {name}" for name in DRIFT if self.counters[name])

    def count(self, outcomes: Iterable[str]) -> None:
        """Count users by the gate's outcomes."""
        self.counters.update(OUTCOMES[outcome] for outcome in outcomes)

    def note(self, unusable: Unusable) -> None:
        """Count a user that can't be used, and name the first ones."""
        self.counters["unusable"] += 1
        if len(self.unusable) < MOST_LISTED:
            self.unusable.append({"user_id": unusable.user_id, "reason": unusable.reason})


def _run(row: dict[str, Any]) -> Run:
    return Run(**{**row, "counters": Counter(row["counters"])})


# clerk.run_is_under_way looks for the same numbers.
LOCK = """
select pg_try_advisory_lock(1668048242, 1)
"""

UNLOCK = """
select pg_advisory_unlock(1668048242, 1)
"""

# Whoever holds the lock knows that no other run is under way.
CUT_SHORT = """
update clerk.runs set state = 'failed', finished_at = now(), error = 'cut short: its process or its connection ended'
where state = 'running'
"""


@contextlib.contextmanager
def alone(connection: Connection) -> Iterator[None]:
    """Keep other runs out for as long as the block and the connection last. The run must write over this connection
    alone: who has lost the lock can't write either. Raises AlreadyRunning."""
    if connection.execute(LOCK).fetchone() != (True,):
        raise AlreadyRunning(_running(connection))
    try:
        connection.execute(CUT_SHORT)
        yield
    finally:
        with contextlib.suppress(psycopg.Error):
            if connection.execute(UNLOCK).fetchone() != (True,):
                logger.error(
                    "the lock of this run was another session's: a pooler before Postgres must not share connections"
                )


class AlreadyRunning(SyncError):
    """Another run pulls from Clerk just now."""


RUNNING = """
select kind, id, started_at, counters from clerk.runs
where state = 'running'
order by id desc
limit 1
"""


def _running(connection: Connection) -> str:
    row = connection.execute(RUNNING).fetchone()
    if row is None:
        return "another run is just starting, or waits for Clerk's API: try again in a few minutes"
    kind, run_id, started_at, counters = row
    name = kind if kind == BACKFILL else f"{kind} reconcile"
    since = started_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    users = sum(counters.get(counter, 0) for counter in SEEN)
    return f"another {name} is running: run {run_id}, since {since}, {users:,} users so far"


LATEST = """
select id, kind, cause, state, started_at, finished_at, covers, cursor, counters, unusable, calls, error
from clerk.runs
where kind = %(kind)s and (state = 'done' or not %(done)s)
order by id desc
limit 1
"""


def latest(connection: Connection, kind: str, *, done: bool = False) -> Run | None:
    """The last run of a kind; the last one that is `done`."""
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(LATEST, {"kind": kind, "done": done}).fetchone()
    return None if row is None else _run(row)


COVERED = """
select max(covers) from clerk.runs
where state = 'done' and covers <= extract(epoch from now()) * 1000
"""


def covered(connection: Connection) -> int | None:
    """Every user updated before this moment of Clerk's clock (ms) was compared; None where no run was ever whole."""
    ((covers,),) = connection.execute(COVERED).fetchall()
    return None if covers is None else int(covers)


# What began or ended after now was dated by a clock that was set back since: it counts for nothing.
# A day begins at 3 in the morning, UTC.
DAILY_DUE = """
select not exists (
  select from clerk.runs
  where kind = 'full' and state = 'done'
    and started_at between date_bin('1 day', now(), timestamptz '2000-01-01 03:00:00+00') and now()
)
"""


def daily_due(connection: Connection) -> bool:
    """Whether today's full reconcile is still to be done."""
    return connection.execute(DAILY_DUE).fetchone() == (True,)


OVERDUE = """
select not clerk.run_is_under_way() and not exists (
  select from clerk.runs
  where greatest(started_at, finished_at) between now() - make_interval(secs => %(seconds)s) and now()
)
"""


def overdue(connection: Connection, seconds: float) -> bool:
    """Whether no run is under way, and none began or ended for so long."""
    return connection.execute(OVERDUE, {"seconds": seconds}).fetchone() == (True,)


SURPLUS = """
select (counters->>'surplus')::bigint from clerk.runs
where state = 'done' and kind in ('backfill', 'full') and counters ? 'surplus'
order by id desc
limit 1
"""


def surplus(connection: Connection) -> int:
    """By how many users Clerk's count was above ours when all users had been compared: those that can't be used, or
    have a tombstone here."""
    row = connection.execute(SURPLUS).fetchone()
    return 0 if row is None else int(row[0])


# Where users come and go faster than webhooks arrive, the counts always differ a little.
TOO_SOON = """
select coalesce(bool_or(
  finished_at - started_at > interval '10 seconds' and now() - finished_at < 10 * (finished_at - started_at)
), false)
from (select started_at, finished_at from clerk.runs where kind = 'full' order by id desc limit 1) as last
"""


def too_soon(connection: Connection) -> bool:
    """Whether the last full run was so long, and is so short ago, that another one should wait."""
    return connection.execute(TOO_SOON).fetchone() == (True,)


BEGIN = """
insert into clerk.runs (kind, cause) values (%(kind)s, %(cause)s)
returning id, started_at
"""

# Old runs go; the last ones of each kind that were whole stay, however old.
PRUNE = """
delete from clerk.runs as old
where started_at < now() - make_interval(days => %(days)s)
  and exists (select from clerk.runs where kind = old.kind and id > old.id and state = 'done')
"""


def begin(connection: Connection, kind: str, cause: str) -> Run:
    """A new run, at the beginning."""
    connection.execute(PRUNE, {"days": KEPT_DAYS})
    ((run_id, started_at),) = connection.execute(BEGIN, {"kind": kind, "cause": cause}).fetchall()
    return Run(run_id, kind, cause, "running", started_at)


GO_ON = """
update clerk.runs set state = 'running', finished_at = null, error = null
where id = %(id)s
"""


def go_on(connection: Connection, run: Run) -> None:
    """Continue a run that was cut short."""
    run.state, run.finished_at, run.error = "running", None, None
    connection.execute(GO_ON, {"id": run.id})


SAVE = """
update clerk.runs set
  kind = %(kind)s, cause = %(cause)s, state = %(state)s, covers = %(covers)s, cursor = %(cursor)s,
  counters = %(counters)s, unusable = %(unusable)s, calls = %(calls)s,
  finished_at = case when %(state)s = 'done' then now() end
where id = %(id)s
returning finished_at
"""


def save(connection: Connection, run: Run) -> None:
    """Save how far a run came, in the transaction of what it did."""
    ((run.finished_at,),) = connection.execute(
        SAVE,
        {
            "id": run.id,
            "kind": run.kind,
            "cause": run.cause,
            "state": run.state,
            "covers": run.covers,
            "cursor": None if run.cursor is None else Jsonb(run.cursor),
            "counters": Jsonb(run.counters),  # zeros too: no surplus is one
            "unusable": Jsonb(run.unusable),
            "calls": run.calls,
        },
    ).fetchall()


FAIL = """
update clerk.runs set state = 'failed', finished_at = now(), error = %(error)s, calls = %(calls)s
where id = %(id)s and state = 'running'
"""


def fail(connection: Connection, run: Run, error: str) -> None:
    """Record that a run was cut short; what it saved stays."""
    run.error = error[:REASON_LENGTH]
    connection.execute(FAIL, {"id": run.id, "error": run.error, "calls": run.calls})


@contextlib.contextmanager
def recorded(connection: Connection, run: Run, calls: Callable[[], int]) -> Iterator[None]:
    """Record whatever ends the block but its end as the failure of a run; `calls` tells how many were made by then."""
    try:
        yield
    except BaseException as error:
        run.state, run.calls = "failed", calls()
        with contextlib.suppress(psycopg.Error):
            fail(connection, run, reason(error))
        raise


def reason(error: BaseException) -> str:
    """Why a run failed, without anything that could quote data."""
    if isinstance(error, psycopg.Error):
        return f"Postgres failed: {describe(error)}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) if isinstance(error, SyncError) else type(error).__name__


# Failures before a run could begin, one after the other, are one row.
FAILED = """
with again as (
  update clerk.runs set finished_at = now(), error = %(error)s
  where id = (select max(id) from clerk.runs) and state = 'failed' and kind = %(kind)s and cause = 'periodic'
    and calls = 0 and counters = '{}'
  returning id
)
insert into clerk.runs (kind, cause, state, finished_at, error)
select %(kind)s, 'periodic', 'failed', now(), %(error)s
where not exists (select from again)
"""


def record_failure(connection: Connection, kind: str, error: str) -> None:
    """Record that a periodic run couldn't even begin."""
    connection.execute(FAILED, {"kind": kind, "error": error[:REASON_LENGTH]})


@dataclass(frozen=True, slots=True)
class Overview:
    """How the runs of one kind stand: the last one, whether it is `running` now, whether it is `made_up` for by a full
    one since, and the last one that was `done`; all `at` this moment of the database's clock."""

    last: Run
    running: bool
    made_up: bool
    done: Run | None
    at: datetime

    @property
    def state(self) -> str:
        """That of the last one: running, done or failed; cut short where its process or its connection ended."""
        return "cut short" if self.last.state == "running" and not self.running else self.last.state

    @property
    def failed(self) -> bool:
        """Whether the last one came to no end, and nothing has made up for it."""
        return self.state in ("failed", "cut short") and not self.made_up


OVERVIEW = """
select
  id, kind, cause, state, started_at, finished_at, covers, cursor, counters, unusable, calls, error,
  state = 'running' and clerk.run_is_under_way() as running,
  exists (select from clerk.runs where kind = 'full' and state = 'done' and id > last.id) as made_up,
  now() as at
from (select distinct on (kind) * from clerk.runs order by kind, id desc) as last
order by id desc
"""


def overview(connection: Connection) -> list[Overview]:
    """How the runs of each kind stand, the latest first."""
    with connection.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(OVERVIEW).fetchall()
    found = []
    for row in rows:
        running, made_up, at, last = row.pop("running"), row.pop("made_up"), row.pop("at"), _run(row)
        done = last if last.state == "done" else latest(connection, last.kind, done=True)
        found.append(Overview(last, running, made_up, done, at))
    return found


CALLS = """
select coalesce(sum(calls), 0) from clerk.runs where started_at > now() - %(length)s
"""


def calls(connection: Connection, length: timedelta) -> int:
    """How many calls to Clerk's API the runs took that began in this time before now."""
    ((number,),) = connection.execute(CALLS, {"length": length}).fetchall()
    return int(number)
