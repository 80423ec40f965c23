"""Change notices, after each commit that changed what a user has; and clerk.changes_since, for whoever was away."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import EMPTY
from tests.events import ABSENT, changed, deleted
from tests.integration.test_gate import deliver
from worker import local, schema, users
from worker.db import Connection
from worker.policy import Copy, Policy

Connect = Callable[[], Connection]

EVERYTHING: Final = Policy(Copy.ALWAYS, Copy.ALWAYS, Copy.ALWAYS)
BIG: Final = "x" * 1300


@pytest.fixture
def listener(connect: Connect) -> Connection:
    connection = connect()
    connection.execute("listen clerk_user_changed")
    return connection


def heard(listener: Connection) -> list[dict[str, Any]]:
    """What was sent by now. Notices come in the order of the commits, so one of our own is the end."""
    listener.execute("notify clerk_user_changed, 'the end'")
    found: list[dict[str, Any]] = []
    for notice in listener.notifies(timeout=30):
        if notice.payload == "the end":
            return found
        found.append(json.loads(notice.payload))
    raise AssertionError("a notice of one's own doesn't come")


# --- Notices


def test_a_new_user_a_change_and_a_deletion_are_told_with_names_and_no_values(
    connection: Connection, listener: Connection
) -> None:
    deliver(connection, changed(version=1, private={"plan": "pro", "n": 1}, public={"role": "admin"}))
    deliver(connection, changed(version=2, private={"plan": "team", "n": 1}, public={"role": "member"}))
    deliver(connection, changed(version=3, private={"n": 1}, public={"role": "member"}, unsafe={"theme": None}))
    deliver(connection, deleted(timestamp=1_700_000_000_000))
    assert heard(listener) == [
        {
            "user_id": "user_a",
            "version": 1,
            "deleted": False,
            "changed": {"private_metadata": ["n", "plan"], "public_metadata": ["role"]},
        },
        {
            "user_id": "user_a",
            "version": 2,
            "deleted": False,
            "changed": {"private_metadata": ["plan"], "public_metadata": ["role"]},
        },
        {
            "user_id": "user_a",
            "version": 3,
            "deleted": False,
            "changed": {"private_metadata": ["plan"], "unsafe_metadata": ["theme"]},
        },
        {"user_id": "user_a", "version": 1_700_000_000_000, "deleted": True, "changed": {}},
    ]


def test_what_changed_nothing_is_not_told(connection: Connection, listener: Connection) -> None:
    deliver(connection, changed(version=5, private={"a": 1}, public={"b": 1}))
    assert len(heard(listener)) == 1
    deliver(connection, changed(version=6, private={"a": 1}, public={"b": 1}))  # a sign-in
    deliver(connection, changed(version=4, private={"a": 0}))  # late
    deliver(connection, changed(version=6, private={"a": 1}, public={"b": 1}))  # again
    deliver(connection, changed(version=7, private={"a": 1}, public={"b": 1}), policy=EVERYTHING)  # more is copied
    deliver(connection, changed(version=7, private={"a": 1}, public={"b": 1}))  # and not any more
    users.reweigh(connection, EVERYTHING, ["user_a"], drop=False)
    deliver(connection, deleted("user_unheard_of"))
    assert heard(listener) == []
    deliver(connection, deleted())
    deliver(connection, deleted())
    assert [notice["deleted"] for notice in heard(listener)] == [True]


def test_a_user_without_any_metadata_is_told_of_as_new(connection: Connection, listener: Connection) -> None:
    deliver(connection, changed())
    assert [notice["changed"] for notice in heard(listener)] == [{}]


def test_a_kind_is_compared_whether_or_not_it_is_copied(connection: Connection, listener: Connection) -> None:
    """It comes and goes with the size; the names of what changed are the same."""
    deliver(connection, changed(version=1, public={"a": 1, "b": 1}))
    deliver(connection, changed(version=2, public={"a": 2, "b": 1, "c": BIG}))
    deliver(connection, changed(version=3, public={"a": 2, "b": 2, "c": BIG}))
    deliver(connection, changed(version=4, public={"a": 3, "b": 2}))
    deliver(connection, changed(version=5, public={"a": 3, "b": 3.0}))
    deliver(connection, changed(version=6, public={"a": 3, "b": 3}))
    told = [notice["changed"]["public_metadata"] for notice in heard(listener)]
    assert told == [["a", "b"], ["a", "c"], ["b"], ["a", "c"], ["b"], ["b"]]
    # Dropped by a later decision, and compared all the same.
    deliver(connection, changed(version=7, public={"a": 3, "b": 3, "c": BIG}))
    users.reweigh(connection, Policy(public=Copy.NEVER), ["user_a"], drop=True)
    assert connection.execute("select public_metadata from clerk.user_metadata").fetchone() == (None,)
    deliver(connection, changed(version=8, public={"a": 4, "b": 3, "c": BIG}), policy=Policy(public=Copy.NEVER))
    assert [notice["changed"]["public_metadata"] for notice in heard(listener)] == [["c"], ["a"]]


def test_of_private_metadata_that_is_never_copied_nothing_is_told_or_kept(
    connection: Connection, listener: Connection
) -> None:
    never = Policy(private=Copy.NEVER)
    deliver(connection, changed(version=1, private={"a": 1}), policy=never)
    assert [notice["changed"] for notice in heard(listener)] == [{}]
    deliver(connection, changed(version=2, private={"a": 2}), policy=never)
    assert heard(listener) == []
    kept = "select to_jsonb(user_contents) - 'user_id' from clerk.user_contents"
    ((contents,),) = connection.execute(kept).fetchall()
    assert contents.pop("public_hash") == contents.pop("unsafe_hash")
    assert contents.pop("public_hashes") == contents.pop("unsafe_hashes") == {}
    assert set(contents.values()) == {None}


def test_names_that_do_not_fit_are_left_out(connection: Connection, listener: Connection) -> None:
    deliver(connection, changed(private={f"{number:04}" + "n" * 76: 1 for number in range(100)}), policy=EVERYTHING)
    deliver(connection, changed("user_b", private={f"{number:04}" + "n" * 70: 1 for number in range(95)}))
    told = {notice["user_id"]: notice["changed"] for notice in heard(listener)}
    assert told["user_a"] is None
    assert len(told["user_b"]["private_metadata"]) == 95


def test_names_are_found_in_time_whatever_their_number(connection: Connection, listener: Connection) -> None:
    """A user's browser writes unsafe metadata, and nobody else's events are to wait for it."""
    many = {f"field_{number}": number for number in range(40_000)}
    deliver(connection, changed(version=1, unsafe=many))
    connection.execute("set statement_timeout = '6s'")  # 40 s where each name costs a look through all of them
    deliver(connection, changed(version=2, unsafe=many | {"field_7": "changed"}))
    assert [notice["changed"] for notice in heard(listener)] == [None, {"unsafe_metadata": ["field_7"]}]


def test_names_that_are_not_known_are_left_out(connection: Connection, listener: Connection) -> None:
    """As of users from before hashes were kept."""
    deliver(connection, changed(version=1, private={"a": 1}, public={"a": 1}))
    connection.execute("update clerk.user_contents set public_hash = null, public_hashes = null")
    connection.execute("update clerk.user_contents set unsafe_hash = null, unsafe_hashes = null")
    deliver(connection, changed(version=2, private={"a": 1}, public={}))
    deliver(connection, changed(version=3, private={"a": 2}, public={}))
    assert [notice["changed"] for notice in heard(listener)][1:] == [None, {"private_metadata": ["a"]}]


def test_that_private_metadata_is_copied_or_not_any_more_is_no_change_of_it(
    connection: Connection, listener: Connection
) -> None:
    never = Policy(private=Copy.NEVER)
    deliver(connection, changed(version=1, private={"a": 1}, public={"b": 1}))
    heard(listener)
    deliver(connection, changed(version=2, private={"a": 1}, public={"b": 1}), policy=never)
    deliver(connection, changed(version=3, private={"a": 1}, public={"b": 1}))
    assert connection.execute("select private_metadata from clerk.user_metadata").fetchone() == ({"a": 1},)
    assert heard(listener) == []
    deliver(connection, changed(version=4, private={"a": 1}, public={"b": 2}), policy=never)
    assert [notice["changed"] for notice in heard(listener)] == [{"public_metadata": ["b"]}]


def test_put_and_pulled_users_are_told_of_as_well(connection: Connection, listener: Connection) -> None:
    users.record_policy(connection, Policy())
    user = {"id": "user_a", "updated_at": 5, "private_metadata": {"a": 1}}
    connection.execute("select clerk.put_user(%s::jsonb)", (json.dumps(user),))
    assert [notice["changed"] for notice in heard(listener)] == [{"private_metadata": ["a"]}]
    users.weigh_put(connection, Policy())
    users.erase(connection, "user_a")
    assert [notice["deleted"] for notice in heard(listener)] == [True]


def test_nothing_is_told_before_the_commit_nor_of_what_was_undone(connect: Connect, listener: Connection) -> None:
    connection = connect()
    with connection.transaction():
        deliver(connection, changed(version=1, private={"a": 1}))
        assert heard(listener) == []
    assert len(heard(listener)) == 1
    with connection.transaction(force_rollback=True):
        deliver(connection, changed(version=2, private={"a": 2}))
    assert heard(listener) == []


kinds = st.sampled_from([ABSENT, {}, {"a": 1}, {"a": 1.0}, {"a": 2, "b": BIG}, {"b": BIG}, {"b": BIG + "y"}])


@given(
    history=st.lists(
        st.tuples(st.integers(1, 9), kinds, kinds, kinds), min_size=2, max_size=6, unique_by=lambda e: e[0]
    ),
    policy=st.sampled_from([Policy(), EVERYTHING, Policy(public=Copy.NEVER)]),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_who_keeps_a_copy_by_the_notices_knows_of_every_change(
    connection: Connection, listener: Connection, history: list[tuple[int, Any, Any, Any]], policy: Policy
) -> None:
    """Each notice names just the fields that differ between what was there before and what is there now."""
    connection.execute(EMPTY)
    heard(listener)
    kept: dict[str, dict[str, Any]] = {}
    order = sorted(history, key=lambda event: hash(event[0] * 7919 % 11))
    came: list[tuple[int, Any, Any, Any]] = []
    for event in order:
        came.append(event)
        version, *of_kinds = event
        private, public, unsafe = of_kinds
        deliver(connection, changed(version=version, private=private, public=public, unsafe=unsafe), policy=policy)
        expected: dict[str, dict[str, Any]] = {"private_metadata": {}, "public_metadata": {}, "unsafe_metadata": {}}
        for _, *those in sorted(came, key=lambda one: one[0]):
            expected |= {kind: value for kind, value in zip(expected, those, strict=True) if value is not ABSENT}
        names = {
            kind: sorted(
                key
                for key in kept.get(kind, {}).keys() | now.keys()
                if repr(kept.get(kind, {}).get(key)) != repr(now.get(key))
            )
            for kind, now in expected.items()
        }
        names = {kind: fields for kind, fields in names.items() if fields}
        notices = [notice["changed"] for notice in heard(listener)]
        assert notices == ([names] if names or not kept else [])
        kept = expected


# --- The changes since a cursor


def cursor_of(connection: Connection) -> str:
    ((cursor,),) = connection.execute("select clerk.change_cursor()").fetchall()
    return str(cursor)


def since(connection: Connection, cursor: str | None) -> tuple[list[tuple[str, int, bool]], str | None]:
    """Who has changed, and the cursor to go on with."""
    rows = connection.execute("select * from clerk.changes_since(%s)", (cursor,)).fetchall()
    cursors = {row[3] for row in rows}
    assert len(cursors) <= 1
    return sorted(row[:3] for row in rows), cursors.pop() if cursors else cursor


def test_everybody_who_changed_comes_once_and_then_nobody(connection: Connection) -> None:
    deliver(connection, changed("user_before", 1))
    cursor: str | None = cursor_of(connection)
    assert since(connection, cursor) == ([], cursor)
    deliver(connection, changed("user_a", 1), changed("user_b", 1))
    deliver(connection, changed("user_a", 2, private={"n": 1}))
    deliver(connection, changed("user_a", 3, private={"n": 1}))  # a sign-in
    deliver(connection, deleted("user_b", 1_700_000_000_000))
    changes, cursor = since(connection, cursor)
    assert changes == [("user_a", 3, False), ("user_b", 1_700_000_000_000, True)]
    assert since(connection, cursor) == ([], cursor)
    deliver(connection, changed("user_before", 2))  # another sign-in
    assert since(connection, cursor) == ([], cursor)
    assert sorted(since(connection, None)[0]) == [
        ("user_a", 3, False),
        ("user_b", 1_700_000_000_000, True),
        ("user_before", 2, False),
    ]


def test_what_is_committed_late_by_a_transaction_that_began_early_is_not_lost(connect: Connect) -> None:
    """The order of commits isn't that of transactions, and a cursor may not pass what is still to come."""
    reader, early, late = connect(), connect(), connect()
    start = cursor_of(reader)
    with early.transaction():
        deliver(early, changed("user_early", 1))
        deliver(late, changed("user_late", 1))
        changes, cursor = since(reader, start)
        assert [user_id for user_id, *_ in changes] == ["user_late"]
        again, _ = since(reader, cursor)
        assert [user_id for user_id, *_ in again] == ["user_late"], "told twice rather than passed by"
    changes, cursor = since(reader, cursor)
    assert {user_id for user_id, *_ in changes} == {"user_early", "user_late"}
    assert since(reader, cursor) == ([], cursor)


