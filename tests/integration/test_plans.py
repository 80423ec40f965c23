"""What the hot statements read of large tables, by Postgres's own count, once it has settled on its plans.

One that begins to read a whole table, or all that is pending, is as right as before and a thousand times slower.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import pytest

from bench import population
from tests.conftest import EMPTY
from worker import db, inbox, local, minutes, users
from worker.db import Connection
from worker.events import UserDeleted
from worker.inbox import Incoming
from worker.policy import Policy

USERS: Final = 20_000
GONE: Final = 4_000
PENDING: Final = 10_000
DONE: Final = 10_000
DEAD: Final = 50
CHANGED: Final = 600
"""Fewer than the transactions that a new cluster has counted: later ones would be another server's."""
POLICY: Final = Policy()
LATER: Final = population.MADE_AT + 1
SPREAD: Final = 140
"""Users of one batch are seldom of one page."""
SETTLED: Final = 7
"""After five times with plans for the parameters it may choose one for any."""

EVENTS = """
insert into clerk.webhook_events (svix_id, sent_at, received_at, type, user_id, version, state, processed_at, body)
select
  state || number, now(), now() - make_interval(secs => number), 'user.updated', 'user_' || state || number, 1, state,
  case when state = 'done' then now() - make_interval(secs => number) end,
  case when state <> 'done' then '{}'::bytea end
from (values ('pending', %(pending)s::int), ('done', %(done)s), ('dead', %(dead)s)) as states (state, count),
  generate_series(1, count) as number
order by random()
"""
MISSING = "update clerk.users set content_missing = true where user_id = any(%s)"
OVER = "update clerk.users set over_budget = user_id = any(%s)"
PUT = "update clerk.users set weighed_by = null, claims_exact = false where user_id = any(%s)"
CHANGES = """
insert into clerk.changes (changed_in, user_id, changed_at)
select number::text::xid8, 'user_' || number, now() - make_interval(secs => %(changes)s - number)
from generate_series(1, %(changes)s) as number
"""
PUT_USER = json.dumps({"id": population.user_id(700), "updated_at": LATER, "private_metadata": {"put": True}})
# The last twenty.
SINCE = "select * from clerk.changes_since(regexp_replace(clerk.change_cursor(), '[0-9]+$', %s))"


def of(first: int, count: int) -> list[str]:
    return [population.user_id(number) for number in range(first, first + count)]


@pytest.fixture(scope="module")
def filled(servers: local.Urls) -> Iterator[Connection]:
    """Large tables, and a connection that prepares every statement."""
    with db.connect(servers.database, "test") as connection:
        population.populate_ours(connection, USERS)
        connection.execute(EVENTS, {"pending": 0, "done": DONE, "dead": DEAD})
        gone = [UserDeleted(user_id, LATER) for user_id in of(USERS - GONE, GONE)]
        users.gate_deletions(connection, gone)
        connection.execute(MISSING, [of(500, 20)])
        connection.execute(OVER, [of(600, 20)])
        connection.execute(PUT, [of(800, 20)])
        connection.execute("delete from clerk.changes")
        connection.execute(CHANGES, {"changes": CHANGED})
        users.record_policy(connection, POLICY)
        connection.execute("vacuum (analyze, freeze) clerk.users, clerk.user_contents, clerk.webhook_events")
        # Statistics are mostly taken while nothing is pending, and then comes a burst.
        connection.execute(EVENTS, {"pending": PENDING, "done": 0, "dead": 0})
        connection.prepare_threshold = 0
        yield connection
        connection.execute(EMPTY, prepare=False)


COUNTERS = """
select relname, (coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::int, n_tup_upd::int, n_tup_hot_upd::int
from pg_stat_xact_user_tables
where schemaname = 'clerk'
"""


def counters(connection: Connection) -> dict[str, Counter[str]]:
    """By table: rows read, updated, and of these updated without touching an index; of this session's latest past."""
    return {
        table: Counter(read=read, updated=updated, hot=hot)
        for table, read, updated, hot in connection.execute(COUNTERS)
    }


