"""The users, `clerk.users` and what is copied of them: every event goes through the gate in the database,
`clerk.gate_users` and `clerk.gate_deletions`; `reweigh` decides again, under the same locks, without an event."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, NamedTuple

import msgspec
from psycopg.rows import namedtuple_row

from worker.claims import Fields, Weighed, Weights, render, weigh_user
from worker.db import Connection
from worker.events import UserChanged, UserDeleted, profiled
from worker.measure import FRAME, Range, contributions, measure, measure_kept
from worker.policy import Decision, Policy, decide

BLAMED: Final = 3
REWEIGH_BATCH: Final = 1000

_PLAIN: Final = re.compile(r"(?!.*[0-9]{4})[a-z_]+(?:\.[A-Za-z_][A-Za-z0-9_-]{0,39}){0,3}(?: \([a-z ]+\))?")
"""Field names that a log may carry: a user chooses those of unsafe metadata, and an address or a number can be one."""

_fields = msgspec.json.Decoder(dict[str, int])

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Crossing:
    """A user whose claims went over the budget, with the names of what weighs most in them, heaviest first."""

    user_id: str
    claims_bytes: int
    heaviest: tuple[str, ...]


@dataclass(slots=True)
class Gated:
    """What the gate did: applied, unchanged, older or deleted for each change, the last of them for each user, and who
    crossed the budget."""

    outcomes: list[str] = field(default_factory=list)
    by_user: dict[str, str] = field(default_factory=dict)
    crossings: list[Crossing] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Change:
    """A user on the way to the gate: weighed, with what is to be copied of them."""

    user: UserChanged
    weights: Weights
    claims_bytes: int
    decision: Decision


def weigh(policy: Policy, user: UserChanged) -> Change:
    """Weigh one user and decide what is copied. Pure."""
    user = profiled(user)
    weights = weigh_user(user)
    claims_bytes = len(render(policy.template, user, policy.assumed))
    known = user.public_metadata is not None and user.unsafe_metadata is not None
    return Change(user, weights, claims_bytes, decide(policy, claims_bytes if known else None))


KNOWN = """
select users.user_id
from unnest(%(user_id)b::text[], %(version)b::bigint[], %(sent_hash)b::bytea[]) as event (user_id, version, sent_hash)
join clerk.users on users.user_id = event.user_id
where users.sent_hash = event.sent_hash and users.version < event.version and users.weighed_by = %(weighed_by)s
"""


def known(connection: Connection, policy: Policy, changed: Sequence[UserChanged]) -> set[str]:
    """Those of these users of whom the very same was sent before, as far as can be told without locking them."""
    rows = connection.execute(
        KNOWN,
        {
            "user_id": [user.user_id for user in changed],
            "version": [user.version for user in changed],
            "sent_hash": [user.sent_hash for user in changed],
            "weighed_by": policy.fingerprint,
        },
    )
    return {user_id for (user_id,) in rows}


GATE_KNOWN = """
select * from clerk.gate_known(
  %(user_id)b::text[], %(version)b::bigint[], %(event_at)b::bigint[], %(sent_hash)b::bytea[], %(weighed_by)s::bigint
)
"""


def gate_known(connection: Connection, policy: Policy, changed: Sequence[UserChanged]) -> set[str]:
    """Pass users of whom the very same was sent before; returns the ids of those who have passed, with the outcome
    unchanged. Waits for no lock: whoever is changed by somebody else at this moment hasn't passed."""
    rows = connection.execute(
        GATE_KNOWN,
        {
            "user_id": [user.user_id for user in changed],
            "version": [user.version for user in changed],
            "event_at": [user.event_at for user in changed],
            "sent_hash": [user.sent_hash for user in changed],
            "weighed_by": policy.fingerprint,
        },
    )
    return {user_id for (user_id,) in rows}


