"""The budget of calls to Clerk's API on real Postgres: never too many in any ten seconds, whoever asks."""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.waiting import until
from worker.api_budget import ApiBudget, allowed_calls
from worker.db import Connection

START = datetime(2026, 12, 1, tzinfo=UTC)
WINDOW = 10_000_000

BOOK_AT = "select clerk.book_api_call(%s, %s, %s)"


def new_key() -> str:
    return f"sk_test_{uuid.uuid4().hex}"


def book_at(connection: Connection, instance: str, allowed: int, microseconds: int) -> float:
    """Book by a clock of our own."""
    at = START + timedelta(microseconds=microseconds)
    ((seconds,),) = connection.execute(BOOK_AT, (instance, allowed, at)).fetchall()
    return float(seconds)


def bookings(connection: Connection, allowed: int, steps: list[int | None]) -> list[int]:
    """When calls were booked: after each step (None: the wait one was told) as many as there are."""
    instance = new_key()
    clock, told, booked = 0, 0.0, []
    for step in steps:
        clock += math.ceil(told * 1_000_000) if step is None else step
        while (told := book_at(connection, instance, allowed, clock)) == 0:
            booked.append(clock)
    return booked


def fullest_window(booked: list[int]) -> int:
    """The most calls in any ten seconds, both ends included."""
    return max(sum(first <= call <= first + WINDOW for call in booked[at:]) for at, first in enumerate(booked))


@given(
    st.integers(1, 60),
    st.lists(st.none() | st.integers(0, 50_000) | st.integers(0, WINDOW) | st.just(WINDOW), min_size=1, max_size=60),
)
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_ten_seconds_have_more_calls_than_allowed(db: Connection, allowed: int, steps: list[int | None]) -> None:
    booked = bookings(db, allowed, [WINDOW, *steps])
    assert 1 <= fullest_window(booked) <= allowed


@pytest.mark.parametrize("allowed", [1, 2, 5, 10, 19, 20, 50, 99, 500])
def test_who_asks_as_soon_as_told_gets_nearly_all(db: Connection, allowed: int) -> None:
    booked = bookings(db, allowed, [None] * (allowed * 2 + 2))
    assert fullest_window(booked) == allowed
    # In the long run all but the tenth that may come at once.
    calls = len(booked) - 1
    assert calls / (booked[-1] - booked[0]) * WINDOW >= allowed * 0.9 - 1e-3


def test_a_few_calls_after_a_rest_need_no_wait_but_never_more_than_a_tenth(db: Connection) -> None:
    instance = new_key()
    waits = [book_at(db, instance, 50, 0) for _ in range(7)]
    assert waits[:5] == [0.0] * 5
    assert 0 < waits[5] == waits[6] < 0.25


def test_a_clock_that_was_set_back_costs_ten_seconds_at_most(db: Connection) -> None:
    instance = new_key()
    while book_at(db, instance, 50, 3600 * 1_000_000) == 0:
        pass
    assert book_at(db, instance, 50, 0) <= 10.000001


def together(count: int, work: Callable[[int], int]) -> list[int]:
    """What each of some threads made of it; all of them begin at once."""
    results = [0] * count
    gate = threading.Barrier(count)

    def run(number: int) -> None:
        gate.wait(10)
        results[number] = work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_of_many_processes_at_one_moment_exactly_the_burst_is_booked(connect: Callable[[], Connection]) -> None:
    instance = new_key()
    connections = [connect() for _ in range(8)]

    def work(number: int) -> int:
        return sum(book_at(connections[number], instance, 500, 0) == 0 for _ in range(40))

    assert sum(together(8, work)) == 50


def test_many_processes_together_keep_the_rate_by_the_database_s_clock(connect: Callable[[], Connection]) -> None:
    key = new_key().replace("test", "live")
    budgets = [ApiBudget(connect(), key, 1.0) for _ in range(4)]
    began = time.monotonic()

    def work(number: int) -> int:
        booked = 0
        while time.monotonic() < began + 1:
            booked += budgets[number].take() == 0
        return booked

    booked = sum(together(4, work))
    elapsed = time.monotonic() - began
    # A burst of 100, then 90.1 a second, of which a busy machine may miss some.
    assert 120 <= booked <= 100 + 90.1 * elapsed + 1


def test_a_pause_holds_for_every_process_and_the_longer_one_stays(connect: Callable[[], Connection]) -> None:
    key = new_key()
    ours, another = ApiBudget(connect(), key, 0.5), ApiBudget(connect(), key, 0.5)
    assert another.take() == 0
    ours.block(60)
    ours.block(5)
    assert 55 < another.take() <= 60
    assert 55 < ApiBudget(connect(), key, 1.0).take() <= 60
    another.block(1e9)
    assert 3590 < ours.take() <= 3600


def test_a_pause_can_come_before_the_first_call_and_ends(connect: Callable[[], Connection]) -> None:
    budget = ApiBudget(connect(), new_key(), 0.5)
    budget.block(0.3)
    assert 0 < budget.take() <= 0.3
    until(lambda: budget.take() == 0)


def test_each_key_has_a_budget_of_its_own_and_is_not_written_down(connect: Callable[[], Connection]) -> None:
    connection, key = connect(), new_key()
    ApiBudget(connection, key, 0.5).block(60)
    assert ApiBudget(connection, new_key(), 0.5).take() == 0
    rows = connection.execute("select api_budget::text from clerk.api_budget").fetchall()
    assert rows
    assert not any(key in row or key.removeprefix("sk_test_") in row for (row,) in rows)


def test_without_the_database_there_is_no_booking(connect: Callable[[], Connection]) -> None:
    connection = connect()
    budget = ApiBudget(connection, new_key(), 0.5)
    connection.close()
    with pytest.raises(psycopg.OperationalError):
        budget.take()
    with pytest.raises(psycopg.OperationalError):
        budget.block(1)


def test_the_reader_can_neither_see_nor_book(db: Connection) -> None:
    for statement in ("select * from clerk.api_budget", "select clerk.book_api_call('x', 1)"):
        db.execute("set role clerk_reader")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            db.execute(statement)
        db.rollback()


@pytest.mark.parametrize(
    ("key", "share", "allowed"),
    [
        ("sk_live_x", 0.5, 500),
        ("sk_live_x", 1.0, 1000),
        ("sk_live_x", 0.01, 10),
        ("sk_test_x", 0.5, 50),
        ("sk_test_x", 0.29, 29),
        ("sk_test_x", 0.01, 1),
        ("sk_else", 1.0, 100),
    ],
)
def test_what_is_allowed_depends_on_the_kind_of_key(key: str, share: float, allowed: int) -> None:
    assert allowed_calls(key, share) == allowed
