"""The inbox, `clerk.webhook_events`: record, claim, finish, set aside, retry, dismiss, prune, and look.

Every statement stands above the one function that runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from psycopg.rows import class_row, dict_row

from worker.db import Connection


@dataclass(frozen=True, slots=True)
class Incoming:
    """A verified delivery, ready to be recorded; `error` is set where it is dead on arrival."""

    svix_id: str
    sent_at: datetime
    body: bytes
    type: str | None
    user_id: str | None
    version: int | None
    error: str | None = None


# One statement, one commit, for all deliveries that wait at this moment, and this one table, so that whoever locks
# another holds up nobody. A delivery that is still pending is left as it is (a duplicate); one that was applied or set
# aside comes in again (a replay). Duplicates are left out before `on conflict` sees them: it would wait for a worker
# that holds them, and everybody else's delivery with it. A replay is taken from `new`, not from `excluded`: Postgres
# asks whoever reads a column of that for the privilege to read it in the table, and a receiver may not read bodies.
# Asked for the state itself, Postgres looks each id up; asked whether a pending row exists, it read all of them.
RECORD = """
with new as materialized (
  select
    svix_id, sent_at, type, user_id, version,
    case when error is null then 'pending' else 'dead' end as state,
    error,
    case when error is not null then now() end as processed_at,
    body
  from unnest(
    %(svix_id)b::text[], %(sent_at)b::timestamptz[], %(type)b::text[], %(user_id)b::text[], %(version)b::bigint[],
    %(error)b::text[], %(body)b::bytea[]
  ) as delivery (svix_id, sent_at, type, user_id, version, error, body)
)
insert into clerk.webhook_events as events
  (svix_id, sent_at, type, user_id, version, state, error, processed_at, body)
select svix_id, sent_at, type, user_id, version, state, error, processed_at, body
from new
where (
  select waiting.state from clerk.webhook_events as waiting where waiting.svix_id = new.svix_id
) is distinct from 'pending'
on conflict (svix_id) do update set
  (sent_at, type, user_id, version, state, error, processed_at, body) = (
    select sent_at, type, user_id, version, state, error, processed_at, body
    from new
    where new.svix_id = excluded.svix_id
  ),
  attempts = 0, received_at = now()
where events.state <> 'pending'
returning svix_id
"""


def record(connection: Connection, deliveries: Sequence[Incoming]) -> set[str]:
    """Commit deliveries (of distinct ids) to the inbox; returns the ids recorded: the others are still pending.

    The connection is in autocommit, so that this is one round trip and one commit. Raises psycopg.Error.
    """
    # In one order everywhere, so that two receivers with the same ids can't deadlock.
    ordered = sorted(deliveries, key=lambda delivery: delivery.svix_id)
    rows = connection.execute(
        RECORD,
        {
            "svix_id": [delivery.svix_id for delivery in ordered],
            "sent_at": [delivery.sent_at for delivery in ordered],
            "type": [delivery.type for delivery in ordered],
            "user_id": [delivery.user_id for delivery in ordered],
            "version": [delivery.version for delivery in ordered],
            "error": [delivery.error for delivery in ordered],
            "body": [delivery.body for delivery in ordered],
        },
    )
    return {svix_id for (svix_id,) in rows}


@dataclass(frozen=True, slots=True)
class Claimed:
    """A pending event that this transaction has claimed; `age` is the seconds from Svix's signature until then."""

    svix_id: str
    body: bytes
    age: float


# Claimed events are marked done at once: if the transaction ends otherwise, they never were. Rows locked by another
# worker are passed over. The second step keeps one batch's bodies within what a worker can hold in memory; the rows
# beyond are let go with the transaction. By ctid, since the rows are locked and theirs stays; and joined once more for
# the bodies, which otherwise each step would hand on, and the update itself no longer has.
CLAIM = """
with locked as materialized (
  select ctid as place, received_at, svix_id, octet_length(body) as size
  from clerk.webhook_events
  where state = 'pending'
  order by received_at
  limit %(most)s offset %(behind)s
  for update skip locked
),
sized as (
  select place, sum(size) over (order by received_at, svix_id) - size as before from locked
)
update clerk.webhook_events as events
set state = 'done', processed_at = clock_timestamp(), attempts = events.attempts + 1, error = null, body = null
from sized, clerk.webhook_events as claimed
where events.ctid = sized.place and claimed.ctid = sized.place and before < %(bytes)s
returning
  claimed.svix_id, claimed.body, greatest(extract(epoch from clock_timestamp() - claimed.sent_at), 0)::float8 as age
"""

