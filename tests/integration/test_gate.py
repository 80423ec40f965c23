"""The gate on real Postgres: any order, repetition and mixture of a user's events ends in the same row."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.events import ABSENT, changed, deleted, incoming
from worker import inbox, sync
from worker.db import Connection
from worker.policy import Copy, Policy

EVERYTHING = Policy(Copy.ALWAYS, Copy.ALWAYS, Copy.ALWAYS)

ROW = """
select private_metadata::text, public_metadata::text, unsafe_metadata::text, claims_bytes,
  (extract(epoch from updated_at) * 1000)::bigint
from clerk.user_metadata where user_id = %s
"""


def row(connection: Connection, user_id: str = "user_a") -> Any:
    return connection.execute(ROW, (user_id,)).fetchone()


def deliver(connection: Connection, *bodies: bytes, policy: Policy | None = None) -> sync.Batch:
    """Record the events, and drain them in one batch."""
    inbox.record(connection, [incoming(body) for body in bodies])
    return sync.drain_batch(connection, policy or Policy())


def test_a_user_is_written_and_read_back_as_it_was_sent(db: Connection) -> None:
    body = changed(private={"n": 0}, public={"Ключ ": "\U0001f600"}).replace(
        b'"n": 0', b'"n": 9007199254740993, "d": 1.10, "big": 123456789012345678901234567890.5'
    )
    deliver(db, body, policy=EVERYTHING)
    assert row(db) == (
        '{"d": 1.10, "n": 9007199254740993, "big": 123456789012345678901234567890.5}',
        '{"Ключ ": "\U0001f600"}',
        "{}",
        39 + len('{"Ключ ":"\U0001f600"}'.encode()) + 2,
        1_700_000_000_000,
    )


def test_public_and_unsafe_come_and_go_with_their_size(db: Connection) -> None:
    deliver(db, changed(version=1, public={"a": 1}))
    assert row(db)[:3] == ("{}", None, None)
    deliver(db, changed(version=2, public={"a": "x" * 1200}))
    assert json.loads(row(db)[1]) == {"a": "x" * 1200}
    assert row(db)[2] == "{}"
    deliver(db, changed(version=3, public={"a": 1}))
    assert row(db)[:3] == ("{}", None, None)


def test_an_older_version_never_replaces_a_newer_one(db: Connection) -> None:
    deliver(db, changed(version=2, private={"v": 2}))
    before = row(db)
    assert deliver(db, changed(version=1, private={"v": 1})).outcomes["older"] == 1
    assert row(db) == before


def test_of_two_contents_of_one_version_the_later_timestamp_wins_in_either_order(db: Connection) -> None:
    early = changed(version=1_700_000_000_000, timestamp=1_700_000_000_010, private={"v": "early"})
    late = changed(version=1_700_000_000_000, timestamp=1_700_000_000_020, private={"v": "late"})
    deliver(db, early)
    deliver(db, late)
    assert row(db)[0] == '{"v": "late"}'
    deliver(db, early)
    assert row(db)[0] == '{"v": "late"}'


def test_a_timestamp_in_seconds_is_compared_with_one_in_milliseconds(db: Connection) -> None:
    deliver(db, changed(version=1, timestamp=1_700_000_000_500, private={"v": "later"}))
    deliver(db, changed(version=1, timestamp=1_700_000_000, private={"v": "half a second earlier"}))
    assert row(db)[0] == '{"v": "later"}'


def test_the_same_event_again_changes_nothing(db: Connection) -> None:
    deliver(db, changed(private={"v": 1}))
    before = db.execute("select * from clerk.users").fetchall()
    assert deliver(db, changed(private={"v": 1})).outcomes["unchanged"] == 1
    assert db.execute("select * from clerk.users").fetchall() == before


def test_an_absent_key_leaves_our_value_and_null_empties_it(db: Connection) -> None:
    deliver(db, changed(version=1, private={"v": 1}))
    deliver(db, changed(version=2, private=ABSENT))
    assert row(db)[0] == '{"v": 1}'
    assert row(db)[4] == 2
    body = changed(version=3).replace(b'"private_metadata": {}', b'"private_metadata": null')
    deliver(db, body)
    assert row(db)[0] == "{}"


def test_private_metadata_is_empty_where_no_event_has_carried_it(db: Connection) -> None:
    deliver(db, changed(private=ABSENT))
    assert row(db)[0] == "{}"


def test_an_older_event_still_gives_what_the_newer_ones_lacked(db: Connection) -> None:
    deliver(db, changed(version=3, private=ABSENT))
    deliver(db, changed(version=1, private={"v": 1}))
    assert row(db)[0] == '{"v": 1}'
    deliver(db, changed(version=2, private={"v": 2}))
    assert row(db)[0] == '{"v": 2}'
    deliver(db, changed(version=1, private={"v": 1}))
    assert row(db)[0] == '{"v": 2}'
    assert row(db)[4] == 3


def test_a_never_copied_kind_is_null(db: Connection) -> None:
    deliver(db, changed(private={"v": 1}), policy=Policy(private=Copy.NEVER))
    assert row(db)[0] is None


def test_the_same_event_under_another_policy_is_decided_anew(db: Connection) -> None:
    deliver(db, changed(public={"v": 1}))
    assert row(db)[1] is None
    deliver(db, changed(public={"v": 1}), policy=Policy(public=Copy.ALWAYS))
    assert row(db)[1] == '{"v": 1}'
    deliver(db, changed(public={"v": 1}))
    assert row(db)[1] is None


@pytest.mark.parametrize(("sent", "kept"), [("1.0", "1.0"), ("1", "1"), ("1.00", "1.00"), ("1e0", "1")])
def test_numbers_that_are_equal_but_written_otherwise_are_a_change(db: Connection, sent: str, kept: str) -> None:
    deliver(db, changed(version=1, private={"n": 0}).replace(b'"n": 0', b'"n": 1.000'))
    deliver(db, changed(version=2, private={"n": 0}).replace(b'"n": 0', b'"n": ' + sent.encode()))
    assert row(db)[0] == '{"n": ' + kept + "}"


def test_a_deletion_erases_and_leaves_a_tombstone_that_nothing_undoes(db: Connection) -> None:
    deliver(db, changed(version=1, private={"v": 1}))
    assert deliver(db, deleted(timestamp=2)).outcomes["deleted"] == 1
    assert row(db) is None
    later = 4_000_000_000_000
    assert deliver(db, changed(version=later, private={"v": 2})).outcomes["deleted"] == 1
    assert row(db) is None
    assert db.execute("select count(*) from clerk.user_contents").fetchone() == (0,)


def test_a_deletion_of_a_user_never_heard_of_is_remembered(db: Connection) -> None:
    deliver(db, deleted())
    deliver(db, changed())
    assert row(db) is None
    assert db.execute("select deleted_at is not null from clerk.users").fetchone() == (True,)


def test_a_deletion_erases_events_that_were_set_aside(db: Connection) -> None:
    inbox.record(db, [incoming(changed(private="not an object"), "msg_dead")])
    deliver(db, deleted())
    listed = inbox.show(db, "msg_dead")
    assert listed is not None
    assert (listed.state, listed.body_bytes) == ("done", None)


def test_a_bump_of_the_version_writes_no_json_and_is_a_hot_update(connect: Callable[[], Connection]) -> None:
    connection = connect()
    # A page that is full of other tests' dead rows would have no room for a HOT update.
    connection.execute("truncate clerk.users, clerk.user_contents")

    def moved(version: int) -> sync.Batch:
        return deliver(connection, changed(version=version, private={"blob": "x" * 1500}, public={"blob": "y" * 4000}))

    updates = "select n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = 'users'"

    def counted() -> tuple[int, int]:
        connection.execute("select pg_stat_force_next_flush()")
        made, hot = connection.execute(updates).fetchone() or (0, 0)
        return made, hot

    moved(1)
    where = "select ctid, xmin from clerk.user_contents"
    before, (made, hot) = connection.execute(where).fetchall(), counted()
    for version in range(2, 12):
        assert moved(version).outcomes["unchanged"] == 1
    assert connection.execute(where).fetchall() == before
    assert counted() == (made + 10, hot + 10)


Change = tuple[int, int, tuple[Any, Any, Any]]
History = list[Change | int]


def newest_of(history: History) -> tuple[tuple[Any, Any, Any], int] | None:
    """The model: each kind as the newest event that carried it had it, and the version; None after a deletion."""
    kinds: list[Any] = [{}, None, None]
    newest = 0
    for event in sorted((event for event in history if not isinstance(event, int)), key=lambda event: event[:2]):
        newest = event[0]
        kinds = [was if value is ABSENT else value for was, value in zip(kinds, event[2], strict=True)]
    gone = any(isinstance(event, int) for event in history)
    return None if gone else ((kinds[0], kinds[1], kinds[2]), newest)


values = st.sampled_from([ABSENT, {}, {"a": 1}, {"a": 1.5}, {"a": "x" * 700}, {"b": [None, True]}])
a_change = st.tuples(st.integers(1, 4), st.integers(1, 3), st.tuples(values, values, values))


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Changes with distinct clocks, and sometimes deletions (an int, their timestamp)."""
    changes = draw(st.lists(a_change, min_size=1, max_size=6, unique_by=lambda change: change[:2]))
    deletions = draw(st.lists(st.integers(1, 5), max_size=2) if draw(st.integers(0, 3)) == 0 else st.just([]))
    return [*changes, *deletions]


