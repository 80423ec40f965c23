"""The doorbell, the sweeper and the broker: what a wake-up carries, and that nobody depends on one."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
import redis

from tests.events import changed, incoming
from tests.waiting import until
from webhooks.doorbell import PAUSE_SECONDS, Doorbell, Publisher
from worker import db, inbox, sweeper
from worker.app import QUEUE, create_celery, waiting
from worker.db import Connection
from worker.errors import BrokerDown, SyncError
from worker.policy import Policy
from worker.sweeper import Drainer, Sweeper, Watch


@pytest.fixture
def broker(redis_url: str) -> Iterator[redis.Redis]:
    """The broker, empty before and after."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        yield client
        client.flushall()


@pytest.fixture
def silent_url() -> Iterator[str]:
    """A broker that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


def test_a_wake_up_carries_nothing(broker: redis.Redis, redis_url: str) -> None:
    Publisher(create_celery(redis_url))()
    (message,) = broker.lrange(QUEUE, 0, -1)
    sent: dict[str, Any] = json.loads(message)
    assert sent["headers"]["task"] == "clerk.drain"
    assert (sent["headers"]["argsrepr"], sent["headers"]["kwargsrepr"]) == ("()", "{}")
    assert sent["content-type"] == "application/json"


def test_one_waiting_wake_up_is_enough(broker: redis.Redis, redis_url: str) -> None:
    publish = Publisher(create_celery(redis_url))
    for _ in range(5):
        publish()
    assert broker.llen(QUEUE) == 1
    broker.delete(QUEUE)
    publish()
    assert broker.llen(QUEUE) == 1


def test_the_publisher_looks_and_sends_over_the_connections_it_has(broker: redis.Redis, redis_url: str) -> None:
    def connections() -> int:
        found: dict[str, Any] = broker.info("stats")
        return int(found["total_connections_received"])

    publish = Publisher(create_celery(redis_url))
    publish()
    before = connections()
    for _ in range(5):
        publish()
        broker.delete(QUEUE)
        publish()
    assert connections() == before


def test_a_burst_of_rings_is_a_few_publishes_and_the_last_ring_is_heard() -> None:
    published: list[float] = []
    doorbell = Doorbell(lambda: published.append(time.monotonic()))
    started = time.monotonic()
    for _ in range(20_000):
        doorbell.ring()
    last = time.monotonic()
    until(lambda: published and published[-1] >= last)
    assert len(published) <= 2 + (published[-1] - started) / PAUSE_SECONDS


@pytest.mark.parametrize("state", ["silent", "refusing"])
def test_ringing_never_waits_for_a_broker_that_is_away(silent_url: str, state: str) -> None:
    url = silent_url if state == "silent" else "redis://127.0.0.1:1/0"
    doorbell = Doorbell(Publisher(create_celery(url)))
    started = time.monotonic()
    for _ in range(1000):
        doorbell.ring()
    assert time.monotonic() - started < 0.2


def test_a_broker_that_is_away_is_told_in_one_error(silent_url: str) -> None:
    apps = [create_celery(url) for url in (silent_url, "redis://127.0.0.1:1/0")]
    started = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        published = [pool.submit(Publisher(app)) for app in apps]
        waits = [pool.submit(waiting, app) for app in apps]
        assert [type(one.exception()) for one in published] == [BrokerDown] * 2
        assert [one.result() for one in waits] == [None] * 2
    # Each gives up within some 5 s.
    assert time.monotonic() - started < 10


def test_the_publisher_goes_on_after_its_connection_was_cut(broker: redis.Redis, redis_url: str) -> None:
    publish = Publisher(create_celery(redis_url))
    publish()
    broker.flushall()
    broker.client_kill_filter(_type="normal", skipme=True)
    for _ in range(2):
        try:
            publish()
            break
        except BrokerDown:
            continue
    assert broker.llen(QUEUE) == 1


def test_a_broker_that_is_full_is_away(broker: redis.Redis, redis_url: str) -> None:
    broker.config_set("maxmemory", "1")
    try:
        with pytest.raises(BrokerDown):
            Publisher(create_celery(redis_url))()
    finally:
        broker.config_set("maxmemory", "0")


@pytest.fixture
def drainer(database_url: str) -> Iterator[Drainer]:
    made = Drainer(lambda: db.connect(database_url, "worker"), Policy())
    yield made
    made.close()


def pending(connection: Connection) -> int:
    query = "select count(*) from clerk.webhook_events where state = 'pending'"
    (count,) = connection.execute(query).fetchone() or (0,)
    return int(count)


def test_the_sweeper_applies_what_no_doorbell_told_of(
    connect: Callable[[], Connection], drainer: Drainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "SWEEP_SECONDS", 0.05)
    thread = Sweeper(drainer)
    thread.start()
    try:
        connection = connect()
        inbox.record(connection, [incoming(changed())])
        until(lambda: pending(connection) == 0)
        assert connection.execute("select count(*) from clerk.user_metadata").fetchone() == (1,)
    finally:
        thread.stop()
        thread.join(10)
    assert not thread.is_alive()


BLOCKED = """
select from pg_stat_activity where application_name = 'clerk-sync worker' and wait_event_type = 'Lock'
"""


def test_a_drain_that_runs_looks_again_for_whoever_rang_meanwhile(
    connect: Callable[[], Connection], drainer: Drainer
) -> None:
    connection, other = connect(), connect()
    inbox.record(connection, [incoming(changed("user_a"))])
    with connection.transaction():
        connection.execute("lock table clerk.users in exclusive mode")
        running = threading.Thread(target=drainer.ring, args=("sweep",))
        running.start()
        until(lambda: other.execute(BLOCKED).fetchone() is not None)
        inbox.record(other, [incoming(changed("user_b"))])
        assert drainer.ring("doorbell")  # returns at once: the one that runs looks again
    running.join(10)
    assert pending(connection) == 0


def test_without_postgres_a_drain_says_so_and_the_next_one_works(
    connect: Callable[[], Connection], database_url: str
) -> None:
    urls = ["postgresql://nobody@127.0.0.1:1/none", database_url]
    drainer = Drainer(lambda: db.connect(urls[0], "worker"), Policy())
    connection = connect()
    inbox.record(connection, [incoming(changed())])
    assert not drainer.ring("sweep")
    urls.reverse()
    assert drainer.ring("sweep")
    drainer.close()
    assert pending(connection) == 0


def test_a_schema_that_the_code_does_not_know_is_left_alone_and_told_of_once(
    drainer: Drainer, connect: Callable[[], Connection], caplog: pytest.LogCaptureFixture
) -> None:
    connection = connect()
    inbox.record(connection, [incoming(changed())])
    connection.execute("update clerk.schema_version set version_num = '9999'")
    try:
        assert [drainer.ring("sweep") for _ in range(3)] == [False] * 3
    finally:
        connection.execute("update clerk.schema_version set version_num = %s", (db.SCHEMA_VERSION,))
    (record,) = caplog.records
    assert "newer than this code" in vars(record)["reason"]
    assert pending(connection) == 1


def test_a_failure_that_is_no_outage_is_told_without_what_the_database_said(
    connect: Callable[[], Connection], drainer: Drainer
) -> None:
    connection = connect()
    inbox.record(connection, [incoming(changed())])
    connection.execute("alter function clerk.gate_users rename to gate_elsewhere")
    try:
        with pytest.raises(SyncError, match=r"draining failed: UndefinedFunction \(42883\)") as caught:
            drainer.ring("sweep")
    finally:
        connection.execute("alter function clerk.gate_elsewhere rename to gate_users")
    assert caught.value.__cause__ is None
    assert pending(connection) == 1


def test_an_error_nobody_thought_of_replaces_the_worker(monkeypatch: pytest.MonkeyPatch, drainer: Drainer) -> None:
    replaced = threading.Event()
    monkeypatch.setattr(drainer, "ring", lambda _: 1 / 0)
    thread = Sweeper(drainer, replaced.set)
    thread.start()
    assert replaced.wait(10)
    thread.join(10)


def test_a_worker_that_leaves_wake_ups_unheard_is_replaced_and_one_that_hears_is_not(
    monkeypatch: pytest.MonkeyPatch, broker: redis.Redis, redis_url: str
) -> None:
    monkeypatch.setattr(sweeper, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(sweeper, "DEAF_SECONDS", 0.3)
    app = create_celery(redis_url)
    replaced, busy = threading.Event(), threading.Event()
    thread = Watch(lambda: waiting(app), busy.is_set, replaced.set)
    thread.start()
    try:
        assert not replaced.wait(0.6), "nothing waits in the queue"
        busy.set()
        Publisher(app)()
        assert not replaced.wait(0.6), "it is draining"
        for _ in range(60):
            thread.heard()
            busy.clear()
            assert not replaced.wait(0.01), "it hears"
        assert replaced.wait(10)
    finally:
        thread.stop()
        thread.join(10)


def test_a_connection_can_be_abandoned_from_another_thread(connect: Callable[[], Connection]) -> None:
    connection = connect()
    with db.deadline(connection, 0.2), pytest.raises(psycopg.OperationalError):
        connection.execute("select pg_sleep(30)")
