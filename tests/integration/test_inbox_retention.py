"""How long the inbox keeps what: applied events for a time, events set aside until somebody resolves them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import psycopg
import pytest

from tests.events import changed, deleted, incoming
from worker import db, inbox, sync
from worker.db import Connection
from worker.housekeeper import Housekeeper
from worker.policy import Policy

WEEK = timedelta(days=7)

AGE = "update clerk.webhook_events set processed_at = processed_at - %(by)s, received_at = received_at - %(by)s"


def record(connection: Connection, *bodies: bytes) -> list[str]:
    deliveries = [incoming(body) for body in bodies]
    inbox.record(connection, deliveries)
    return [delivery.svix_id for delivery in deliveries]


def apply(connection: Connection, count: int, days_ago: float) -> list[str]:
    """Events that were applied so long ago; others grow older by as much."""
    recorded = record(connection, *(changed(f"user_{number}") for number in range(count)))
    sync.drain(connection, Policy())
    connection.execute(AGE, {"by": timedelta(days=days_ago)})
    return recorded


def kept(connection: Connection) -> set[str]:
    return {svix_id for (svix_id,) in connection.execute("select svix_id from clerk.webhook_events")}


@pytest.fixture
def connection(connect: Callable[[], Connection]) -> Connection:
    return connect()


@pytest.fixture
def housekeeper(database_url: str) -> Housekeeper:
    return Housekeeper(lambda: db.connect(database_url, "housekeeper"), WEEK, Policy())


def test_an_applied_event_is_pruned_after_its_time_and_others_are_not(connection: Connection) -> None:
    apply(connection, 1, 0.002)
    recent = kept(connection)
    old = apply(connection, 1, 6.999)
    (pending,) = record(connection, changed("user_pending"))
    (dead,) = record(connection, changed("user_dead", private="not an object"))
    connection.execute(
        "update clerk.webhook_events set received_at = now() - interval '1 year' where svix_id = any(%s)",
        ([pending, dead],),
    )
    assert inbox.prune(connection, WEEK, 2) == 1
    assert kept(connection) == {*old, pending, dead}
    assert not recent & kept(connection)


def test_the_time_begins_when_an_event_was_done_however_long_it_waited(connection: Connection) -> None:
    waited = record(connection, changed())
    connection.execute("update clerk.webhook_events set received_at = now() - interval '1 year'")
    sync.drain(connection, Policy())
    assert inbox.prune(connection, WEEK, 2) == 0
    assert kept(connection) == set(waited)


def test_a_step_deletes_so_many_and_no_more(connection: Connection) -> None:
    apply(connection, 7, 8)
    assert [inbox.prune(connection, WEEK, 3) for _ in range(4)] == [3, 3, 1, 0]


def test_a_row_that_another_worker_prunes_is_passed_over(connect: Callable[[], Connection]) -> None:
    one, two = connect(), connect()
    apply(one, 3, 8)
    with one.transaction():
        assert inbox.prune(one, WEEK, 2) == 2
        assert inbox.prune(two, WEEK, 2) == 1
    assert kept(one) == set()


def test_a_step_reads_what_it_deletes_and_not_the_table(connection: Connection) -> None:
    apply(connection, 300, 1)
    apply(connection, 10, 7)
    with connection.transaction(force_rollback=True):
        connection.execute("set local enable_seqscan = off")
        plan = "\n".join(
            line
            for (line,) in connection.execute(
                "explain (analyze, costs off) " + inbox.PRUNE, {"keep": timedelta(days=7.5), "most": 10_000}
            )
        )
    assert "webhook_events_done" in plan
    assert "Index Cond: (processed_at" in plan
    assert "Rows Removed" not in plan


def test_housekeeping_prunes_step_by_step_and_then_seldom(connection: Connection, housekeeper: Housekeeper) -> None:
    housekeeper._step = 2
    apply(connection, 5, 8)
    left = []
    for _ in range(3):
        housekeeper.keep_house()
        left.append(len(kept(connection)))
    assert left == [3, 1, 0], "a step each time, until nothing is left"
    old = apply(connection, 1, 8)
    housekeeper.keep_house()
    assert kept(connection) == set(old), "it looked a moment ago"
    housekeeper._prune_due = 0.0
    housekeeper.keep_house()
    assert kept(connection) == set()


def test_a_step_that_takes_too_long_is_given_up_and_a_smaller_one_tried(
    connect: Callable[[], Connection], housekeeper: Housekeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "PRUNE_MS", 100)
    one, two = connect(), connect()
    old = apply(one, 1, 8)
    slow = "create rule slow as on delete to clerk.webhook_events do also select pg_sleep(30)"
    one.execute(slow)
    try:
        with pytest.raises(psycopg.errors.QueryCanceled):
            housekeeper.keep_house()
    finally:
        one.execute("drop rule slow on clerk.webhook_events")
    assert kept(two) == set(old)
    assert housekeeper._step == inbox.PRUNE_STEP // 10, "fewer next time"
    housekeeper.keep_house()
    assert kept(two) == set()


def test_a_dismissed_event_has_lost_its_body_and_says_why_it_was_dead(connection: Connection) -> None:
    bad, other = record(connection, changed(private="c4nary"), changed("user_b", private=[]))
    (applied,) = record(connection, changed("user_c"))
    sync.drain(connection, Policy())
    assert inbox.dismiss(connection, [bad, applied, "msg_of_nobody"]) == [bad]
    event = inbox.show(connection, bad)
    assert event is not None
    assert (event.state, event.body_bytes, event.error) == (
        "done",
        None,
        "dismissed: data.private_metadata is not an object",
    )
    assert inbox.retry(connection, [bad]) == []
    assert inbox.dismiss(connection, [bad]) == []
    assert inbox.dismiss(connection, None) == [other]
    left = inbox.show(connection, applied)
    assert left is not None
    assert left.error is None


def test_a_dismissed_event_is_pruned_in_its_time_and_counts_from_the_dismissal(connection: Connection) -> None:
    (bad,) = record(connection, changed(private="not an object"))
    connection.execute(AGE, {"by": timedelta(days=30)})
    assert inbox.prune(connection, WEEK, 2) == 0
    inbox.dismiss(connection, [bad])
    assert inbox.prune(connection, WEEK, 2) == 0
    connection.execute(AGE, {"by": timedelta(days=8)})
    assert inbox.prune(connection, WEEK, 2) == 1


def test_a_dismissed_event_that_is_delivered_again_is_taken_again(connection: Connection) -> None:
    (bad,) = record(connection, changed(private="not an object"))
    inbox.dismiss(connection, [bad])
    assert inbox.record(connection, [incoming(changed(private={"v": 1}), bad)]) == {bad}
    assert sync.drain(connection, Policy()) == 1
    event = inbox.show(connection, bad)
    assert event is not None
    assert (event.state, event.error) == ("done", None)


def test_what_a_deletion_erased_is_pruned_like_what_was_applied(connection: Connection) -> None:
    record(connection, changed(private="not an object"), deleted())
    sync.drain(connection, Policy())
    connection.execute(AGE, {"by": timedelta(days=8)})
    assert inbox.prune(connection, WEEK, 2) == 2
