"""`clerk-sync status` and `/metrics` on the runs that pull from Clerk."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.clerk import SECRET
from tests.pulling import command, environment
from webhooks.health import Health
from worker import metrics, roles, runs
from worker.db import Connection
from worker.standin import StandIn

Connect = Callable[[], Connection]


def test_a_later_full_run_makes_up_for_a_failed_one(connection: Connection, clerk: StandIn) -> None:
    runs.record_failure(connection, runs.INCREMENTAL, "no answer")
    assert [one.failed for one in runs.overview(connection)] == [True]
    full = runs.begin(connection, runs.FULL, "small")
    assert {one.last.kind: one.failed for one in runs.overview(connection)}[runs.INCREMENTAL]
    full.state = "done"
    runs.save(connection, full)
    assert not any(one.failed for one in runs.overview(connection))


@pytest.fixture
def env(clerk: StandIn, database_url: str) -> dict[str, Any]:
    return environment(clerk, database_url, REDIS_URL=None, REDIS_URL_FILE=None, RECONCILE_SECONDS="100")


def reconcile_check(env: dict[str, Any]) -> dict[str, Any]:
    """What `status --json` says of the reconcile."""
    found = json.loads(command("status", "--json", env=env).stdout)
    (check,) = [check for check in found["checks"] if check["name"] == "reconcile"]
    assert check["ok"] == (check["problem"] is None)
    assert isinstance(check, dict)
    return check


def test_without_a_key_or_an_interval_the_reconcile_is_off(connection: Connection, env: dict[str, Any]) -> None:
    off = {"name": "reconcile", "ok": True, "problem": None}
    assert reconcile_check(env | {"CLERK_SECRET_KEY": None}) == off | {"off": "CLERK_SECRET_KEY isn't set"}
    assert reconcile_check(env | {"RECONCILE_SECONDS": "0"}) == off | {"off": "RECONCILE_SECONDS is 0"}


def test_a_reconcile_that_is_late_by_the_databases_clock_fails_the_check(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    assert "no run was ever done, and one is due every 100 s" in reconcile_check(env)["problem"]
    command("backfill", env=env)
    assert reconcile_check(env)["problem"] is None
    connection.execute("update clerk.runs set finished_at = finished_at - interval '350 seconds'")
    assert reconcile_check(env)["problem"] is None
    connection.execute("update clerk.runs set finished_at = finished_at - interval '20 seconds'")
    late = reconcile_check(env)["problem"]
    assert late.startswith("no run was done for 6 min, and one is due every 100 s: are the workers there")
    with runs.alone(connection):
        runs.begin(connection, runs.FULL, "periodic")
        assert reconcile_check(env)["problem"] is None
    assert command("status", env=env).exit_code == 1


def test_a_run_that_failed_or_was_cut_short_fails_the_check_until_one_is_done(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    runs.record_failure(connection, runs.INCREMENTAL, "CLERK_SECRET_KEY: Clerk's API refuses the key (401)")
    assert reconcile_check(env)["problem"] == (
        "the last run (incremental) failed: CLERK_SECRET_KEY: Clerk's API refuses the key (401). "
        "To try again: clerk-sync reconcile"
    )
    runs.begin(connection, runs.BACKFILL, "asked")
    assert reconcile_check(env)["problem"] == (
        "the last run (backfill) was cut short: its process or its connection ended. To try again: clerk-sync backfill"
    )
    command("reconcile", env=env)
    assert reconcile_check(env)["problem"] is None


def test_the_last_run_of_each_kind_is_shown(connection: Connection, clerk: StandIn, env: dict[str, Any]) -> None:
    clerk.fill(3)
    command("backfill", env=env)
    clerk.put({"id": "user_a"})
    command("reconcile", env=env)
    runs.begin(connection, runs.INCREMENTAL, "periodic")
    found = json.loads(command("status", "--json", env=env).stdout)["runs"]
    assert [(run["kind"], run["cause"], run["state"]) for run in found] == [
        ("incremental", "periodic", "cut short"),
        ("full", "small", "done"),
        ("backfill", "asked", "done"),
    ]
    assert (found[0]["finished_at"], found[0]["done_at"]) == (None, None)
    assert found[1]["done_at"] == found[1]["finished_at"]
    assert {name: found[1][name] for name in ("users", "missing", "gone", "calls")} == {
        "users": 4,
        "missing": 1,
        "gone": 0,
        "calls": 2,
    }
    ran = command("status", env=env | {"COLUMNS": "200"})
    table = [" ".join(line.split()) for line in ran.stdout.splitlines()[-4:]]
    assert table[0] == "last run why state when users calls found"
    assert table[1].startswith("incremental periodic cut short ")
    assert table[2].startswith("full since all users fit in one page done ")
    assert table[2].endswith(" s ago 4 2 1 missing")
    assert table[3].endswith(" s ago 3 2 3 applied")


def failing(env: dict[str, Any]) -> dict[str, str]:
    """The checks of `status --json` that fail, with what to do."""
    ran = command("status", "--json", env=env)
    found = {check["name"]: check["problem"] for check in json.loads(ran.stdout)["checks"] if not check["ok"]}
    assert ran.exit_code == (1 if found else 0)
    return found


def test_what_keeps_workers_from_their_work_fails_a_check_that_says_what_to_do(
    connection: Connection, env: dict[str, Any]
) -> None:
    connection.execute("create role login_of_status login password 'status' in role clerk_worker")
    parts = conninfo_to_dict(env["DATABASE_URL"])
    login = f"postgresql://login_of_status:status@{parts['host']}:{parts['port']}/{parts['dbname']}"
    env |= {"DATABASE_URL": login, "RECONCILE_SECONDS": "0", "CLERK_WEBHOOK_SIGNING_SECRET": SECRET}
    try:
        assert failing(env).keys() == {"configuration"}  # there is no REDIS_URL
        connection.execute("revoke delete on clerk.runs from clerk_worker")
        connection.execute("alter role login_of_status set default_transaction_read_only = on")
        found = failing(env)
        assert found.pop("configuration")
        assert found == {
            "privileges": "this database role lacks delete on clerk.runs: grant it clerk_worker, which clerk-sync "
            "migrate makes (clerk-sync migrate --roles prints the SQL for an administrator)",
            "writing": roles.READ_ONLY,
        }
        connection.execute("revoke usage on schema clerk from clerk_worker")
        assert failing(env)["schema"] == roles.HIDDEN
    finally:
        connection.execute(roles.grants().encode())
        connection.execute("drop role login_of_status")


def run_lines(connect: Connect) -> list[str]:
    """The samples of runs in /metrics, without the times."""
    text = metrics.render(Health(connect).counts()).decode()
    lines = [line.removeprefix("clerk_sync_run_") for line in text.splitlines() if line.startswith("clerk_sync_run_")]
    return [line.split("} ")[0] + "}" if line.startswith("last_done") else line for line in lines]


def test_metrics_tell_of_the_runs_that_there_were(
    connection: Connection, connect: Connect, clerk: StandIn, env: dict[str, Any]
) -> None:
    assert run_lines(connect) == []
    clerk.fill(3)
    command("reconcile", env=env)
    with runs.alone(connection):
        runs.begin(connection, runs.BACKFILL, "asked")
        assert run_lines(connect) == [
            'last_done_timestamp_seconds{kind="full"}',
            'last_failed{kind="backfill"} 0.0',
            'last_failed{kind="full"} 0.0',
            'running{kind="backfill"} 1.0',
            'running{kind="full"} 0.0',
            'repaired_users{kind="full"} 3.0',
            'unusable_users{kind="full"} 0.0',
            'calls{kind="full"} 2.0',
        ]
    failed = runs.begin(connection, runs.FULL, "asked")
    runs.fail(connection, failed, "interrupted")
    lines = run_lines(connect)
    # What the last one did that was done stays; a backfill that was cut short has failed too.
    assert 'repaired_users{kind="full"} 3.0' in lines
    assert 'last_failed{kind="full"} 1.0' in lines
    assert 'last_failed{kind="backfill"} 1.0' in lines
