"""The use case: drain the inbox into the users, in batches, each one transaction.

A worker that is killed anywhere leaves its batch pending and the users as they were.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

import psycopg

from worker import inbox, users
from worker.db import ROWS_FAULT, Connection, deadline, describe
from worker.events import Ignored, Unusable, UserChanged, UserDeleted, profiled, read_event
from worker.policy import Policy

log = logging.getLogger(__name__)

BATCH: Final = 500

BATCH_SECONDS: Final = 15.0
"""A batch that takes longer has lost its Postgres, or takes on too much: its connection is cut and made anew."""

STATEMENT_MS: Final = 12_000
LOCK_MS: Final = 5_000
"""How long a statement of a batch may take, and wait for a lock."""

HELD_MS: Final = 200
"""How long a batch waits for a lock after a failure, as batches begin with one event: others have waited enough."""

CLAIM_SECONDS: Final = 5.0
"""The same of a claim, which waits for nobody: a connection that has gone silent is noticed by it."""


@dataclass(slots=True)
class Batch:
    """What one transaction did, in events; `freshness` is the seconds from Svix's signature to visible, of each. Those
    that were `left` are pending still; `asked` is how many it would have taken, `full` whether there may be more."""

    asked: int = BATCH
    claimed: int = 0
    left: int = 0
    full: bool = False
    outcomes: Counter[str] = field(default_factory=Counter)
    dead: dict[str, str] = field(default_factory=dict)
    freshness: list[float] = field(default_factory=list)
    replaced: int = 0
    crossings: list[users.Crossing] = field(default_factory=list)
    seconds: float = 0.0


def drain(
    connection: Connection,
    policy: Policy,
    *,
    batch: int = BATCH,
    behind: int = 0,
    observe: Callable[[Batch], None] = lambda _: None,
    go_on: Callable[[Batch], bool] = lambda batch: batch.claimed + batch.left > 0,
) -> int:
    """Apply everything that is pending, until a claim finds nothing; returns the number of events claimed.

    The first batch is of at most `batch` events, and each one that is done allows twice as many, up to BATCH.
    The `behind` oldest ones are left out, and are to have their turn again after BATCH_SECONDS.
    `observe` is called with each batch after its commit, and then `go_on` says whether there is to be another.
    Raises psycopg.Error where Postgres can't do it now: nothing is lost, and the caller tries again later.
    """
    total = 0
    wait = False
    until = time.monotonic() + BATCH_SECONDS if behind else float("inf")
    while time.monotonic() < until:
        done = drain_batch(connection, policy, batch, behind, wait=wait)
        if done.claimed + done.left:
            total += done.claimed
            wait = bool(done.left)
            batch = min(batch * 2, max(batch, BATCH))
            users.warn(done.crossings, policy.budget)
            observe(done)
        if not go_on(done):
            break
    return total


LOCK_LIMIT = "select set_config('lock_timeout', %(ms)s::text, true)"


def drain_batch(
    connection: Connection, policy: Policy, batch: int = BATCH, behind: int = 0, *, wait: bool = False
) -> Batch:
    """Claim, decide, and pass the gate, in one transaction.

    Most events are sign-ins, which bring nothing new: those take a short way, unless `wait`. It waits for no lock;
    where it would have to, the event is put back, as `left` counts, and is to take the long way next.
    """
    started = time.perf_counter()
    result = Batch(batch)
    with deadline(connection, BATCH_SECONDS), connection.transaction():
        # After a failure a claim has more time: where much of the inbox's index is dead, it may need that.
        with deadline(connection, CLAIM_SECONDS if batch >= BATCH else BATCH_SECONDS):
            rows = inbox.claim(connection, batch, behind)
        claimed = time.perf_counter()
        if not rows:
            return result
        if batch < BATCH:
            connection.execute(LOCK_LIMIT, {"ms": HELD_MS})
        events: Events = defaultdict(list)
        for row in rows:
            match read_event(row.body):
                case Unusable(reason=reason):
                    result.dead[row.svix_id] = reason
                case _, (UserChanged() | UserDeleted()) as event:
                    events[event.user_id].append((row.svix_id, event))
                case _, Ignored():
                    pass  # only a changed setting leads here: the receiver records none of these
        latest = {user_id: newest([event for _, event in events[user_id]]) for user_id in sorted(events)}
        same = {} if wait else _same(connection, policy, latest)
        _apply(connection, policy, {user_id: events[user_id] for user_id in latest if user_id not in same}, result)
        left = same.keys() - users.gate_known(connection, policy, list(same.values())) if same else set()
        passed = same.keys() - left
        result.outcomes["unchanged"] += len(passed)
        result.outcomes["superseded"] += sum(len(events[user_id]) - 1 for user_id in passed)
        ids_left = {svix_id for user_id in left for svix_id, _ in events[user_id]}
        inbox.put_back(connection, [row for row in rows if row.svix_id in ids_left])
        inbox.set_aside(connection, [row for row in rows if row.svix_id in result.dead], result.dead)
    now = time.perf_counter()
    result.claimed, result.left = len(rows) - len(ids_left), len(ids_left)
    result.full = len(rows) == batch or sum(len(row.body) for row in rows) >= inbox.CLAIM_BYTES
    result.replaced = sum(
        event.replaced
        for user_id, those in events.items()
        if user_id not in left
        for _, event in those
        if isinstance(event, UserChanged)
    )
    gone = result.dead.keys() | ids_left
    result.freshness = [row.age + now - claimed for row in rows if row.svix_id not in gone]
    result.seconds = now - started
    return result


Events = dict[str, list[tuple[str, UserChanged | UserDeleted]]]


def _same(
    connection: Connection, policy: Policy, latest: Mapping[str, Sequence[UserChanged | UserDeleted]]
) -> dict[str, UserChanged]:
    """The users whose only event brings what was sent before."""
    single = {}
    for user_id, (event, *others) in latest.items():
        if not others and isinstance(event, UserChanged) and event.sent_hash:
            single[user_id] = event
    known = users.known(connection, policy, list(single.values())) if single else set()
    return {user_id: event for user_id, event in single.items() if user_id in known}


def _apply(connection: Connection, policy: Policy, events: Events, result: Batch) -> None:
    """Pass users through the gate, all at once; where one of them can't be, each by itself, and that one set aside."""
    if not events:
        return
    try:
        with connection.transaction():
            passed = _pass(connection, policy, events)
        _count(result, passed)
    except Exception as error:
        reason = _fault(error)
        if reason is None:
            raise
        log.warning("a batch holds an event that can't be applied", extra={"error": reason})
    else:
        return
    for user_id, those in events.items():
        for svix_id, event in those:
            try:
                with connection.transaction():
                    passed = _pass(connection, policy, {user_id: [(svix_id, event)]})
                _count(result, passed)
            except Exception as error:
                reason = _fault(error)
                if reason is None:
                    raise
                result.dead[svix_id] = reason


