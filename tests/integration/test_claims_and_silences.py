"""Nobody waits for one user's events, for one connection's silence, or runs code that another database user left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

import migrations
from tests.events import changed, incoming
from tests.faults.proxy import Proxy
from tests.pulling import command
from tests.waiting import until
from worker import db, inbox, local, roles, sync, users
from worker.app import create_celery
from worker.db import Connection
from worker.listener import Listener, NotOurs
from worker.policy import Policy
from worker.sweeper import Drainer

WEEK = timedelta(days=7)


def states(connection: Connection) -> dict[str, str]:
    return dict(connection.execute("select user_id, state from clerk.webhook_events").fetchall())


def test_a_users_row_that_is_locked_holds_up_nobody_elses_events(
    connect: Callable[[], Connection], database_url: str
) -> None:
    one, other = connect(), connect()
    inbox.record(one, [incoming(changed("user_a", 1))])
    sync.drain(one, Policy())
    for number, user in enumerate(("user_a", "user_b", "user_c", "user_d")):
        inbox.record(one, [incoming(changed(user, 10 + number))])
    one.execute("delete from clerk.webhook_events where state = 'done'")
    drainer = Drainer(lambda: db.connect(database_url, "worker", lock_ms=50), Policy())
    with other.transaction():
        other.execute("select from clerk.users where user_id = 'user_a' for update")
        rung = [drainer.ring("sweep") for _ in range(4)]
        assert states(one) == {"user_a": "pending", "user_b": "done", "user_c": "done", "user_d": "done"}
        assert not any(rung), "what is left is to be tried again soon"
    assert drainer.ring("sweep")
    assert states(one)["user_a"] == "done"
    drainer.close()


@pytest.mark.timeout(60)
def test_many_users_whom_an_application_holds_hold_up_nobody_elses_events(
    connect: Callable[[], Connection], database_url: str
) -> None:
    """Users put in a transaction that stays open: new ones, whose rows nobody else sees, and known ones."""
    one, other = connect(), connect()
    users.record_policy(one, Policy())
    held = [f"user_held_{number}" for number in range(8)]
    inbox.record(one, [incoming(changed(user, 1)) for user in held[:4]])
    sync.drain(one, Policy())
    one.execute("delete from clerk.webhook_events")
    drainer = Drainer(lambda: db.connect(database_url, "worker", lock_ms=1000), Policy())
    try:
        with other.transaction():
            for user in held:
                put = f'{{"id": "{user}", "updated_at": 5, "private_metadata": {{"put": 1}}}}'
                other.execute("select clerk.put_user(%s::jsonb)", (put,))
            inbox.record(one, [incoming(changed(user, 10, private={"n": 1})) for user in held])
            inbox.record(one, [incoming(changed(f"user_{number}")) for number in range(160)])
            started = time.monotonic()
            assert not drainer.ring("sweep"), "what is left is to be tried again soon"
            took = time.monotonic() - started
            assert {user for user, state in states(one).items() if state != "done"} == set(held)
            # One wait of a whole batch, and a few short ones for each that is held.
            assert took < 1 + 8 * 4 * sync.HELD_MS / 1000
        until(lambda: drainer.ring("sweep"), 10, "a drain that leaves nobody out")
        assert set(states(one).values()) == {"done"}
    finally:
        drainer.close()


@pytest.fixture
def proxy(database_url: str) -> Iterator[Proxy]:
    parts = urlsplit(database_url)
    with Proxy("127.0.0.1", local.free_port(), str(parts.hostname), parts.port or 5432) as made:
        yield made


def through(proxy: Proxy, database_url: str) -> str:
    parts = conninfo_to_dict(database_url)
    return f"postgresql://{parts['user']}:{parts.get('password', '')}@127.0.0.1:{proxy.port}/{parts['dbname']}"


def test_a_connection_that_falls_silent_before_its_first_answer_is_given_up(
    proxy: Proxy, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = psycopg.connect(through(proxy, database_url), autocommit=True)
    monkeypatch.setattr(psycopg, "connect", lambda *_, **__: made)
    with proxy.mute(), db.deadline(made, 3):
        started = time.monotonic()
        with pytest.raises(psycopg.OperationalError):
            db.connect(database_url, "test", answer_seconds=0.2)
        assert time.monotonic() - started < 2


def test_a_connection_that_falls_silent_when_it_is_looked_at_is_given_up(
    proxy: Proxy, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "ANSWER_SECONDS", 0.2)
    with db.connect(through(proxy, database_url), "test") as made, proxy.mute(), db.deadline(made, 3):
        started = time.monotonic()
        with pytest.raises(psycopg.OperationalError):
            roles.problems(made, roles.WORKER)
        assert time.monotonic() - started < 2


STRANGERS_OPERATOR = """
create function public.steal(text[], text[]) returns boolean language plpgsql as
  $$ begin raise exception 'ran as %', current_user; end $$;
create operator public.<> (function = public.steal, leftarg = text[], rightarg = text[])
"""


def test_an_operator_that_another_database_user_made_is_not_run_by_the_worker(
    connection: Connection, database_url: str
) -> None:
    connection.execute("create role login_stranger_2; grant create on schema public to login_stranger_2")
    try:
        with psycopg.connect(database_url, autocommit=True) as stranger:
            stranger.execute("set role login_stranger_2")
            stranger.execute(STRANGERS_OPERATOR)
        inbox.record(connection, [incoming(changed("user_a"))])
        with db.connect(database_url, "worker") as worker:
            sync.drain(worker, Policy())
        assert states(connection) == {"user_a": "done"}
    finally:
        connection.execute("drop owned by login_stranger_2; drop role login_stranger_2")


def test_the_sql_for_an_administrator_looks_nothing_up_in_others_schemas(connection: Connection) -> None:
    assert command("migrate", "--roles", env={"DATABASE_URL": None}).output.startswith("set search_path = '';")


def test_a_step_that_changes_the_inbox_locks_it_before_it_waits_for_its_workers(
    connect: Callable[[], Connection],
) -> None:
    worker, migrator = connect(), connect()
    inbox.record(worker, [incoming(changed("user_a"))])
    statements = (Path(migrations.__file__).parent / "versions" / "0006_pruning.sql").read_text("utf-8")
    with worker.transaction(force_rollback=True):
        assert len(inbox.claim(worker, 1)) == 1
        with migrator.transaction(force_rollback=True):
            migrator.execute("set local lock_timeout = '50ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                migrator.execute(statements.split(";")[0].encode())


def test_a_broker_that_is_failed_over_to_lets_only_wake_ups_through_too(redis_url: str) -> None:
    app = create_celery(f"redis://127.0.0.1:{local.free_port()}/0;{redis_url}")
    listener: Any = Listener.__new__(Listener)
    listener.app = app
    # What Celery's own connecting looks at.
    listener.hub, listener.initial_connection = None, True
    with listener.connection_for_read() as connection:
        channel: Any = connection.channel()
        with pytest.raises(NotOurs):
            channel.Message({"body": "", "headers": {"task": "evil"}, "properties": {}}, channel=channel)