GATE_USERS = """
select user_id, outcome, crossed, unweighed from clerk.gate_users(
  %(user_id)b::text[], %(version)b::bigint[], %(event_at)b::bigint[],
  %(private)b::text[]::jsonb[], %(public)b::text[]::jsonb[], %(unsafe)b::text[]::jsonb[],
  %(copy_private)b::bool[], %(copy_public)b::bool[], %(copy_unsafe)b::bool[],
  %(profile_bytes)b::text[], %(public_bytes)b::int[], %(unsafe_bytes)b::int[],
  %(public_fields)b::text[]::jsonb[], %(unsafe_fields)b::text[]::jsonb[],
  %(claims_bytes)b::int[], %(sent_hash)b::bytea[], %(budget)s::int, %(weighed_by)s::bigint
)
"""


def gate_users(connection: Connection, policy: Policy, changes: Iterable[Change]) -> Gated:
    """Pass users through the gate; they were weighed by the same policy.

    Several changes of one user pass one after the other, in the order given. Raises psycopg.DataError where a value
    can't be held; then, within a transaction, none of them has passed.
    """
    gated = Gated()
    rest = list(changes)
    while rest:
        # The gate takes a user once: what is left of users with several changes goes in the next round.
        first = {change.user.user_id: change for change in reversed(rest)}
        rest = [change for change in rest if first[change.user.user_id] is not change]
        unweighed = []
        for user_id, outcome, crossed, partial in connection.execute(GATE_USERS, _rows(policy, first.values())):
            gated.outcomes.append(outcome)
            gated.by_user[user_id] = outcome
            if crossed:
                gated.crossings.append(_crossing(policy, first[user_id].weights, first[user_id].claims_bytes))
            if partial:
                unweighed.append(user_id)
        if unweighed:
            # What these events brought stays even where the token carries it now: in another order it would have.
            gated.crossings += reweigh(connection, policy, unweighed, drop=False).crossings
    return gated


def _rows(policy: Policy, changes: Iterable[Change]) -> dict[str, Any]:
    batch = list(changes)
    users = [change.user for change in batch]
    return {
        "user_id": [user.user_id for user in users],
        "version": [user.version for user in users],
        "event_at": [user.event_at for user in users],
        "private": [_text(user.private_metadata) for user in users],
        "public": [_text(user.public_metadata) for user in users],
        "unsafe": [_text(user.unsafe_metadata) for user in users],
        "copy_private": [change.decision.private for change in batch],
        "copy_public": [change.decision.public for change in batch],
        "copy_unsafe": [change.decision.unsafe for change in batch],
        "profile_bytes": [_array(change.weights.profile) for change in batch],
        "public_bytes": [change.weights.public.total for change in batch],
        "unsafe_bytes": [change.weights.unsafe.total for change in batch],
        "public_fields": [_sizes(change.weights.public) for change in batch],
        "unsafe_fields": [_sizes(change.weights.unsafe) for change in batch],
        "claims_bytes": [change.claims_bytes for change in batch],
        "sent_hash": [user.sent_hash for user in users],
        "budget": policy.budget,
        "weighed_by": policy.fingerprint,
    }


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()


def _array(sizes: tuple[int, ...] | None) -> str | None:
    return None if sizes is None else "{" + ",".join(map(str, sizes)) + "}"


def _sizes(kind: Fields) -> str:
    return msgspec.json.encode(kind.by_name).decode()


def warn(crossings: Iterable[Crossing], budget: int) -> None:
    """Log who went over the budget; to be called after the commit."""
    for crossing in crossings:
        logger.warning(
            "a user's claims went over the session token's budget",
            extra={
                "user_id": crossing.user_id,
                "claims_bytes": crossing.claims_bytes,
                "budget": budget,
                "heaviest": " ".join(name if _PLAIN.fullmatch(name) else "(odd name)" for name in crossing.heaviest),
            },
        )


def _crossing(policy: Policy, weights: Weights, claims_bytes: int) -> Crossing:
    parts = contributions(policy.template, weights, policy.assumed)
    names = sorted((name for name in parts if name != FRAME), key=lambda name: (-parts[name], name))
    return Crossing(weights.user_id, claims_bytes, tuple(names[:BLAMED]))


GATE_DELETIONS = """
select outcome from clerk.gate_deletions(%(user_id)b::text[], %(event_at)b::bigint[])
"""