CLAIM_BYTES: Final = 4 * 1024 * 1024


def claim(connection: Connection, most: int, behind: int = 0) -> list[Claimed]:
    """Mark up to `most` pending events done, oldest first but for those `behind` which others are to come.

    What isn't applied is to be put back or set aside, or the transaction to be undone.
    """
    with connection.cursor(row_factory=class_row(Claimed)) as cursor:
        return cursor.execute(CLAIM, {"most": most, "behind": behind, "bytes": CLAIM_BYTES}, binary=True).fetchall()


PUT_BACK = """
update clerk.webhook_events as events
set state = 'pending', processed_at = null, attempts = attempts - 1, body = claimed.body
from unnest(%(svix_ids)b::text[], %(bodies)b::bytea[]) as claimed (svix_id, body)
where events.svix_id = claimed.svix_id
"""


def put_back(connection: Connection, rows: Sequence[Claimed]) -> None:
    """Make claimed events pending again."""
    if rows:
        bodies = {"svix_ids": [row.svix_id for row in rows], "bodies": [row.body for row in rows]}
        connection.execute(PUT_BACK, bodies)


SET_ASIDE = """
update clerk.webhook_events as events
set
  state = 'dead', error = dead.reason,
  body = case when not exists (
    select from clerk.users where users.user_id = events.user_id and users.deleted_at is not null
  ) then dead.body end
from unnest(%(svix_ids)b::text[], %(reasons)b::text[], %(bodies)b::bytea[]) as dead (svix_id, reason, body)
where events.svix_id = dead.svix_id
"""


def set_aside(connection: Connection, rows: Sequence[Claimed], reasons: Mapping[str, str]) -> None:
    """Mark claimed events dead, each with the reason why it can never be applied; bodies are kept for a retry."""
    if rows:
        connection.execute(
            SET_ASIDE,
            {
                "svix_ids": [row.svix_id for row in rows],
                "reasons": [reasons[row.svix_id] for row in rows],
                "bodies": [row.body for row in rows],
            },
        )


# An event that is dead on arrival may come after its user was deleted, or at the very moment, neither seeing the other.
FORGET_DELETED = """
update clerk.webhook_events as events
set state = 'done', body = null, error = 'the user was deleted', processed_at = now()
where events.state = 'dead'
  and (select deleted_at from clerk.users where users.user_id = events.user_id) is not null -- joined, it reads them all
"""


def forget_deleted(connection: Connection) -> int:
    """Erase what dead events of deleted users still carry; returns how many there were."""
    return connection.execute(FORGET_DELETED).rowcount


# Those of deleted users have no bodies, or soon won't; a receiver, which retries from the status page, may not ask.
RETRY = """
update clerk.webhook_events as events
set state = 'pending', error = null, processed_at = null, received_at = now()
where state = 'dead' and (%(all)s or svix_id = any(%(svix_ids)s::text[]))
  and (select deleted_at from clerk.users where users.user_id = events.user_id) is null
returning svix_id
"""


def retry(connection: Connection, svix_ids: Sequence[str] | None) -> list[str]:
    """Make dead events pending again (None: all of them); returns the ids of those that were dead."""
    parameters = {"all": svix_ids is None, "svix_ids": list(svix_ids or ())}
    return [svix_id for (svix_id,) in connection.execute(RETRY, parameters)]


@dataclass(frozen=True, slots=True)
class Dead:
    """An event that was set aside, as the status page shows it."""

    svix_id: str
    type: str | None
    user_id: str | None
    attempts: int
    error: str
    received_at: datetime


SET_ASIDE_LAST = """
select svix_id, type, user_id, attempts, coalesce(error, '') as error, received_at
from clerk.webhook_events
where state = 'dead'
order by received_at desc
limit %(most)s
"""


def set_aside_last(connection: Connection, most: int) -> list[Dead]:
    """The latest events that are dead, newest first. Unlike `listed` it doesn't ask how large their bodies are."""
    with connection.cursor(row_factory=class_row(Dead)) as cursor:
        return cursor.execute(SET_ASIDE_LAST, {"most": most}).fetchall()


# The reason stays, for whoever looks back.
DISMISS = """
update clerk.webhook_events
set state = 'done', body = null, error = 'dismissed: ' || error, processed_at = now()
where state = 'dead' and (%(all)s or svix_id = any(%(svix_ids)s::text[]))
returning svix_id
"""


