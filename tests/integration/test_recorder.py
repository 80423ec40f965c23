"""A recorder while Postgres, or the way to it, is half broken: everybody is answered in time, and it recovers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from tests.events import changed, incoming
from tests.waiting import until
from webhooks.recorder import Recorder
from worker import db, inbox
from worker.db import Connection
from worker.errors import Unavailable


class Way:
    """The way to Postgres, which may be blocked or refused; it counts who goes it."""

    def __init__(self, database_url: str) -> None:
        self.open = threading.Event()
        self.open.set()
        self.refused = False
        self.count = 0
        self._database_url = database_url
        self.made: list[Connection] = []

    def __call__(self) -> Connection:
        self.count += 1
        self.open.wait(10)
        if self.refused:
            raise psycopg.OperationalError("too many clients already")
        self.made.append(db.connect(self._database_url, "receiver", statement_ms=3000, lock_ms=200, answer_seconds=1))
        return self.made[-1]


@pytest.fixture
def way(database_url: str) -> Iterator[Way]:
    made = Way(database_url)
    yield made
    made.open.set()
    made.refused = False
    for connection in made.made:
        connection.close()


def event(number: int) -> inbox.Incoming:
    return incoming(changed(f"user_{number}"), f"msg_{number}")


def recorded(recorder: Recorder, number: int) -> bool:
    try:
        return recorder.record(event(number))()
    except Unavailable:
        return False


def test_a_server_that_takes_no_writes_and_then_swallows_everything_costs_a_burst_the_limit_once(way: Way) -> None:
    recorder = Recorder(way, limit_seconds=1)
    assert recorded(recorder, 0)
    way.made[0].execute("set default_transaction_read_only = on")
    way.open.clear()
    promises = [recorder.record(event(number)) for number in range(1, 101)]
    started = time.monotonic()
    for promise in promises:
        with pytest.raises(Unavailable):
            promise()
    assert time.monotonic() - started < 2
    way.open.set()
    until(lambda: recorded(recorder, 1))


def test_a_burst_that_postgres_refuses_as_a_whole_is_not_tried_one_by_one(
    way: Way, connect: Callable[[], Connection]
) -> None:
    recorder = Recorder(way)
    connection = connect()
    connection.execute("alter table clerk.webhook_events rename to elsewhere")
    try:
        promises = [recorder.record(event(number)) for number in range(50)]
        for promise in promises:
            with pytest.raises(Unavailable):
                promise()
    finally:
        connection.execute("alter table clerk.elsewhere rename to webhook_events")
    assert way.count == 1
    assert recorded(recorder, 1)


def test_connecting_that_takes_too_long_is_not_waited_for_and_its_connection_is_used_later(way: Way) -> None:
    recorder = Recorder(way, limit_seconds=0.5)
    way.open.clear()
    started = time.monotonic()
    assert not recorded(recorder, 1)
    assert time.monotonic() - started < 1.5
    way.open.set()
    until(lambda: recorded(recorder, 1))


def test_while_no_further_connection_is_to_be_had_those_at_hand_serve_everybody(
    way: Way, connect: Callable[[], Connection]
) -> None:
    recorder = Recorder(way)
    assert recorded(recorder, 0)
    way.refused = True
    connection = connect()
    with ThreadPoolExecutor(2) as pool:
        with connection.transaction():
            connection.execute("lock table clerk.webhook_events in exclusive mode")
            way.made[0].execute("set lock_timeout = 3000")
            first = pool.submit(recorded, recorder, 1)
            until(lambda: way.made[0].pgconn.transaction_status == psycopg.pq.TransactionStatus.ACTIVE)
            second = pool.submit(recorded, recorder, 2)
            until(lambda: way.count == 2)
        assert first.result()
        assert second.result()
    assert recorded(recorder, 3)


def test_deliveries_whose_time_went_to_our_own_queue_take_nobody_along(
    way: Way, connect: Callable[[], Connection]
) -> None:
    recorder = Recorder(way)
    assert recorded(recorder, 0)
    way.made[0].execute("set lock_timeout = 3000")
    connection = connect()
    with connection.transaction():
        connection.execute("lock table clerk.webhook_events in exclusive mode")
        with pytest.raises(Unavailable):
            recorder.record(event(1), time.monotonic() - 3)()
    assert recorder.record(event(2))()


def test_a_row_that_somebody_holds_costs_the_others_of_its_commit_nothing(
    way: Way, connect: Callable[[], Connection]
) -> None:
    recorder = Recorder(way)
    connection = connect()
    with connection.transaction():
        inbox.record(connection, [event(2)])
        promises = [recorder.record(event(number)) for number in (1, 2, 3)]
        assert promises[0]()
        with pytest.raises(Unavailable):
            promises[1]()
        assert promises[2]()