def gate_deletions(connection: Connection, deletions: Sequence[UserDeleted]) -> list[str]:
    """Leave tombstones and erase what is kept of these users (each once); the outcomes are deleted or unchanged."""
    if not deletions:
        return []
    rows = connection.execute(
        GATE_DELETIONS,
        {
            "user_id": [deletion.user_id for deletion in deletions],
            "event_at": [deletion.event_at for deletion in deletions],
        },
    )
    return [outcome for (outcome,) in rows]


@dataclass(frozen=True, slots=True)
class Erased:
    """What was kept of a user before they were erased by hand; `pending` events are erased when they are drained."""

    was_deleted: bool
    user: bool
    kinds: tuple[str, ...]
    dead_bodies: int
    pending: int


KEPT_OF = """
select
  coalesce(bool_or(users.deleted_at is not null), false),
  coalesce(bool_or(users.deleted_at is null), false),
  coalesce(array_remove(
    array[
      case when bool_or(private_metadata is not null) then 'private_metadata' end,
      case when bool_or(public_metadata is not null) then 'public_metadata' end,
      case when bool_or(unsafe_metadata is not null) then 'unsafe_metadata' end
    ], null), '{}'),
  (select count(*) from clerk.webhook_events where user_id = %(user_id)s and state = 'dead' and body is not null),
  (select count(*) from clerk.webhook_events where user_id = %(user_id)s and state = 'pending'),
  (extract(epoch from now()) * 1000)::bigint
from clerk.users left join clerk.user_contents using (user_id)
where user_id = %(user_id)s
"""


def erase(connection: Connection, user_id: str) -> Erased:
    """Erase one user as `user.deleted` would, dated by the database's clock. Raises psycopg.Error."""
    with connection.transaction():
        connection.execute(LOCK, {"user_id": [user_id]})
        found = connection.execute(KEPT_OF, {"user_id": user_id}).fetchone()
        was_deleted, user, kinds, dead_bodies, pending, now = found or (False, False, [], 0, 0, 0)
        gate_deletions(connection, [UserDeleted(user_id, now)])
    return Erased(was_deleted, user, tuple(kinds), dead_bodies, pending)


# --- Deciding again


@dataclass(slots=True)
class Reweighed:
    """How many users were weighed again; of them how many are over the budget now, of how many there is a copy that
    isn't wanted any more (`droppable`, erased where `dropped`), and of how many a kind is to be kept that only Clerk
    has."""

    users: int = 0
    over: int = 0
    droppable: int = 0
    dropped: int = 0
    missing: int = 0
    crossings: list[Crossing] = field(default_factory=list)


# Nobody writes a content without this lock, so what the next statement reads stays.
LOCK = """
select from clerk.users
where user_id = any(%(user_id)s)
order by user_id collate "C"
for no key update
"""

KEPT = """
select
  user_id, version, profile_bytes, public_bytes, unsafe_bytes,
  public_fields::text, unsafe_fields::text,
  claims_bytes, claims_exact and weighed_by is not distinct from %(fingerprint)s as weighed,
  private_metadata is not null as has_private,
  public_metadata is not null as has_public,
  unsafe_metadata is not null as has_unsafe
from clerk.users left join clerk.user_contents using (user_id)
where user_id = any(%(user_id)s) and deleted_at is null
"""

REWEIGH = """
update clerk.users as old set
  claims_bytes = new.claims_bytes,
  claims_exact = new.exact,
  weighed_by = %(weighed_by)s,
  over_budget = new.claims_bytes > %(budget)s,
  crossed = new.claims_bytes > %(budget)s and not old.over_budget,
  private_copied = new.private, public_copied = new.public, unsafe_copied = new.unsafe,
  content_missing = new.missing,
  sent_hash = null -- the next event decides anew, whatever it brings
from unnest(
  %(user_id)b::text[], %(claims_bytes)b::int[], %(exact)b::bool[],
  %(private)b::bool[], %(public)b::bool[], %(unsafe)b::bool[], %(missing)b::bool[]
) as new (user_id, claims_bytes, exact, private, public, unsafe, missing)
where old.user_id = new.user_id
returning old.user_id, old.over_budget, old.crossed
"""