def test_what_is_dropped_from_the_view_or_comes_into_it_is_a_change_of_the_row(connection: Connection) -> None:
    deliver(connection, changed(version=1, public={"a": BIG}))
    cursor: str | None = cursor_of(connection)
    users.reweigh(connection, Policy(public=Copy.NEVER), ["user_a"], drop=True)
    changes, cursor = since(connection, cursor)
    assert changes == [("user_a", 1, False)]
    users.reweigh(connection, Policy(public=Copy.NEVER), ["user_a"], drop=True)
    assert since(connection, cursor) == ([], cursor)


@pytest.mark.parametrize(
    "cursor",
    ["", "7", "7-7", "7-7-", "-7-7", "7-7-7-7", "x-7-7", "7-7-x", "7-7 -7", "9" * 20 + "-1-1", "1-1-" + "9" * 20],
)
def test_what_is_no_cursor_is_refused(db: Connection, cursor: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="no cursor") as caught:
        since(db, cursor)
    assert "change_cursor()" in str(caught.value.diag.message_hint)


def test_a_cursor_of_another_server_or_of_a_future_that_was_lost_is_refused(db: Connection) -> None:
    server, timeline, place = map(int, cursor_of(db).split("-"))
    of_others = (server + 1, timeline, place), (server, timeline + 1, place), (server, timeline, place + 1_000_000)
    for cursor in ("-".join(map(str, parts)) for parts in of_others):
        with (
            pytest.raises(psycopg.errors.InvalidParameterValue, match="another Postgres server") as caught,
            db.transaction(),
        ):
            since(db, cursor)
        assert "Begin anew" in str(caught.value.diag.message_hint)


