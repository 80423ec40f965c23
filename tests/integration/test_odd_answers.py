"""Odd answers of Clerk's and odd clocks: short lists and look-ups, lags, dates; none erases or hides anybody."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from tests.integration.test_reconcile import POLICY, pages_of, run
from tests.pulling import deliver, webhook
from worker import clerk_api, db, runs, sweep
from worker import reconcile as reconciling
from worker.clerk import look_up_beside
from worker.clerk_api import ClerkApi
from worker.db import Connection
from worker.errors import SyncError
from worker.refresh import refresh_users
from worker.standin import Call, Problem, StandIn, now_ms

Connect = Callable[[], Connection]


def ids(connection: Connection) -> set[str]:
    return {i for (i,) in connection.execute("select user_id from clerk.users where deleted_at is null")}


def test_a_surplus_that_is_gone_is_forgotten(
    connection: Connection, api: ClerkApi, clerk: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages_of(20, monkeypatch)
    named = clerk.fill(60)
    body = clerk.users[named[7]]
    clerk.odd(named[7], b'{"id":"%s","updated_at":"never"}' % named[7].encode())
    assert run(connection, api).kind == "full"
    assert runs.surplus(connection) == 1
    clerk.odd(named[7], body)
    second = run(connection, api, full=True)
    assert second.counters["missing"] == 1
    assert second.counters["surplus"] == 0
    assert runs.surplus(connection) == 0
    assert run(connection, api).kind == "incremental"


def test_a_deletion_missed_while_a_full_run_ends_is_found_by_the_next_run(
    connection: Connection, api: ClerkApi, clerk: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages_of(20, monkeypatch)
    named = clerk.fill(60)
    run(connection, api)
    counts = 0

    def before(call: Call) -> None:
        nonlocal counts
        counts += call.path.endswith("/count")
        if counts == 2 and named[3] in clerk.users:
            clerk.delete(named[3])

    clerk.before = before
    run(connection, api, full=True)
    clerk.before = None
    run(connection, api)
    assert named[3] not in ids(connection)


def test_a_full_run_that_saw_too_few_is_not_done(
    connection: Connection, api: ClerkApi, clerk: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list ends at 93 %."""
    pages_of(20, monkeypatch)
    clerk.fill(500)
    real = clerk._page

    def page(listing: Any) -> list[bytes]:
        found = real(listing)
        if listing.order == "created_at":
            last = sorted(clerk._users.by_id.values(), key=lambda u: (u.created_at, u.user_id))[470:]
            cut = {user.body for user in last}
            found = [body for body in found if body not in cut]
        return found

    monkeypatch.setattr(clerk, "_page", page)
    with pytest.raises(SyncError, match="Clerk counts 500 users, and its list ends after 470"):
        run(connection, api)
    with pytest.raises(SyncError):
        run(connection, api)
    assert "erased" not in str(connection.execute("select array_agg(counters) from clerk.runs").fetchall())