def during(connection: Connection, action: Callable[[Connection], object]) -> dict[str, Counter[str]]:
    """What an action, which is undone, adds to these; after the times that Postgres takes to choose a plan for good."""
    for _ in range(SETTLED):
        with connection.transaction(force_rollback=True):
            action(connection)
    with connection.transaction(force_rollback=True):
        before = counters(connection)
        action(connection)
        return {table: counted - before.get(table, Counter()) for table, counted in counters(connection).items()}


def deliveries(count: int, start: int = 0) -> list[Incoming]:
    return [
        Incoming(f"pending{start + number}", datetime.now(UTC), b"{}", "user.updated", f"user_{number}", 1)
        for number in range(count)
    ]


def changed(count: int, turn: int) -> list[Any]:
    return [population.user(number, LATER, turn) for number in range(1000, 1000 + SPREAD * count, SPREAD)]


def weighed(count: int, turn: int) -> list[users.Change]:
    return [users.weigh(POLICY, user) for user in changed(count, turn)]


# What each may read of each table: a few times what it is given, where a table has ten or twenty thousand.
HOT: Final[dict[str, tuple[Callable[[Connection], object], dict[str, int]]]] = {
    "recording a single delivery": (lambda c: inbox.record(c, deliveries(1, PENDING + 1)), {"webhook_events": 3}),
    "recording a burst, half of it duplicates": (
        lambda c: inbox.record(c, deliveries(16, PENDING - 7)),
        {"webhook_events": 48},
    ),
    "claiming": (lambda c: inbox.claim(c, 100), {"webhook_events": 300}),
    "putting back": (
        lambda c: inbox.put_back(c, [inbox.Claimed(f"done{number}", b"{}", 0) for number in range(1, 11)]),
        {"webhook_events": 30},
    ),
    "setting aside": (
        lambda c: inbox.set_aside(
            c,
            [inbox.Claimed(f"done{number}", b"{}", 0) for number in range(1, 11)],
            {f"done{number}": "reason" for number in range(1, 11)},
        ),
        {"webhook_events": 30, "users": 30},
    ),
    "who is sent as before": (lambda c: users.known(c, POLICY, changed(100, 0)), {"users": 100}),
    "passing them the short way": (lambda c: users.gate_known(c, POLICY, changed(100, 0)), {"users": 200}),
    "passing changed users": (
        lambda c: users.gate_users(c, POLICY, weighed(100, 1)),
        {"users": 300, "user_contents": 300},
    ),
    "passing unchanged users": (
        lambda c: users.gate_users(c, POLICY, weighed(100, 0)),
        {"users": 300, "user_contents": 100},
    ),
    "passing new users": (
        lambda c: users.gate_users(c, POLICY, [users.weigh(POLICY, population.user(USERS + 1, LATER, 0))]),
        {"users": 3, "user_contents": 3},
    ),
    "passing deletions": (
        lambda c: users.gate_deletions(c, [UserDeleted(user_id, LATER) for user_id in of(2000, 20)]),
        {"users": 60, "user_contents": 60, "webhook_events": 2 * DEAD},
    ),
    "comparing with Clerk": (
        lambda c: users.compare(c, POLICY, changed(100, 0)),
        {"users": 200, "user_contents": 100},
    ),
    "pruning": (lambda c: inbox.prune(c, timedelta(seconds=DONE - 50)), {"webhook_events": 160}),
    "forgetting what dead events of deleted users carry": (
        inbox.forget_deleted,
        {"users": 2 * DEAD, "webhook_events": 2 * DEAD},
    ),
    "counting a minute, of 60 events that came and as many that were done": (
        minutes.count,
        {"webhook_events": 4 * 2 * 60 + 2 * DEAD, "minutes": 10},
    ),
    "the latest that were set aside": (lambda c: inbox.set_aside_last(c, 20), {"webhook_events": 2 * DEAD}),
    "retrying one": (lambda c: inbox.retry(c, ["dead1"]), {"webhook_events": 2 * DEAD, "users": 1}),
    "the first users over the budget": (lambda c: users.over_budget(c, 10), {"users": 40}),
    "who is to be fetched again": (lambda c: users.missing(c, "", 100), {"users": 40}),
    "which of these are live": (lambda c: users.live(c, of(0, 50)), {"users": 100}),
    "the versions of these": (lambda c: users.versions(c, of(0, 50)), {"users": 100}),
    "putting a user": (
        lambda c: c.execute("select clerk.put_user(%s::jsonb)", (PUT_USER,)).fetchall(),
        {"users": 6, "user_contents": 3, "policy": 1},
    ),
    "who was put and not weighed": (lambda c: users.unweighed(c, 100), {"users": 40}),
    "who has changed since": (
        lambda c: c.execute(SINCE, (str(CHANGED - 20),)).fetchall(),
        {"users": 40, "changes": 40, "changes_pruned": 1},
    ),
    "pruning changes": (
        lambda c: users.prune_changes(c, timedelta(seconds=CHANGED - 20), 100),
        {"changes": 300, "changes_pruned": 1},
    ),
    "what an application reads": (
        lambda c: c.execute("select * from clerk.user_metadata where user_id = %s", of(700, 1)).fetchall(),
        {"users": 1, "user_contents": 1},
    ),
}


