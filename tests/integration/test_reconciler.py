"""The periodic reconcile of a worker process: when it runs, what fails it, and how it ends."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import psycopg
import pytest

from tests.pulling import LIVE
from tests.waiting import until
from worker import db, reconciler, runs
from worker.db import Connection
from worker.reconciler import Reconciler
from worker.settings import Settings
from worker.standin import Call, StandIn

RUNS = "select kind, state, calls, error from clerk.runs order by id"
IDS = "select user_id from clerk.user_metadata order by user_id"

NEVER: Final = 86_400
"""An interval after which no test looks by itself whether a run is overdue."""

Make = Callable[..., Reconciler]


@pytest.fixture
def clerk() -> Iterator[StandIn]:
    with StandIn(LIVE, limit=100_000) as standin:
        standin.put({"id": "user_a"})
        yield standin


@pytest.fixture
def make(
    clerk: StandIn, database_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Make]:
    """Makes reconcilers that heed every ring; they are stopped after the test."""
    caplog.set_level(logging.INFO, "worker")
    monkeypatch.setattr(reconciler, "RING_INTERVALS", 0)
    made: list[Reconciler] = []

    def make_one(
        seconds: int = NEVER, *, secret_key: str = clerk.secret_key, database_url: str = database_url
    ) -> Reconciler:
        settings = Settings(
            database_url=database_url,
            secret_key=secret_key,
            api_url=clerk.url,
            api_share=1.0,
            reconcile_seconds=seconds,
        )
        made.append(Reconciler(settings))
        return made[-1]

    yield make_one
    clerk.before = None
    for one in made:
        one.stop()
    for one in made:
        assert one.join(10)


def ran(connection: Connection) -> list[tuple[str, str, int, str | None]]:
    """Kind, state, calls and error of each run."""
    return connection.execute(RUNS).fetchall()


def here(connection: Connection) -> list[str]:
    return [user_id for (user_id,) in connection.execute(IDS)]


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, Any]]:
    """Level, sentence and reason of each line of ours."""
    return [
        (record.levelname, record.getMessage(), getattr(record, "reason", None))
        for record in list(caplog.records)
        if record.name == reconciler.__name__
    ]


class Held:
    """Holds up requests for users until it is let go."""

    def __init__(self, clerk: StandIn) -> None:
        self.came = threading.Event()
        self.go = threading.Event()
        clerk.before = self._hold

    def _hold(self, call: Call) -> None:
        if call.path == "/v1/users":
            self.came.set()
            assert self.go.wait(20)


def test_a_ring_returns_at_once_and_makes_one_run(
    make: Make, clerk: StandIn, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    held = Held(clerk)
    make().ring()  # starts the thread, too
    assert held.came.wait(10)  # while the run waits, the ring has returned
    held.go.set()
    until(lambda: said(caplog))
    assert ran(connection) == [("full", "done", 2, None)]
    assert here(connection) == ["user_a"]
    (record,) = (record for record in caplog.records if record.name == reconciler.__name__)
    assert record.getMessage() == "reconciled"
    fields = {name: getattr(record, name) for name in ("kind", "cause", "applied", "missing", "calls")}
    assert fields == {"kind": "full", "cause": "small", "applied": 1, "missing": 1, "calls": 2}
    assert "user_a" not in str(vars(record))


def test_a_ring_soon_after_the_last_run_does_nothing(
    make: Make, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make()
    assert one._look(rung=True)
    monkeypatch.setattr(reconciler, "RING_INTERVALS", 0.5)
    assert not one._look(rung=True)
    assert len(ran(connection)) == 1


def test_rings_during_a_run_are_dropped(
    make: Make, clerk: StandIn, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    held = Held(clerk)
    one = make()
    one.ring()
    assert held.came.wait(10)
    for _ in range(3):
        one.ring()
    held.go.set()
    until(lambda: said(caplog))
    one.stop()
    assert one.join(10)
    assert len(ran(connection)) == 1


def test_without_any_ring_a_run_is_made_as_soon_as_it_is_overdue(
    make: Make, clerk: StandIn, connection: Connection
) -> None:
    make(1).start()
    until(lambda: here(connection) == ["user_a"], what="the first run")
    clerk.put({"id": "user_b"})
    until(lambda: here(connection) == ["user_a", "user_b"], what="the run that is overdue")


def test_what_is_not_overdue_is_left_alone(make: Make, clerk: StandIn, connection: Connection) -> None:
    runs.record_failure(connection, runs.INCREMENTAL, "away")
    one = make(600)
    assert not one._look(rung=False)
    connection.execute("update clerk.runs set started_at = now() - interval '1 h', finished_at = null")
    assert one._look(rung=False)
    assert here(connection) == ["user_a"]


def test_two_processes_exclude_each_other_and_that_is_no_failure(
    make: Make, clerk: StandIn, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    held = Held(clerk)
    make().ring()
    assert held.came.wait(10)
    assert not make()._look(rung=True)
    held.go.set()
    until(lambda: said(caplog))
    assert said(caplog) == [("INFO", "reconciled", None)]
    assert len(ran(connection)) == 1


def test_a_wrong_key_is_one_sentence_and_a_failure_that_status_shows_until_the_key_is_right(
    make: Make, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = make(secret_key="sk_live_wrong")
    for _ in range(2):
        assert wrong._look(rung=True)
    reason = "CLERK_SECRET_KEY: Clerk's API refuses the key (401): copy the Secret key from Clerk's Dashboard, API keys"
    assert said(caplog) == [("ERROR", "the periodic reconcile failed", reason)] * 2
    assert not any(record.exc_info for record in caplog.records)
    assert ran(connection) == [("incremental", "failed", 0, reason)]  # failures in a row are one
    assert make()._look(rung=True)
    assert [run[:2] for run in ran(connection)] == [("incremental", "failed"), ("full", "done")]


def test_another_instance_s_key_erases_nobody_and_is_recorded(
    make: Make, clerk: StandIn, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    assert make()._look(rung=True)
    clerk.delete("user_a")
    clerk.secret_key = "sk_live_of_another_instance"
    assert make(secret_key=clerk.secret_key)._look(rung=True)
    ((level, _, reason),) = said(caplog)[1:]
    assert (level, "key may be that of another instance" in reason) == ("ERROR", True)
    assert here(connection) == ["user_a"]
    assert [(kind, state) for kind, state, _, _ in ran(connection)] == [("full", "done"), ("incremental", "failed")]


def test_a_run_that_has_begun_records_its_own_failure_and_the_next_one_recovers(
    make: Make, clerk: StandIn, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    clerk.before = lambda call: clerk.fail(1, 400) if call.path == "/v1/users" else None
    one = make()
    assert one._look(rung=True)
    reason = "Clerk's API refuses the request: 400 (internal_error)"
    assert ran(connection) == [("full", "failed", 2, reason)]
    assert said(caplog) == [("ERROR", "the periodic reconcile failed", reason)]
    clerk.before = None
    assert one._look(rung=True)
    assert [run[:2] for run in ran(connection)] == [("full", "failed"), ("full", "done")]


@pytest.mark.parametrize("waits_for", ["a pause that Clerk asks for", "the next page"])
def test_a_stop_ends_a_run_within_seconds_and_it_is_recorded(
    make: Make, clerk: StandIn, connection: Connection, caplog: pytest.LogCaptureFixture, waits_for: str
) -> None:
    clerk.fill(2_000)
    in_page = threading.Event()

    def before(call: Any) -> None:
        if call.path == "/v1/users":
            in_page.set()
            if waits_for != "the next page":
                clerk.fail(1, 429, retry_after=100)

    clerk.before = before
    one = make()
    one.ring()
    assert in_page.wait(10)
    if waits_for == "the next page":
        clerk.slow(0.5)
    else:
        until(lambda: any("asked again" in record.getMessage() for record in caplog.records))
    started = time.monotonic()
    one.stop()
    assert one.join(5)
    assert time.monotonic() - started < 3
    ((_, state, _, error),) = ran(connection)
    assert (state, error) == ("failed", "the worker is stopping")
    assert said(caplog) == [("INFO", "the periodic reconcile was cut short: the worker is stopping", None)]
    with psycopg.connect(connection.info.dsn, password=connection.info.password) as other:
        assert [kind.running for kind in runs.overview(other)] == [False]


def test_a_stop_is_not_held_up_by_an_answer_that_does_not_come(make: Make, clerk: StandIn) -> None:
    held = Held(clerk)
    one = make()
    one.ring()
    assert held.came.wait(10)
    one.stop()
    assert not one.join(0.01)
    held.go.set()
    assert one.join(10)


def test_a_schema_that_the_code_does_not_know_is_left_alone(
    make: Make, clerk: StandIn, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    (version,) = connection.execute("select version_num from clerk.schema_version").fetchone() or ("",)
    connection.execute("update clerk.schema_version set version_num = '9999'")
    try:
        make()._look(rung=True)
    finally:
        connection.execute("update clerk.schema_version set version_num = %s", (version,))
    ((level, sentence, reason),) = said(caplog)
    assert (level, sentence) == ("ERROR", "the periodic reconcile failed")
    assert "newer than this code" in reason
    assert clerk.calls == []
    assert ran(connection) == []


def test_a_database_that_is_away_is_a_warning_and_nothing_is_recorded(
    make: Make, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    make(database_url="postgresql://u@127.0.0.1:1/d")._look(rung=True)
    ((level, _, reason),) = said(caplog)
    assert level == "WARNING"
    assert reason.startswith("Postgres failed: OperationalError")
    assert ran(connection) == []


def test_an_error_nobody_thought_of_is_told_recorded_and_survived(
    make: Make, connection: Connection, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make()
    with monkeypatch.context() as patched:
        patched.setattr(reconciler, "reconcile", lambda *_, **__: 1 / 0)
        one.ring()
        until(lambda: ran(connection))
    assert ran(connection) == [("incremental", "failed", 0, "ZeroDivisionError")]
    assert said(caplog) == [("CRITICAL", "the periodic reconcile failed unexpectedly", None)]

    def rung_again() -> bool:
        one.ring()
        return here(connection) == ["user_a"]

    until(rung_again)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_starts_a_thread_of_its_own(make: Make, connection: Connection, database_url: str) -> None:
    one = make()
    one.start()
    child = os.fork()
    if not child:
        try:
            one.reset()
            one.ring()
            with db.connect(database_url, "test") as own:
                until(lambda: here(own))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert here(connection) == ["user_a"]
    assert one._thread
    assert one._thread.is_alive()
