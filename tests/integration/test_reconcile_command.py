"""`clerk-sync reconcile`: what it says, its JSON and its exit codes, against a stand-in for Clerk."""

from __future__ import annotations

import functools
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.events import changed, deleted, incoming
from tests.pulling import command, environment
from tests.waiting import until
from worker import inbox, runs, sync
from worker.db import Connection
from worker.policy import Policy
from worker.standin import Call, StandIn

Connect = Callable[[], Connection]

EARLY = 1_500_000_000_000


@pytest.fixture
def env(clerk: StandIn, database_url: str) -> dict[str, Any]:
    return environment(clerk, database_url)


def deliver(connection: Connection, *bodies: bytes) -> None:
    inbox.record(connection, [incoming(body) for body in bodies])
    sync.drain(connection, Policy())


def here(connection: Connection) -> set[str]:
    return {user_id for (user_id,) in connection.execute("select user_id from clerk.user_metadata")}


def drifted(connection: Connection, clerk: StandIn) -> None:
    """Of seven users at Clerk three are missing here, and one each outdated, tombstoned and newer; one here is gone."""
    for user_id in ("user_a", "user_b", "user_c", "user_d", "user_e", "user_f", "user_g"):
        clerk.put({"id": user_id, "updated_at": EARLY})
    deliver(
        connection,
        changed("user_d", EARLY - 1, private={"v": 1}),
        changed("user_e", EARLY),
        deleted("user_f", EARLY),
        changed("user_g", EARLY + 1),
        changed("user_gone", EARLY),
    )


# --- Repairing