@pytest.mark.parametrize("statement", HOT)
def test_it_reads_no_more_than_it_is_asked_about(filled: Connection, statement: str) -> None:
    action, bounds = HOT[statement]
    read = {table: counted["read"] for table, counted in during(filled, action).items()}
    assert {table: rows for table, rows in read.items() if rows > bounds.get(table, 0)} == {}


LARGE = """
update pg_class set reltuples = 1e6 where oid in ('clerk.users'::regclass, 'clerk.webhook_events'::regclass)
"""


def test_counting_takes_large_tables_from_the_statistics(filled: Connection) -> None:
    """As if the tables were large: what stands in the catalog is what the statement goes by."""

    def count(connection: Connection) -> None:
        connection.execute(LARGE)
        assert inbox.counts(connection)["done"] == 1_000_000

    read = during(filled, count)
    assert read["users"]["read"] <= 2 * GONE + 40
    assert read["webhook_events"]["read"] <= PENDING + DEAD + 1, "who waits is counted, and the oldest is looked up"


def test_the_spread_of_a_large_table_is_that_of_a_sample(filled: Connection) -> None:
    """As if there were two million users, of whom one in forty is looked at."""

    def spread(connection: Connection) -> None:
        connection.execute("update pg_class set reltuples = 2e6 where oid = 'clerk.users'::regclass")
        found = users.spread(connection, 2401)
        assert found.sampled
        assert 0 < sum(found.users.values()) < USERS / 10

    assert during(filled, spread)["users"]["read"] < USERS / 10
    whole = users.spread(filled, 2401)
    assert (sum(whole.users.values()), whole.sampled) == (USERS - GONE, False)


@pytest.mark.parametrize("action", ["passing them the short way", "passing unchanged users", "passing changed users"])
def test_updating_users_touches_no_index(filled: Connection, action: str) -> None:
    counted = during(filled, HOT[action][0])["users"]
    assert counted["updated"] == counted["hot"] == 100


INDEXES = """
select indexrelname from pg_stat_user_indexes
where schemaname = 'clerk' and relname in ('users', 'user_contents', 'webhook_events', 'changes') and idx_scan = 0
"""


def test_every_index_of_the_large_tables_is_used_by_something(filled: Connection) -> None:
    for action, _ in HOT.values():
        during(filled, action)
    inbox.counts(filled)
    filled.execute("select pg_stat_force_next_flush()")
    assert filled.execute(INDEXES).fetchall() == []
