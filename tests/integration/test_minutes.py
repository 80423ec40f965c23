"""The workers count each minute from the inbox, once it is over, by the database's clock."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Final

import psycopg
import pytest
from psycopg.rows import dict_row

from worker import db as database
from worker import inbox, minutes
from worker.db import Connection
from worker.housekeeper import COUNT_AGAIN_SECONDS, Housekeeper
from worker.policy import Policy

DAY: Final = timedelta(days=1)

# Times are seconds from the beginning of this minute; the whole test is in one transaction, whose now() stands still.
ADD: Final = """
insert into clerk.webhook_events (svix_id, type, state, error, sent_at, received_at, processed_at)
select
  'msg_' || gen_random_uuid(), 'user.updated', %(state)s, %(error)s,
  this.minute + make_interval(secs => %(sent)s), this.minute + make_interval(secs => %(received)s),
  this.minute + make_interval(secs => %(processed)s)
from (select date_trunc('minute', now()) as minute) as this
"""


def add(
    connection: Connection, state: str, received: float, processed: float | None = None, **more: float | str
) -> None:
    """An event of the inbox, which Svix signed a second before it came."""
    given = {"state": state, "error": None, "sent": received - 1, "received": received, "processed": processed}
    connection.execute(ADD, given | more)


COUNTED: Final = """
select
  (extract(epoch from minute - date_trunc('minute', now())) / 60)::int as ago, acknowledged, applied, dead,
  fresh_p50, fresh_p99, fresh_max