def test_a_later_transaction_of_the_server_before_a_restore_is_not_told_for_ever(connection: Connection) -> None:
    deliver(connection, changed(version=1))
    cursor = cursor_of(connection)
    connection.execute("update clerk.changes set changed_in = '900000000000000000'")
    connection.execute("update clerk.changes_pruned set until = '800000000000000000'")
    assert since(connection, cursor) == ([], cursor)
    assert since(connection, None)[0] == [("user_a", 1, False)]


def test_a_reader_may_ask_and_still_see_no_table(db: Connection) -> None:
    deliver(db, changed(version=1))
    db.execute("set local role clerk_reader")
    assert since(db, None) == ([("user_a", 1, False)], cursor_of(db))
    with pytest.raises(psycopg.errors.InsufficientPrivilege), db.transaction():
        db.execute("select * from clerk.changes")


def test_changes_past_their_time_are_pruned_and_cursors_from_before_refused(connection: Connection) -> None:
    keep = timedelta(days=7)
    before = cursor_of(connection)
    deliver(connection, changed("user_a"), changed("user_b"))
    after = cursor_of(connection)
    connection.execute("update clerk.changes set changed_at = now() - interval '8 days'")
    deliver(connection, changed("user_c"))
    assert users.prune_changes(connection, keep, 1) == 1
    assert users.prune_changes(connection, keep, 10) == 1
    assert users.prune_changes(connection, keep, 10) == 0
    assert connection.execute("select user_id from clerk.changes").fetchall() == [("user_c",)]
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="too old") as caught:
        since(connection, before)
    assert "Begin anew" in str(caught.value.diag.message_hint)
    assert [user_id for user_id, *_ in since(connection, after)[0]] == ["user_c"]
    assert len(since(connection, None)[0]) == 3