def _fault(error: Exception) -> str | None:
    """Why an event can't be applied, where that is its own fault; None where Postgres can't do it just now.

    An error of our own code counts as the event's: else everybody would wait for the one that we didn't think of.
    """
    if isinstance(error, ROWS_FAULT):
        return f"Postgres refuses it: {describe(error)}"
    if isinstance(error, psycopg.Error | MemoryError):
        return None
    log.error("an event can't be applied for an error that nobody thought of", exc_info=error)
    return f"clerk-sync fails on it: {type(error).__name__}"


def _count(result: Batch, passed: tuple[Counter[str], list[users.Crossing]]) -> None:
    outcomes, crossings = passed
    result.outcomes += outcomes
    result.crossings += crossings


def _pass(connection: Connection, policy: Policy, events: Events) -> tuple[Counter[str], list[users.Crossing]]:
    """Pass users and deletions through the gate in one order, that of the ids' bytes, in which the gate takes them
    too: so no two workers wait for one another."""
    outcomes: Counter[str] = Counter()
    crossings: list[users.Crossing] = []
    kept: list[UserChanged | UserDeleted] = []
    for user_id in sorted(events):
        group = newest([event for _, event in events[user_id]])
        outcomes["superseded"] += len(events[user_id]) - len(group)
        kept += group
    for kind, run in groupby(kept, type):
        if kind is UserDeleted:
            deletions = [event for event in run if isinstance(event, UserDeleted)]
            outcomes.update(users.gate_deletions(connection, deletions))
        else:
            changes = [users.weigh(policy, event) for event in run if isinstance(event, UserChanged)]
            gated = users.gate_users(connection, policy, changes)
            outcomes.update(gated.outcomes)
            crossings += gated.crossings
    return outcomes, crossings


def newest(events: Sequence[UserChanged | UserDeleted]) -> list[UserChanged | UserDeleted]:
    """Reduce one user's events to those that can still matter: the earliest deletion alone where there is one,
    otherwise the newest whole user and whatever is not older than it."""
    if len(events) == 1:
        return list(events)
    deletions = [event for event in events if isinstance(event, UserDeleted)]
    if deletions:
        return [min(deletions, key=lambda deletion: deletion.event_at)]
    changes = [event for event in events if isinstance(event, UserChanged)]
    latest = max(((user.version, user.event_at) for user in changes if user.whole), default=(-1, -1))
    # The same metadata with another profile is not the same.
    newest_ones = [user for user in changes if (user.version, user.event_at) >= latest]
    return list({(user, user.sent_hash, user.profile): user for user in map(profiled, newest_ones)}.values())