DROP = """
with dropped as (
  update clerk.user_contents as old set
    private_metadata = case when new.private then old.private_metadata end,
    public_metadata = case when new.public then old.public_metadata end,
    unsafe_metadata = case when new.unsafe then old.unsafe_metadata end,
    public_hash = case when not new.public then coalesce(hashtext(old.public_metadata::text), old.public_hash) end,
    unsafe_hash = case when not new.unsafe then coalesce(hashtext(old.unsafe_metadata::text), old.unsafe_hash) end,
    public_hashes =
      case when not new.public then coalesce(clerk.field_hashes(old.public_metadata), old.public_hashes) end,
    unsafe_hashes =
      case when not new.unsafe then coalesce(clerk.field_hashes(old.unsafe_metadata), old.unsafe_hashes) end
  from unnest(%(user_id)b::text[], %(private)b::bool[], %(public)b::bool[], %(unsafe)b::bool[])
    as new (user_id, private, public, unsafe)
  where old.user_id = new.user_id
  returning old.user_id
)
insert into clerk.changes (user_id) select user_id from dropped
"""


def reweigh(connection: Connection, policy: Policy, user_ids: Sequence[str], *, drop: bool) -> Reweighed:
    """Weigh users by what is kept of them and decide anew what is copied, in one transaction.

    Where the sizes only give bounds, JSON that is kept tells; where there is none, the upper bound counts. With
    `drop`, copies that aren't wanted any more are erased.
    """
    with connection.transaction():
        connection.execute(LOCK, {"user_id": list(user_ids)})
        with connection.cursor(row_factory=namedtuple_row) as cursor:
            rows = cursor.execute(KEPT, {"user_id": list(user_ids), "fingerprint": policy.fingerprint}).fetchall()
        weighed = [(row, *_weigh_again(connection, policy, row)) for row in rows]
        return _decide_again(connection, policy, weighed, drop=drop)


def _weigh_again(connection: Connection, policy: Policy, row: Any) -> tuple[Weights, Range]:
    weights = _weights(row[:7])
    if row.weighed:
        return weights, Range(row.claims_bytes, row.claims_bytes)
    bounds = measure(policy.template, weights, policy.assumed)
    if bounds.low != bounds.high and (row.has_public or row.has_unsafe):
        bounds = exactly(connection, policy, weights)
    return weights, bounds


def _decide_again(
    connection: Connection, policy: Policy, weighed: Sequence[tuple[Any, Weights, Range]], *, drop: bool
) -> Reweighed:
    result = Reweighed(users=len(weighed))
    columns: dict[str, list[Any]] = {
        name: [] for name in ("user_id", "claims_bytes", "exact", "private", "public", "unsafe", "missing")
    }
    unwanted = []
    for row, _, (low, claims_bytes) in weighed:
        wanted = decide(policy, claims_bytes)
        pairs = (
            (wanted.private, row.has_private),
            (wanted.public, row.has_public),
            (wanted.unsafe, row.has_unsafe),
        )
        missing = any(want and not has for want, has in pairs)
        for name, value in zip(
            columns,
            (
                *(row.user_id, claims_bytes, low == claims_bytes),
                *(has and (want or not drop) for want, has in pairs),
                missing,
            ),
            strict=True,
        ):
            columns[name].append(value)
        unwanted.append(any(has and not want for want, has in pairs))
        result.missing += missing
    result.droppable = sum(unwanted)
    weights = {row.user_id: (kept, bounds.high) for row, kept, bounds in weighed}
    updated = connection.execute(
        REWEIGH, {**columns, "budget": policy.budget, "weighed_by": policy.fingerprint}
    ).fetchall()
    for user_id, over, crossed in updated:
        result.over += over
        if crossed:
            result.crossings.append(_crossing(policy, *weights[user_id]))
    if drop and result.droppable:
        result.dropped = result.droppable
        some = {
            name: [value for value, gone in zip(columns[name], unwanted, strict=True) if gone]
            for name in ("user_id", "private", "public", "unsafe")
        }
        connection.execute(DROP, some)
    return result


STALE = """
select user_id from clerk.users
where deleted_at is null and (%(all)s or weighed_by is distinct from %(fingerprint)s) and user_id > %(after)s
order by user_id
limit %(most)s
"""