# --- A listener that sleeps


@pytest.fixture
def small_queue(tmp_path: Path) -> Iterator[str]:
    """A Postgres that keeps few notices, as it can be told from 17 on."""
    with local.embedded(tmp_path) as urls, psycopg.connect(urls.database, autocommit=True) as connection:
        connection.execute("alter system set max_notify_queue_pages = 64")
    with local.embedded(tmp_path) as urls:
        schema.migrate(urls.database)
        yield urls.database
    local.discard(tmp_path)


def test_a_listener_who_sleeps_in_a_transaction_stops_notices_and_never_the_work(small_queue: str) -> None:
    with (
        psycopg.connect(small_queue, autocommit=True) as sleeper,
        psycopg.connect(small_queue, autocommit=True) as worker,
    ):
        cursor = cursor_of(worker)
        sleeper.execute("listen clerk_user_changed")
        sleeper.execute("begin")
        sleeper.execute("select 1")
        name = "n" * 7000
        for batch in range(5):
            bodies = [changed(f"user_{batch}_{number}", 1, private={name: 1}) for number in range(20)]
            assert deliver(worker, *bodies, policy=EVERYTHING).outcomes["applied"] == 20
        ((usage,),) = worker.execute("select pg_notification_queue_usage()").fetchall()
        assert 0.5 <= usage < 1
        sleeper.execute("commit")
        assert 20 <= len(heard(sleeper)) < 100
        assert len(since(worker, cursor)[0]) == 100