from clerk.minutes
order by minute
"""


def counted(connection: Connection) -> list[tuple[Any, ...]]:
    """The rows: how many minutes ago, and the figures."""
    return connection.execute(COUNTED).fetchall()


ROW: Final = """
insert into clerk.minutes (minute, acknowledged, applied, dead)
values (date_trunc('minute', now()) + make_interval(mins => %(ago)s), 0, 0, 0)
"""


def counted_before(connection: Connection, ago: int) -> None:
    """A minute that has its row."""
    connection.execute(ROW, {"ago": ago})


def test_a_minute_that_is_over_is_counted_and_the_present_one_is_not(db: Connection) -> None:
    add(db, "done", -60, -59)
    add(db, "done", -50, -47)
    add(db, "done", -70, -1)  # came a minute before
    add(db, "done", -10, 3)  # was applied a minute later
    add(db, "pending", -5)
    add(db, "dead", -4, -4, error="not JSON")
    add(db, "dead", -400, -2, error="refused")
    add(db, "pending", 0)
    add(db, "done", 0, 1)
    assert minutes.count(db) == 1
    assert counted(db) == [(-1, 5, 3, 2, 4, 70, 70)]


def test_freshness_is_of_what_was_applied(db: Connection) -> None:
    for number in range(1, 101):
        add(db, "done", -60, -60 + number / 10, sent=-60)
    add(db, "done", -60, -1, error="dismissed: refused")
    assert minutes.count(db) == 1
    assert counted(db) == [(-1, 101, 100, 0, 5, 9.9, 10)]


def test_an_event_that_was_made_pending_again_counts_from_then(db: Connection) -> None:
    add(db, "done", -30, -28, sent=-90_000)
    add(db, "done", -30, -28, sent=-300)  # signed long before, and taken all the same
    assert minutes.count(db) == 1
    assert counted(db) == [(-1, 2, 2, 0, 2, 272, 272)]


def test_a_clock_of_svix_that_is_ahead_makes_nothing_fresher_than_at_once(db: Connection) -> None:
    add(db, "done", -30, -29, sent=-10)
    minutes.count(db)
    assert counted(db) == [(-1, 1, 1, 0, 0, 0, 0)]


def test_a_quiet_minute_has_a_row_of_zeros_since_a_worker_was_there(db: Connection) -> None:
    assert minutes.count(db) == 1
    assert minutes.count(db) == 0, "it is counted once"
    assert counted(db) == [(-1, 0, 0, 0, None, None, None)]
    assert minutes.newest(db) is not None


def test_minutes_since_the_last_row_are_caught_up_and_the_last_one_is_counted_anew(db: Connection) -> None:
    """A batch that began in that minute may have been committed after it was counted."""
    counted_before(db, -5)
    add(db, "done", -290, -285)
    add(db, "pending", -130)
    assert minutes.count(db) == 5
    assert [row[:3] for row in counted(db)] == [(-5, 1, 1), (-4, 0, 0), (-3, 1, 0), (-2, 0, 0), (-1, 0, 0)]


@pytest.mark.parametrize(("ago", "rows"), [(-10, 10), (-11, 1), (-600, 1)])
def test_after_long_without_a_worker_there_is_a_gap(db: Connection, ago: int, rows: int) -> None:
    counted_before(db, ago)
    assert minutes.count(db) == rows


def test_rows_of_later_than_now_count_for_nothing(db: Connection) -> None:
    """The clock was set back."""
    counted_before(db, 30)
    counted_before(db, 0)
    assert minutes.newest(db) is None
    assert minutes.count(db) == 1
    assert [row[0] for row in counted(db)] == [-1]


def test_old_rows_are_dropped(db: Connection) -> None:
    for ago in (-60 * 49, -60 * 48 - 1, -60 * 47):
        counted_before(db, ago)
    minutes.count(db)
    assert [row[0] for row in counted(db)] == [-60 * 47, -1]


def test_what_is_read_is_the_time_before_the_present_minute(db: Connection) -> None:
    for ago in (-11, -10, -1, 0):
        counted_before(db, ago)
    with db.cursor(row_factory=dict_row) as cursor:
        ((this),) = cursor.execute("select date_trunc('minute', now()) as minute").fetchall()
    found = [(this["minute"] - minute.minute) // minutes.MINUTE for minute in minutes.since(db, timedelta(minutes=10))]
    assert found == [10, 1]


def test_several_workers_count_at_once_and_agree(connect: Callable[[], Connection]) -> None:
    connections = [connect() for _ in range(4)]
    connections[0].execute(ROW, {"ago": -9})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(minutes.count, connections))
    found = counted(connections[0])
    assert len(found) in {9, 10}, "ten where a minute ends just now"
    assert len({row[0] for row in found}) == len(found)


def test_housekeeping_counts_and_where_that_takes_too_long_prunes_all_the_same(
    connect: Callable[[], Connection],
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    connection = connect()
    keeper = Housekeeper(lambda: database.connect(database_url, "housekeeper"), DAY, Policy())
    keeper.keep_house()
    assert len(counted(connection)) == 1
    connection.execute("delete from clerk.minutes")
    connection.execute(ADD, {"state": "done", "error": None, "sent": -200_000, "received": -200_000,
                             "processed": -200_000})  # fmt: skip
    monkeypatch.setattr(minutes, "COUNT_MS", 50)
    keeper._prune_due = 0.0
    with connection.transaction():
        connection.execute("lock table clerk.minutes in share mode")
        with caplog.at_level(logging.WARNING):
            keeper.keep_house()
    assert caplog.messages == ["the last minutes took too long to count: they stay without figures"]
    assert inbox.counts(connection)["done"] == 0, "it was pruned"
    assert counted(connection) == []
    keeper.keep_house()
    assert counted(connection) == [], "not tried again at once"
    monkeypatch.undo()
    keeper._count_due -= COUNT_AGAIN_SECONDS
    keeper.keep_house()
    assert len(counted(connection)) == 1


def test_counting_needs_the_worker_s_privileges_and_reading_the_receiver_s(db: psycopg.Connection[Any]) -> None:
    db.execute("set role clerk_worker")
    assert minutes.count(db) == 1
    db.execute("set role clerk_receiver")
    assert len(minutes.since(db, DAY)) == 1
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        counted_before(db, -5)