def test_a_run_says_what_it_found_and_what_it_repaired(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    drifted(connection, clerk)
    ran = command("reconcile", env=env)
    assert (ran.exit_code, ran.stderr) == (0, "")
    ((run_id,),) = connection.execute("select id from clerk.runs").fetchall()
    *lines, calls = ran.stdout.splitlines()
    assert lines == [
        f"Run {run_id} is done: full, since all users fit in one page; 7 users compared.",
        "Repaired: 3 missing, 1 outdated, 1 gone at Clerk: erased.",
        "Newer here than what Clerk's answer said: 1 user, left as they are.",
        "Still at Clerk, but erased here, which is for ever: 1 user.",
    ]
    assert calls.startswith("3 calls to Clerk's API; ")
    assert here(connection) == set(clerk.users) - {"user_f"}
    ran = command("reconcile", env=env)
    assert (ran.exit_code, ran.stdout.splitlines()[1]) == (0, "Nothing differed.")


def test_json_has_every_count_and_nothing_else_is_printed(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    drifted(connection, clerk)
    clerk.odd("user_z", b'{"id": "user_z", "s3cr3t": "Canary"}')
    ran = command("reconcile", "--full", "--json", env=env)
    assert (ran.exit_code, ran.stderr) == (1, "")
    result = json.loads(ran.stdout)
    assert result.pop("seconds") >= 0
    ((run_id,),) = connection.execute("select id from clerk.runs").fetchall()
    assert result == {
        "run": run_id,
        "kind": "full",
        "cause": "asked",
        "state": "done",
        "users": 8,
        "applied": 4,
        "unchanged": 1,
        "older": 1,
        "tombstoned": 1,
        "unusable": 1,
        "missing": 3,
        "outdated": 1,
        "incomplete": 0,
        "gone": 1,
        "erased": 1,
        "calls": 3,
        "unusable_users": [{"user_id": "user_z", "reason": "updated_at is missing, so nothing tells the version"}],
    }
    ran = command("reconcile", env=env)
    assert ran.exit_code == 1
    assert "  user_z: updated_at is missing, so nothing tells the version\n" in ran.stdout
    assert "anary" not in ran.output


def test_the_first_run_is_full_then_only_the_latest_changes_are_compared(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    ids = clerk.fill(1_200)
    assert "is done: full, since no run was ever whole; 1,200 users compared." in command("reconcile", env=env).stdout
    clerk.update(ids[7], private_metadata={"v": 2})
    ran = command("reconcile", env=env)
    assert ran.exit_code == 0
    assert "is done: incremental, as asked for; 500 users compared.\nRepaired: 1 outdated.\n" in ran.stdout
    assert "\n2 calls to Clerk's API; " in ran.stdout
    assert "is done: full, as asked for; 1,200 users compared." in command("reconcile", "--full", env=env).stdout


def test_a_difference_between_the_counts_is_told_where_no_full_run_came_of_it(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    ids = clerk.fill(600)
    command("reconcile", env=env)
    # The last full run was so long that the next one is to wait.
    connection.execute("update clerk.runs set started_at = started_at - interval '1 hour'")
    clerk.delete(ids[3])
    ran = command("reconcile", env=env)
    assert ran.exit_code == 0
    assert (
        "Clerk counts 599 users, and here are 600: a difference of -1, where the last full run left 0. "
        "To compare everybody: clerk-sync reconcile --full\n"
    ) in ran.stdout


# --- Checking


def test_a_check_lists_what_differs_and_changes_nothing(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    drifted(connection, clerk)
    for number in range(10):
        clerk.put({"id": f"user_more{number}"})
    before = here(connection)
    ran = command("reconcile", "--check", env=env)
    assert (ran.exit_code, ran.stderr) == (1, "")
    first, _, *table, _, repair, tombstoned = [line.rstrip() for line in ran.stdout.splitlines()]
    assert first.startswith("15 users differ: 17 users compared, 4 calls; ")
    assert [line.split() for line in table if "outdated" in line or "gone" in line] == [
        ["outdated", "1", "user_d"],
        ["gone", "1", "user_gone"],
    ]
    assert table[0].split() == ["difference", "users", "who"]
    assert table[1].split() == ["missing", "13", "user_a"]
    assert table[11].strip() == "and 3 more: --json lists them"
    assert repair == "To repair them: clerk-sync reconcile --full"
    assert tombstoned == "Still at Clerk, but erased here, which is for ever: 1 user."
    assert here(connection) == before
    assert connection.execute("select from clerk.runs").fetchall() == []


def test_a_check_in_json_names_everybody_also_where_something_differs(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    drifted(connection, clerk)
    clerk.odd("user_z", b'{"id": "user_z"}')
    ran = command("reconcile", "--check", "--json", env=env)
    assert (ran.exit_code, ran.stderr) == (1, "")
    result = json.loads(ran.stdout)
    assert result.pop("seconds") >= 2
    assert result == {
        "compared": 8,
        "drift": {
            "missing": {"users": 3, "user_ids": ["user_a", "user_b", "user_c"]},
            "outdated": {"users": 1, "user_ids": ["user_d"]},
            "incomplete": {"users": 0, "user_ids": []},
            "gone": {"users": 1, "user_ids": ["user_gone"]},
        },
        "tombstoned": 1,
        "unusable": 1,
        "unusable_users": [{"user_id": "user_z", "reason": "updated_at is missing, so nothing tells the version"}],
        "calls": 4,
    }


def test_a_check_that_finds_nothing_says_so_in_a_line(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    clerk.fill(1_200)
    command("backfill", env=env)
    ran = command("reconcile", "--check", env=env)
    assert (ran.exit_code, ran.stdout) == (0, "Nothing differs: 1,200 users compared, 4 calls.\n")
    clerk.odd("user_z", b'{"id": "user_z"}')
    ran = command("reconcile", "--check", env=env)
    assert ran.exit_code == 1
    assert ran.stdout.startswith("Nothing differs: 1,201 users compared")
    assert "  user_z: updated_at is missing" in ran.stdout


# --- What can go wrong


def test_a_full_check_twice_over_is_a_usage_error(env: dict[str, Any]) -> None:
    ran = command("reconcile", "--full", "--check", env=env)
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert "give one of --full, --check" in ran.stderr


@pytest.mark.parametrize("option", ["--full", "--check"])
def test_without_a_key_or_with_a_wrong_one_or_without_clerk_nothing_changes(
    connection: Connection, clerk: StandIn, env: dict[str, Any], option: str
) -> None:
    deliver(connection, changed("user_a"))
    ran = command("reconcile", option, env=env | {"CLERK_SECRET_KEY": None})
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert "CLERK_SECRET_KEY is missing" in ran.stderr
    ran = command("reconcile", option, env=env | {"CLERK_SECRET_KEY": "sk_live_s3cr3tCanary"})
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert ran.stderr.startswith(
        "clerk-sync can't start:\n  CLERK_SECRET_KEY: Clerk's API refuses the key (401): copy "
    )
    clerk.close()
    ran = command("reconcile", option, "--patience", "0.2", env=env)
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert ran.stderr.startswith("clerk-sync: Clerk's API didn't answer for ")
    assert ran.stderr.count("\n") == 1
    assert here(connection) == {"user_a"}
    assert connection.execute("select from clerk.runs").fetchall() == []


def test_another_run_at_once_is_refused(connect: Connect, clerk: StandIn, env: dict[str, Any]) -> None:
    connection = connect()
    with runs.alone(connection):
        runs.begin(connection, runs.BACKFILL, "asked")
        ran = command("reconcile", env=env)
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert ran.stderr.startswith("clerk-sync: another backfill is running: run ")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "stays"),
    [("--full", "What was repaired stays; the next run compares again."), ("--check", "Nothing was changed.")],
)
def test_a_failure_in_the_middle_says_what_stays(
    connection: Connection, clerk: StandIn, env: dict[str, Any], option: str, stays: str
) -> None:
    clerk.fill(1_200)
    at_call(clerk, 3, lambda: clerk.fail(1_000, 500))
    ran = command("reconcile", option, "--patience", "0.2", env=env)
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert "didn't answer" in ran.stderr
    assert ran.stderr.endswith(f". {stays}\n")
    assert len(here(connection)) == (500 if option == "--full" else 0)


def at_call(clerk: StandIn, number: int, happens: Callable[[], object]) -> None:
    """Have something happen once, just before a call is answered; or the next, where two came at the same time."""
    once = threading.Lock()

    def before(_: Call) -> None:
        if len(clerk.calls) >= number and once.acquire(blocking=False):
            happens()

    clerk.before = before


def test_ctrl_c_at_a_terminal_ends_the_bar_and_says_what_stays(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    clerk.fill(8_000)
    whole = {**os.environ, "TERM": "xterm", "COLUMNS": "100"} | {k: v for k, v in env.items() if v is not None}
    ours, its = pty.openpty()
    arguments = [sys.executable, "-m", "worker.cli", "reconcile"]
    # Whoever runs the tests in the background of a shell has it ignored, and so would the command.
    heeded = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        arguments,
        env=whole,
        stdout=subprocess.PIPE,
        stderr=its,
        preexec_fn=heeded,  # noqa: PLW1509 - no other thread holds a lock that this needs
    ) as process:
        at_call(clerk, 6, lambda: process.send_signal(signal.SIGINT))
        said, _ = process.communicate(timeout=60)
    os.close(its)
    shown = os.read(ours, 65_536).decode()
    os.close(ours)
    assert (process.returncode, said) == (130, b"")
    assert "Comparing" in shown
    assert "of 8,000 users" in shown
    assert shown.endswith("Stopped. What was repaired stays; the next run compares again.\r\n")
    # Where it hit psycopg in the middle of a statement, nothing can be written over that connection any more.
    until(lambda: runs.overview(connection)[0].state in ("failed", "cut short"), what="the end of the run")
