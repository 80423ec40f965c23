"""Draining the inbox: batches, poison beside good, two workers at once, and what an outage leaves behind."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import psycopg
import pytest

from tests.events import changed, deleted, incoming
from tests.waiting import until
from worker import db, inbox, sweeper, sync
from worker.db import Connection
from worker.policy import Policy
from worker.sweeper import Drainer

Connect = Callable[[], Connection]

WAITS_FOR_A_LOCK = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"

STATES = "select state, count(*) from clerk.webhook_events group by state"


def states(connection: Connection) -> dict[str, int]:
    return dict(connection.execute(STATES).fetchall())


def record(connection: Connection, *bodies: bytes) -> None:
    inbox.record(connection, [incoming(body) for body in bodies])


@contextmanager
def refusing(connection: Connection, user_id: str) -> Iterator[None]:
    """Make Postgres refuse one user, as content that nobody thought of might."""
    connection.execute(f"alter table clerk.users add constraint refused check (user_id <> '{user_id}')")
    try:
        yield
    finally:
        connection.execute("alter table clerk.users drop constraint refused")


def test_done_events_lose_their_bodies_and_keep_their_place(connect: Connect) -> None:
    connection = connect()
    inbox.record(connection, [incoming(changed(), "msg_1")])
    assert sync.drain(connection, Policy()) == 1
    event = inbox.show(connection, "msg_1")
    assert event is not None
    assert (event.state, event.attempts, event.body_bytes, event.error) == ("done", 1, None, None)
    assert event.processed_at is not None


def test_everything_pending_is_drained_in_batches(connect: Connect) -> None:
    connection = connect()
    record(connection, *(changed(f"user_{number}") for number in range(25)))
    batches: list[sync.Batch] = []
    assert sync.drain(connection, Policy(), batch=10, observe=batches.append) == 25
    assert [batch.claimed for batch in batches] == [10, 15], "each allows twice as many"
    assert [batch.full for batch in batches] == [True, False]
    assert all(len(batch.freshness) == batch.claimed for batch in batches)


def test_a_batch_is_bounded_in_bytes_so_that_large_bodies_do_not_fill_the_memory(connect: Connect) -> None:
    connection = connect()
    for number in range(20):
        record(connection, changed(f"user_{number}", private={"a": "x" * 1_000_000}))
    with connection.transaction(force_rollback=True):
        claimed = inbox.claim(connection, 500)
    assert 4 <= len(claimed) <= 5
    batches: list[sync.Batch] = []
    assert sync.drain(connection, Policy(), observe=batches.append) == 20
    assert all(batch.full for batch in batches[:3]), "there was more"
    assert states(connection) == {"done": 20}


def test_an_unusable_event_is_set_aside_with_its_reason_and_its_body(connect: Connect) -> None:
    connection = connect()
    event = incoming(changed(), "msg_1")
    bad = changed(private=["not an object"])
    inbox.record(connection, [inbox.Incoming("msg_1", event.sent_at, bad, event.type, event.user_id, event.version)])
    batch = sync.drain_batch(connection, Policy())
    assert batch.dead == {"msg_1": "data.private_metadata is not an object"}
    shown = inbox.show(connection, "msg_1")
    assert shown is not None
    assert (shown.state, shown.error, shown.body_bytes) == ("dead", batch.dead["msg_1"], len(bad))


def test_one_user_s_poison_neither_stops_nor_delays_the_others(connect: Connect) -> None:
    connection = connect()
    with refusing(connection, "user_poison"):
        record(connection, changed("user_a"), changed("user_poison"), changed("user_z"), deleted("user_d"))
        batch = sync.drain_batch(connection, Policy())
        assert batch.claimed == 4
        assert list(batch.dead.values()) == ["Postgres refuses it: CheckViolation (23514)"]
        assert states(connection) == {"done": 3, "dead": 1}
    assert inbox.retry(connection, None) == list(batch.dead)
    assert sync.drain(connection, Policy()) == 1
    assert states(connection) == {"done": 4}
    assert connection.execute("select count(*) from clerk.user_metadata").fetchone() == (3,)


def test_the_reason_never_quotes_what_the_event_carried(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    connection = connect()
    connection.execute(
        "alter table clerk.user_contents add constraint refused"
        " check (private_metadata->>'a' is distinct from 'c4nary')"
    )
    try:
        record(connection, changed(private={"a": "c4nary"}))
        batch = sync.drain_batch(connection, Policy())
    finally:
        connection.execute("alter table clerk.user_contents drop constraint refused")
    assert len(batch.dead) == 1
    assert "c4nary" not in str(batch) + caplog.text


def test_what_is_not_the_event_s_fault_leaves_it_pending(connect: Connect) -> None:
    connection = connect()
    record(connection, changed())
    connection.execute("alter function clerk.gate_users rename to gate_elsewhere")
    try:
        with pytest.raises(psycopg.ProgrammingError):
            sync.drain_batch(connection, Policy())
    finally:
        connection.execute("alter function clerk.gate_elsewhere rename to gate_users")
    assert states(connection) == {"pending": 1}
    assert sync.drain(connection, Policy()) == 1


def test_a_lost_connection_leaves_the_batch_pending_and_the_users_untouched(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, other = connect(), connect()
    record(connection, changed())

    def cut_off(*_: Any) -> None:
        other.execute("select pg_terminate_backend(%s)", (connection.info.backend_pid,))

    monkeypatch.setattr(inbox, "set_aside", cut_off)
    with pytest.raises(psycopg.OperationalError):
        sync.drain_batch(connection, Policy())
    assert states(other) == {"pending": 1}
    assert other.execute("select count(*) from clerk.users").fetchone() == (0,)


def test_rows_that_another_worker_holds_are_passed_over(connect: Connect) -> None:
    one, two = connect(), connect()
    record(one, *(changed(f"user_{number}") for number in range(10)))
    with one.transaction(force_rollback=True):
        held = inbox.claim(one, 4)
        assert len(held) == 4
        assert sync.drain(two, Policy()) == 6
    assert sync.drain(one, Policy()) == 4


def test_concurrent_drains_end_in_the_newest_rows_and_every_deletion_holds(connect: Connect) -> None:
    shuffler = random.Random(7)
    bodies = [
        changed(f"user_{user:02}", version, private={"v": version}) for user in range(40) for version in range(1, 16)
    ]
    gone = {f"user_{user:02}" for user in range(0, 40, 4)}
    bodies += [deleted(user, 5) for user in gone]
    shuffler.shuffle(bodies)
    ready = threading.Barrier(5)

    def feed(connection: Connection) -> int:
        ready.wait(10)
        for start in range(0, len(bodies), 10):
            record(connection, *bodies[start : start + 10])
        return 0

    def work(connection: Connection) -> int:
        ready.wait(10)
        claimed = 0
        while claimed == 0 or not feeding.done() or states(connection).get("pending"):
            claimed += sync.drain(connection, Policy(), batch=shuffler.choice([1, 3, 20]))
        return claimed

    with ThreadPoolExecutor(5) as pool:
        feeding = pool.submit(feed, connect())
        workers = [pool.submit(work, connect()) for _ in range(4)]
        assert sum(worker.result(60) for worker in workers) == len(bodies)
    check = connect()
    rows = dict(check.execute("select user_id, private_metadata->'v' from clerk.user_metadata").fetchall())
    assert rows == {f"user_{user:02}": 15 for user in range(40) if f"user_{user:02}" not in gone}
    assert states(check) == {"done": len(bodies)}
    assert check.execute("select count(*) from clerk.user_contents").fetchone() == (30,)


def of_version(version: int) -> bytes:
    return changed(version=version, private={"v": version})


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        pytest.param(of_version(1), of_version(2), [2], id="a first insert racing a newer one"),
        pytest.param(of_version(2), of_version(1), [2], id="a first insert racing an older one"),
        pytest.param(of_version(2), deleted(timestamp=1), [], id="an update, then a deletion"),
        pytest.param(deleted(timestamp=1), of_version(2), [], id="a deletion, then an update"),
    ],
)
@pytest.mark.parametrize("known", [False, True], ids=["new user", "known user"])
def test_a_race_for_one_user_ends_right(
    connect: Connect, first: bytes, second: bytes, left: list[int], *, known: bool
) -> None:
    one, two, watch = connect(), connect(), connect()
    if known:
        record(one, changed(version=0))
        sync.drain(one, Policy())
    with ThreadPoolExecutor(1) as pool:
        with one.transaction():
            record(watch, first)
            assert sync.drain_batch(one, Policy()).claimed == 1
            record(watch, second)
            behind = pool.submit(sync.drain_batch, two, Policy())
            until(lambda: watch.execute(WAITS_FOR_A_LOCK, (two.info.backend_pid,)).fetchone() == (True,))
        assert behind.result(10).claimed == 1
    found = watch.execute("select (extract(epoch from updated_at) * 1000)::int from clerk.user_metadata").fetchall()
    assert [version for (version,) in found] == left
    assert states(watch) == {"done": 3 if known else 2}


def test_applied_events_are_pruned_and_dead_ones_are_kept(connect: Connect) -> None:
    connection = connect()
    record(connection, changed("user_a"), changed("user_b", private="not an object"))
    sync.drain(connection, Policy())
    assert inbox.prune(connection, timedelta(days=1)) == 0
    assert inbox.prune(connection, timedelta(0)) == 1
    assert states(connection) == {"dead": 1}


def test_a_dead_event_of_a_deleted_user_is_forgotten_by_housekeeping_whenever_it_came(connect: Connect) -> None:
    connection, other = connect(), connect()
    with connection.transaction():
        record(other, deleted())
        sync.drain_batch(connection, Policy())
        record(other, changed(private="not an object"))
    record(other, changed(private="not an object"))
    assert states(connection) == {"done": 1, "dead": 2}
    assert inbox.forget_deleted(connection) == 2
    assert connection.execute("select count(*) from clerk.webhook_events where body is not null").fetchone() == (0,)


def test_events_are_recorded_while_somebody_locks_the_users(connect: Connect) -> None:
    locking, connection = connect(), connect()
    connection.execute("set lock_timeout = 100")
    with locking.transaction():
        locking.execute("lock table clerk.users in access exclusive mode")
        record(connection, changed(), changed(private="not an object"))
    assert states(connection) == {"pending": 1, "dead": 1}


SLOW: Final = """
create function clerk.slow() returns trigger language plpgsql as $$ begin perform pg_sleep(0.04); return new; end $$;
create trigger slow before insert on clerk.users for each row execute function clerk.slow()
"""


@pytest.fixture
def slow_users(connect: Connect) -> Iterator[None]:
    """Each new user takes Postgres 40 ms."""
    connect().execute(SLOW)
    yield
    connect().execute("drop function clerk.slow cascade")


@pytest.mark.usefixtures("slow_users")
def test_events_that_take_too_long_together_are_applied_by_fewer_at_a_time(connect: Connect, database_url: str) -> None:
    connection = connect()
    record(connection, *(changed(f"user_{number:02}") for number in range(20)))
    drainer = Drainer(lambda: db.connect(database_url, "worker", statement_ms=300), Policy())
    # 20 together would take 0.8 s of the 0.3 s allowed. Of 1, 2, 4, 8 the last don't pass either; then from 1 again.
    assert not drainer.ring("sweep")
    assert any(drainer.ring("sweep") for _ in range(10))
    drainer.close()
    assert states(connection) == {"done": 20}


def test_a_backlog_is_drained_in_two_lanes_and_each_event_once(
    connect: Connect, database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (sync, sweeper):
        monkeypatch.setattr(module, "BATCH", 10)
    connection = connect()
    record(connection, *(changed(f"user_{number:03}", version) for version in (1, 2) for number in range(200)))
    opened = []

    def open_one() -> Connection:
        opened.append(db.connect(database_url, "worker"))
        return opened[-1]

    drainer = Drainer(open_one, Policy())
    with caplog.at_level("INFO", "worker.sweeper"):
        assert drainer.ring("sweep")
        drainer.close()
    claimed = [vars(line)["claimed"] for line in caplog.records if line.message == "batch applied"]
    assert len(opened) >= 2
    assert all(one.closed for one in opened)
    assert sum(claimed) == 400
    assert states(connection) == {"done": 400}
    assert connection.execute("select count(*) from clerk.users where version = 2").fetchone() == (200,)


def test_what_comes_soon_after_needs_no_wake_up_and_a_stop_does_not_wait_for_silence(
    connect: Connect, database_url: str
) -> None:
    connection = connect()
    record(connection, changed("user_a"))
    drainer = Drainer(lambda: db.connect(database_url, "worker"), Policy(), linger=60)
    with ThreadPoolExecutor(1) as pool:
        ringing = pool.submit(drainer.ring, "sweep")
        try:
            until(lambda: states(connection) == {"done": 1})
            record(connection, changed("user_b"))
            until(lambda: states(connection) == {"done": 2})
        finally:
            drainer.stop()
        assert ringing.result(5)
    drainer.close()


def test_of_two_deadlines_the_earlier_one_comes_first_though_it_was_set_last(connect: Connect) -> None:
    patient, hasty = connect(), connect()
    with db.deadline(patient, 60), pytest.raises(psycopg.OperationalError), db.deadline(hasty, 0.05):
        hasty.execute("select pg_sleep(10)")
    assert patient.execute("select 1").fetchone() == (1,)