def body_of(event: Change | int) -> bytes:
    if isinstance(event, int):
        return deleted(timestamp=event)
    version, timestamp, (private, public, unsafe) = event
    return changed(version=version, timestamp=timestamp, private=private, public=public, unsafe=unsafe)


def state(connection: Connection) -> Any:
    """Everything but the local clock, and which event came last."""
    users = "select to_jsonb(users) - '{synced_at,content_changed,crossed}'::text[] from clerk.users as users"
    contents = "select private_metadata::text, public_metadata::text, unsafe_metadata::text from clerk.user_contents"
    return connection.execute(users).fetchall(), connection.execute(contents).fetchall()


@given(history=histories(), data=st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_and_repetition_ends_in_the_row_of_the_newest(
    db: psycopg.Connection[Any], history: History, data: st.DataObject
) -> None:
    expected = newest_of(history)
    repeated = [*history, *data.draw(st.lists(st.sampled_from(history), max_size=4))]
    ends = []
    for _ in range(2):
        order = data.draw(st.permutations(repeated))
        db.rollback()
        while order:
            batch = order[: data.draw(st.integers(1, 4))]
            order = order[len(batch) :]
            deliver(db, *map(body_of, batch), policy=EVERYTHING)
        found = row(db)
        if expected is None:
            assert found is None
        else:
            assert tuple(None if text is None else json.loads(text) for text in found[:3]) == expected[0]
            assert found[4] == expected[1]
            assert found[3] == 39 + sum(
                len(json.dumps(kind or {}, separators=(",", ":")).encode()) for kind in expected[0][1:]
            )
        ends.append(state(db))
    assert ends[0] == ends[1]


@given(history=histories(), data=st.data())
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_ends_in_the_same_decisions_and_weights(
    db: psycopg.Connection[Any], history: History, data: st.DataObject
) -> None:
    ends = []
    for _ in range(2):
        db.rollback()
        for event in data.draw(st.permutations(history)):
            deliver(db, body_of(event))
        ends.append(state(db))
    assert ends[0] == ends[1]


@given(
    contents=st.lists(st.sampled_from(["{}", '{"a":1}', '{"a":2}', '{"b":1}']), min_size=2, max_size=4), data=st.data()
)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_even_events_with_equal_clocks_end_alike_in_every_order(
    db: psycopg.Connection[Any], contents: list[str], data: st.DataObject
) -> None:
    ends = []
    for _ in range(2):
        db.rollback()
        for content in data.draw(st.permutations(contents)):
            deliver(db, changed(private=json.loads(content)))
        ends.append(state(db))
    assert ends[0] == ends[1]