def reweigh_all(
    connection: Connection,
    policy: Policy,
    observe: Callable[[Reweighed], None] = lambda _: None,
    *,
    drop: bool = False,
) -> Reweighed:
    """Weigh again every user that another policy weighed, a thousand to a transaction; a run that was cut short
    leaves the rest to the next one. With `drop`, everybody, and copies that aren't wanted any more are erased.

    `observe` is called with each batch. Raises psycopg.Error.
    """
    total = Reweighed()
    after = ""
    while True:
        stale = {"all": drop, "fingerprint": policy.fingerprint, "after": after, "most": REWEIGH_BATCH}
        user_ids = [user_id for (user_id,) in connection.execute(STALE, stale)]
        if not user_ids:
            return total
        batch = reweigh(connection, policy, user_ids, drop=drop)
        total.users += batch.users
        total.over += batch.over
        total.droppable += batch.droppable
        total.dropped += batch.dropped
        total.missing += batch.missing
        observe(batch)
        after = user_ids[-1]


# --- The log of changes

# By the index: the earliest ones, of which those that are past their time go. Cursors from before are of no use then.
PRUNE_CHANGES = """
with gone as (
  delete from clerk.changes
  where ctid = any(array(
    select ctid
    from (select ctid, changed_at from clerk.changes order by changed_in limit %(most)s for update skip locked) as first
    where changed_at < now() - %(keep)s
  ))
  returning changed_in
),
pruned as (
  update clerk.changes_pruned
  set until = greatest(until, (select changed_in from gone order by changed_in desc limit 1))
  where exists (select from gone)
)
select count(*) from gone
"""


def prune_changes(connection: Connection, keep: timedelta, most: int) -> int:
    """Delete changes that are older than `keep`, so many of them at most; returns how many."""
    ((gone,),) = connection.execute(PRUNE_CHANGES, {"keep": keep, "most": most}).fetchall()
    return int(gone)


# --- Users whom an application has put

RECORD_POLICY = """
insert into clerk.policy as old (copy_private, copy_public, copy_unsafe)
values (%(private)s, %(public)s, %(unsafe)s)
on conflict (the_only) do update set
  copy_private = excluded.copy_private, copy_public = excluded.copy_public, copy_unsafe = excluded.copy_unsafe
where (old.copy_private, old.copy_public, old.copy_unsafe)
  <> (excluded.copy_private, excluded.copy_public, excluded.copy_unsafe)
"""


def record_policy(connection: Connection, policy: Policy) -> None:
    """Tell `clerk.put_user` which kinds to copy of a user who hasn't been weighed. Raises psycopg.Error."""
    kept = decide(policy, None)
    connection.execute(RECORD_POLICY, {"private": kept.private, "public": kept.public, "unsafe": kept.unsafe})


# Whom somebody holds has their turn later: an application may hold users for long, and nobody is to wait for those who
# wait for it.
UNWEIGHED = """
select user_id from clerk.users
where weighed_by is null and not claims_exact and deleted_at is null
order by user_id
limit %(most)s
for no key update skip locked
"""


def unweighed(connection: Connection, most: int) -> list[str]:
    """Lock some of the users whom `clerk.put_user` brought and nobody has weighed."""
    return [user_id for (user_id,) in connection.execute(UNWEIGHED, {"most": most})]


def weigh_put(connection: Connection, policy: Policy) -> bool:
    """Weigh up to a thousand users whom `clerk.put_user` brought, and drop what isn't to be copied of them, as an event
    of theirs would have; says whether there may be more. Raises psycopg.Error."""
    with connection.transaction():
        user_ids = unweighed(connection, REWEIGH_BATCH)
        if not user_ids:
            return False
        crossings = reweigh(connection, policy, user_ids, drop=True).crossings
    warn(crossings, policy.budget)
    return len(user_ids) == REWEIGH_BATCH


class Counted(NamedTuple):
    """Live users; how many of them another policy weighed than the one asked about; and of how many a kind of
    metadata is to be kept that only Clerk has."""

    users: int
    stale: int
    missing: int


COUNT = """
select
  count(*),
  count(*) filter (where weighed_by is distinct from %(fingerprint)s),
  count(*) filter (where content_missing)
from clerk.users
where deleted_at is null
"""