def test_a_short_look_up_erases_nobody(
    connection: Connection, api: ClerkApi, clerk: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list lacks 40 users of 400, and the look-up by ids answers with ten users only."""
    pages_of(20, monkeypatch)
    named = clerk.fill(400)
    run(connection, api)
    real = clerk._page
    hidden = set(named[100:140])
    clerk._users.sorted["created_at"] = [key for key in clerk._users.sorted["created_at"] if key[1] not in hidden]
    monkeypatch.setattr(clerk, "_page", lambda asked: real(asked)[:10] if asked.filters.only else real(asked))
    with pytest.raises(SyncError, match="isn't whole"):
        run(connection, api, full=True)
    assert ids(connection) == set(named)


def test_nobody_is_erased_where_clerk_counts_more_than_it_lists(
    connection: Connection, api: ClerkApi, clerk: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = clerk.fill(2000)
    run(connection, api)
    hidden = set(named[100:125])
    real = clerk._page
    clerk._users.sorted["created_at"] = [key for key in clerk._users.sorted["created_at"] if key[1] not in hidden]
    monkeypatch.setattr(
        clerk,
        "_page",
        lambda asked: [b for b in real(asked) if not asked.filters.only or json.loads(b)["id"] not in hidden],
    )
    with pytest.raises(SyncError, match="nobody was erased"):
        run(connection, api, full=True)
    assert ids(connection) == set(named)


@pytest.mark.parametrize("shown", [1, 4, 10])
def test_a_short_answer_tells_of_nobody_that_they_are_gone(
    api: ClerkApi, clerk: StandIn, monkeypatch: pytest.MonkeyPatch, shown: int
) -> None:
    named = clerk.fill(60)
    real = clerk._page
    monkeypatch.setattr(clerk, "_page", lambda asked: real(asked)[:shown])
    with pytest.raises(SyncError, match="nobody was erased"):
        look_up_beside(api, named[20:], named[:20])


def test_refresh_erases_nobody_who_appears_a_moment_later(
    connection: Connection, api: ClerkApi, clerk: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    clerk.fill(5)
    run(connection, api)
    clerk.put({"id": "user_new"})
    deliver(connection, webhook(clerk, "user_new"))
    real = clerk._page
    monkeypatch.setattr(clerk, "_page", lambda listing: [b for b in real(listing) if json.loads(b)["id"] != "user_new"])

    def appear(_: float) -> None:
        monkeypatch.setattr(clerk, "_page", real)

    (results,) = refresh_users(connection, POLICY, api, ["user_new"], sleep=appear)
    assert [result.outcome for result in results] == ["unchanged"]
    assert "user_new" in ids(connection)


def test_refresh_leaves_no_tombstone_of_whom_neither_side_knows(
    connection: Connection, api: ClerkApi, clerk: StandIn
) -> None:
    clerk.fill(5)
    run(connection, api)
    (results,) = refresh_users(connection, POLICY, api, ["user_new"])
    assert [result.outcome for result in results] == ["unknown"]
    clerk.put({"id": "user_new"})
    deliver(connection, webhook(clerk, "user_new"))
    assert "user_new" in ids(connection)


def test_somebody_updated_a_moment_ago_is_not_erased_where_clerks_clocks_differ(
    connection: Connection, api: ClerkApi, clerk: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of updates is 5 s behind that of the answers; the list comes to know of a user 1 s late."""
    named = clerk.fill(5)
    run(connection, api)
    deliver(connection, webhook(clerk, named[0]))
    clerk.put({"id": "user_new", "created_at": now_ms() - 5000, "updated_at": now_ms() - 5000})
    deliver(connection, webhook(clerk, "user_new"))
    lag = True

    def sleep(seconds: float) -> None:
        nonlocal lag
        lag = False

    real = clerk._page
    monkeypatch.setattr(
        clerk, "_page", lambda listing: [b for b in real(listing) if not lag or json.loads(b)["id"] != "user_new"]
    )
    run(connection, api, full=True, sleep=sleep)
    assert "user_new" in ids(connection)


def test_kinds_that_a_newer_partial_event_lacked_are_filled_by_a_full_run(
    connection: Connection, api: ClerkApi, clerk: StandIn
) -> None:
    """An event without updated_at counts from its envelope's time, which is after Clerk's updated_at."""
    at = now_ms() - 100_000
    clerk.put({"id": "user_a", "created_at": at, "updated_at": at, "private_metadata": {"a": 1}})
    clerk.put({"id": "user_b", "created_at": at, "updated_at": at, "private_metadata": {"a": 1}})
    deliver(
        connection,
        json.dumps(
            {
                "type": "user.updated",
                "object": "event",
                "timestamp": at + 15,
                "data": {"id": "user_a", "object": "user"},
            }
        ).encode(),
    )
    run(connection, api, full=True)
    rows = dict(connection.execute("select user_id, private_metadata from clerk.user_metadata").fetchall())
    assert rows == {"user_a": {"a": 1}, "user_b": {"a": 1}}


def test_a_clock_set_back_does_not_stop_runs(connection: Connection, api: ClerkApi, clerk: StandIn) -> None:
    clerk.fill(3)
    run(connection, api)
    connection.execute(
        "update clerk.runs set started_at = now() + interval '1 day', finished_at = now() + interval '1 day'"
    )
    assert runs.overdue(connection, 60)


def test_covers_is_that_of_the_first_page(
    connection: Connection, api: ClerkApi, clerk: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:

    pages_of(20, monkeypatch)
    clerk.fill(60)
    real = sweep.read
    pages = 0

    def read(*args: Any) -> Iterator[sweep.Batch]:
        nonlocal pages
        for batch in real(*args):
            pages += 1
            yield replace(batch, read_at=None if pages == 1 else 10**12 + pages)

    monkeypatch.setattr(reconciling, "read", read)
    assert run(connection, api).covers is None


def test_one_date_of_the_future_does_not_end_incremental_runs_early(
    connection: Connection, api: ClerkApi, clerk: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages_of(20, monkeypatch)

    monkeypatch.setattr(reconciling, "OVERLAP", 2)
    monkeypatch.setattr(reconciling, "ENOUGH", 18)
    named = clerk.fill(200)

    real = clerk_api._read_at
    monkeypatch.setattr(clerk_api, "_read_at", lambda _: 4_000_000_000_000)
    run(connection, api)
    monkeypatch.setattr(clerk_api, "_read_at", real)
    lost = named[50]
    clerk.update(lost, private_metadata={"lost": True})
    for user_id in named[60:120]:
        clerk.update(user_id, private_metadata={"x": 1})
        deliver(connection, webhook(clerk, user_id))
    run(connection, api)
    row = connection.execute("select private_metadata from clerk.user_metadata where user_id = %s", [lost]).fetchone()
    assert row == ({"lost": True},)


def test_a_password_that_is_not_encoded_is_not_told() -> None:

    with pytest.raises(psycopg.Error) as found:
        db.connect("postgresql://me:top%zzsecret@127.0.0.1:1/x", "test")
    assert "secret" not in db.describe(found.value)


@pytest.mark.parametrize("status", [400, 410])
def test_a_lost_cursor_may_be_any_error(
    connection: Connection, api: ClerkApi, clerk: StandIn, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    pages_of(20, monkeypatch)
    named = clerk.fill(60)

    real = clerk._page

    def page(listing: Any) -> list[bytes]:
        if listing.starting_after and listing.starting_after not in clerk.users:
            raise Problem(status, "gone", "gone", "gone")
        return real(listing)

    monkeypatch.setattr(clerk, "_page", page)
    clerk.before = lambda call: (
        clerk.delete(named[18]) if "starting_after" in call.query and named[18] in clerk.users else None
    )
    done = run(connection, api)
    assert done.state == "done"