def dismiss(connection: Connection, svix_ids: Sequence[str] | None) -> list[str]:
    """Give dead events up (None: all of them) and erase their bodies; returns the ids of those that were dead."""
    parameters = {"all": svix_ids is None, "svix_ids": list(svix_ids or ())}
    return [svix_id for (svix_id,) in connection.execute(DISMISS, parameters)]


# In one statement, so that a step that takes too long is undone as a whole. By ctid, which costs a tenth of looking
# each row up again by its id; the rows are locked, so theirs stay. A row that another worker prunes is passed over.
PRUNE = """
delete from clerk.webhook_events
where ctid = any(array(
  select ctid from clerk.webhook_events
  where state = 'done' and processed_at < now() - %(keep)s
  limit %(most)s
  for update skip locked
))
"""
PRUNE_LIMIT = "select set_config('statement_timeout', %(ms)s::text, true)"

PRUNE_STEP: Final = 10_000
PRUNE_MS: Final = 2_000
"""A step takes some 50 ms. One that takes this long is given up, and a smaller one tried."""


def prune(connection: Connection, keep: timedelta, most: int = PRUNE_STEP) -> int:
    """Delete events that were done longer ago than `keep`, so many of them at most; returns how many."""
    with connection.transaction():
        connection.execute(PRUNE_LIMIT, {"ms": PRUNE_MS})
        return connection.execute(PRUNE, {"keep": keep, "most": most}).rowcount


@dataclass(frozen=True, slots=True)
class Listed:
    """An event as an operator sees it: never its body."""

    svix_id: str
    type: str | None
    user_id: str | None
    version: int | None
    state: str
    attempts: int
    error: str | None
    sent_at: datetime
    received_at: datetime
    processed_at: datetime | None
    body_bytes: int | None


LIST = """
select
  svix_id, type, user_id, version, state, attempts, error, sent_at, received_at, processed_at,
  octet_length(body) as body_bytes
from clerk.webhook_events
where (%(state)s::text is null or state = %(state)s) and (%(user_id)s::text is null or user_id = %(user_id)s)
order by received_at desc
limit %(most)s
"""


def listed(connection: Connection, *, state: str | None, user_id: str | None, most: int) -> list[Listed]:
    """The latest events, newest first; of one state or one user where given."""
    with connection.cursor(row_factory=class_row(Listed)) as cursor:
        return cursor.execute(LIST, {"state": state, "user_id": user_id, "most": most}).fetchall()


SHOW = """
select
  svix_id, type, user_id, version, state, attempts, error, sent_at, received_at, processed_at,
  octet_length(body) as body_bytes
from clerk.webhook_events
where svix_id = %(svix_id)s
"""


def show(connection: Connection, svix_id: str) -> Listed | None:
    """One event; None where there is none of this id."""
    with connection.cursor(row_factory=class_row(Listed)) as cursor:
        return cursor.execute(SHOW, {"svix_id": svix_id}).fetchone()


# Pending and dead events have indexes of their own and are counted. What is done, and the users, are counted while
# the tables are small, and taken from the planner's statistics when counting would cost more than it is worth.
COUNTS = """
select
  (select count(*) from clerk.webhook_events where state = 'pending') as pending,
  (select count(*) from clerk.webhook_events where state = 'dead') as dead,
  case when events.size < 100000 then (select count(*) from clerk.webhook_events where state = 'done')
    else events.size end::bigint as done,
  coalesce((
    select extract(epoch from now() - min(received_at)) from clerk.webhook_events where state = 'pending'
  ), 0)::float8 as oldest_pending_seconds,
  case when users.size < 100000 then (select count(*) from clerk.users where deleted_at is null)
    else users.size - (select count(*) from clerk.users where deleted_at is not null) end::bigint as users,
  (select count(*) from clerk.users where deleted_at is not null) as tombstones,
  (select count(*) from clerk.users where over_budget) as users_over_budget,
  (select count(*) from clerk.users where content_missing) as users_content_missing
from
  (select reltuples as size from pg_class where oid = 'clerk.webhook_events'::regclass) as events,
  (select reltuples as size from pg_class where oid = 'clerk.users'::regclass) as users
"""


def counts(connection: Connection) -> dict[str, Any]:
    """Events by state, the age of the oldest pending one in seconds, users, tombstones, users over the budget and
    those with metadata that only Clerk has."""
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(COUNTS).fetchone()
    assert row is not None  # noqa: S101 - an aggregate without grouping always has one row
    return row