def count(connection: Connection, fingerprint: int) -> Counted:
    """Count the live users, and those whom the policy of this fingerprint didn't weigh."""
    row = connection.execute(COUNT, {"fingerprint": fingerprint}).fetchone()
    return Counted(*(row or (0, 0, 0)))


MISSING = """
select user_id from clerk.users
where content_missing and user_id > %(after)s
order by user_id
limit %(most)s
"""


def missing(connection: Connection, after: str, most: int) -> list[str]:
    """The next users of whom a kind of metadata is to be kept that only Clerk has; the first ones after ""."""
    return [user_id for (user_id,) in connection.execute(MISSING, {"after": after, "most": most})]


COUNT_MISSING = """
select count(*) from clerk.users where content_missing
"""


def count_missing(connection: Connection) -> int:
    """How many they are."""
    ((number,),) = connection.execute(COUNT_MISSING).fetchall()
    return int(number)


SOME = """
select user_id from clerk.users
where deleted_at is null and user_id like 'user\\_%%'
limit %(most)s
"""


def some(connection: Connection, most: int) -> list[str]:
    """Some live users."""
    return [user_id for (user_id,) in connection.execute(SOME, {"most": most})]


# Live ones: nobody is to be asked about who is gone.
HEARD_OF = """
select distinct user_id from (
  select user_id from clerk.webhook_events join clerk.users using (user_id)
  where state = 'done' and deleted_at is null and user_id like 'user\\_%%'
  limit %(most)s
) as heard_of
"""


def heard_of(connection: Connection, most: int) -> list[str]:
    """Some live users of whom webhooks told."""
    return [user_id for (user_id,) in connection.execute(HEARD_OF, {"most": most})]


VERSIONS = """
select user_id, case when deleted_at is null then version else 0 end
from clerk.users where user_id = any(%(user_id)s)
"""


def versions(connection: Connection, user_ids: Sequence[str]) -> dict[str, int]:
    """The versions of those of these users who are here; 0 for a tombstone."""
    return dict(connection.execute(VERSIONS, {"user_id": list(user_ids)}).fetchall())


# There are fewer tombstones than users, and they have an index. Whom `check` makes up is not counted: Clerk has no such
# user.
COUNT_LIVE = """
select
  (select count(*) from clerk.users where not starts_with(user_id, 'user_clerk_sync_check_'))
  - (select count(*) from clerk.users
     where deleted_at is not null and not starts_with(user_id, 'user_clerk_sync_check_'))
"""


def count_live(connection: Connection) -> int:
    """How many live users there are, exactly."""
    ((number,),) = connection.execute(COUNT_LIVE).fetchall()
    return int(number)


COUNT_GONE = """
select count(*) from clerk.users where deleted_at is not null
"""


def count_gone(connection: Connection) -> int:
    """How many tombstones there are."""
    ((number,),) = connection.execute(COUNT_GONE).fetchall()
    return int(number)


LIVE = """
select user_id from clerk.users where user_id = any(%(user_id)s) and deleted_at is null
"""


def live(connection: Connection, user_ids: Sequence[str]) -> list[str]:
    """Those of these users who are live here."""
    return [user_id for (user_id,) in connection.execute(LIVE, {"user_id": list(user_ids)})]


# --- Comparing with what Clerk has

COMPARE = """
select user_id, difference from clerk.compare_users(
  %(user_id)b::text[], %(version)b::bigint[],
  %(private)b::text[]::jsonb[], %(public)b::text[]::jsonb[], %(unsafe)b::text[]::jsonb[], %(weighed_by)s::bigint
)
"""


def compare(connection: Connection, policy: Policy, changed: Sequence[UserChanged]) -> dict[str, str]:
    """How users stand here, by id: missing, tombstoned, newer, outdated, incomplete, unweighed or same.

    Writes nothing. Raises psycopg.DataError where a value can't be held.
    """
    rows = connection.execute(
        COMPARE,
        {
            "user_id": [user.user_id for user in changed],
            "version": [user.version for user in changed],
            "private": [_text(user.private_metadata) for user in changed],
            "public": [_text(user.public_metadata) for user in changed],
            "unsafe": [_text(user.unsafe_metadata) for user in changed],
            "weighed_by": policy.fingerprint,
        },
    )
    return dict(rows.fetchall())


# --- Reading the weights

# Copied out, so that Postgres works ahead of us.
POPULATION = """
copy (
  select
    user_id, version, profile_bytes, public_bytes, unsafe_bytes,
    public_fields::text, unsafe_fields::text,
    claims_bytes, weighed_by is not distinct from %(fingerprint)s, claims_exact
  from clerk.users
  where deleted_at is null
) to stdout
"""

POPULATION_TYPES: Final = (
    *("text", "int8", "int4[]", "int4", "int4", "text", "text"),
    *("int4", "bool", "bool"),
)

NO_LIMIT = "set local statement_timeout = 0"  # of one statement that lasts as long as its reader takes


def population(connection: Connection, fingerprint: int) -> Generator[Weighed, None, None]:
    """Every live user with their weights, streamed from one snapshot; `current` where the policy of this fingerprint
    weighed them. To be closed before the connection where it isn't read to its end. Raises psycopg.Error."""
    with connection.transaction(), connection.cursor() as cursor:
        cursor.execute(NO_LIMIT)
        with cursor.copy(POPULATION, {"fingerprint": fingerprint}) as copy:
            copy.set_types(POPULATION_TYPES)
            for *sizes, claims_bytes, current, exact in copy.rows():
                yield Weighed(_weights(sizes), claims_bytes, current, exact)


class Spread(NamedTuple):
    """How many live users' claims weigh how many bytes; `sampled` where there are so many users that a share of them
    was looked at."""

    users: dict[int, int]
    sampled: bool


USERS_COUNTED: Final = 100_000
USERS_SAMPLED: Final = 50_000

ABOUT = """
select greatest(reltuples, 0)::float8 from pg_class where oid = 'clerk.users'::regclass
"""

# Whole pages of the table, at random: a tenth of a second, however many there are.
SPREAD = """
select least(claims_bytes, %(most_bytes)s), count(*)
from clerk.users tablesample system (%(percent)s)
where deleted_at is null
group by 1
"""


def spread(connection: Connection, most_bytes: int) -> Spread:
    """How the claims of the live users weigh, by the settings that the workers had. Over `most_bytes` all are alike."""
    ((about,),) = connection.execute(ABOUT).fetchall()
    sampled = about > USERS_COUNTED
    percent = 100 * USERS_SAMPLED / about if sampled else 100.0
    rows = connection.execute(SPREAD, {"most_bytes": most_bytes, "percent": percent}).fetchall()
    return Spread({int(weight): int(count) for weight, count in rows}, sampled)


class Heavy(NamedTuple):
    """A user over the budget."""

    user_id: str
    claims_bytes: int


OVER_BUDGET = """
select user_id, claims_bytes from clerk.users where over_budget order by user_id limit %(most)s
"""


def over_budget(connection: Connection, most: int) -> list[Heavy]:
    """The first users over the budget, by id: there is no order by weight without reading them all."""
    return [Heavy(*row) for row in connection.execute(OVER_BUDGET, {"most": most})]


def _weights(row: Sequence[Any]) -> Weights:
    user_id, version, profile_bytes, public_bytes, unsafe_bytes, public_fields, unsafe_fields = row
    return Weights(
        user_id,
        version,
        None if profile_bytes is None else tuple(profile_bytes),
        _fields_of(public_bytes, public_fields),
        _fields_of(unsafe_bytes, unsafe_fields),
    )


def _fields_of(total: int, sizes: str | None) -> Fields:
    return Fields(total, {}, named=False) if sizes is None else Fields(total, _fields.decode(sizes))


CONTENTS = """
select public_metadata::text, unsafe_metadata::text from clerk.user_contents where user_id = %(user_id)s
"""


def exactly(connection: Connection, policy: Policy, weights: Weights) -> Range:
    """What a user's claims weigh by their sizes and whatever JSON is kept of them."""
    public, unsafe = connection.execute(CONTENTS, {"user_id": weights.user_id}).fetchone() or (None, None)
    return measure_kept(
        policy.template,
        weights,
        policy.assumed,
        public=None if public is None else public.encode(),
        unsafe=None if unsafe is None else unsafe.encode(),
    )
