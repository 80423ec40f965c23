"""`refresh`: single users brought up to date from Clerk, and those erased that Clerk no longer has."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.events import changed, deleted, incoming
from tests.pulling import LIVE, api_of, command, environment
from worker import inbox, sync, users
from worker.clerk_api import ClerkApi
from worker.db import Connection
from worker.errors import SyncError
from worker.policy import Copy, Policy
from worker.refresh import Result, refresh_missing, refresh_users
from worker.standin import Call, StandIn

Connect = Callable[[], Connection]
T0 = 1_700_000_000_000
EVERYTHING = Policy(public=Copy.ALWAYS, unsafe=Copy.ALWAYS)

ROWS = "select user_id, private_metadata, public_metadata from clerk.user_metadata order by user_id"
TOMBSTONES = "select user_id, extract(epoch from deleted_at)::bigint from clerk.users where deleted_at is not null"


def deliver(connection: Connection, *bodies: bytes) -> None:
    inbox.record(connection, [incoming(body) for body in bodies])
    sync.drain(connection, Policy())


def rows(connection: Connection) -> dict[str, tuple[Any, Any]]:
    return {user_id: (private, public) for user_id, private, public in connection.execute(ROWS)}


def tombstones(connection: Connection) -> dict[str, int]:
    return dict(connection.execute(TOMBSTONES).fetchall())


def run(connection: Connection, api: ClerkApi, *user_ids: str, policy: Policy | None = None) -> dict[str, str]:
    batches = refresh_users(connection, policy or Policy(), api, user_ids)
    return {result.user_id: result.outcome for batch in batches for result in batch}


def test_each_user_becomes_what_clerk_has_and_the_newer_one_stays(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    deliver(
        connection,
        changed("user_same", T0, private={"v": 1}),
        changed("user_behind", T0, private={"v": 1}),
        changed("user_ahead", T0 + 5, private={"v": 2}),
        changed("user_buried", T0),
        deleted("user_buried", T0 + 1),
        changed("user_gone", T0, private={"v": 1}),
    )
    for name, version in (("same", 1), ("behind", 2), ("ahead", 1), ("buried", 1), ("new", 1)):
        at = T0 + 1 if name == "behind" else T0
        clerk.put({"id": f"user_{name}", "updated_at": at, "private_metadata": {"v": version}})
    names = ("same", "behind", "ahead", "buried", "gone", "new")
    assert run(connection, api, *(f"user_{name}" for name in names)) == {
        "user_same": "unchanged",
        "user_behind": "applied",
        "user_ahead": "older",
        "user_buried": "deleted",
        "user_gone": "erased",
        "user_new": "applied",
    }
    assert {user_id: private["v"] for user_id, (private, _) in rows(connection).items()} == {
        "user_ahead": 2,
        "user_behind": 2,
        "user_new": 1,
        "user_same": 1,
    }
    assert api.calls == 1


def test_a_user_that_clerk_lacks_is_erased_with_the_inbox_and_no_late_event_brings_them_back(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    deliver(connection, changed("user_a", T0, private={"v": 1}), changed("user_a", T0 + 1, private=["not an object"]))
    assert run(connection, api, "user_a", "user_never_was") == {"user_a": "erased", "user_never_was": "unknown"}
    deliver(connection, changed("user_a", T0 + 9, private={"v": 2}))
    assert rows(connection) == {}
    ((bodies,),) = connection.execute("select count(body) from clerk.webhook_events").fetchall()
    assert bodies == 0
    assert run(connection, api, "user_a") == {"user_a": "deleted"}


def test_an_erased_user_is_dated_by_the_answer_and_the_earliest_date_stays(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ((now,),) = connection.execute("select extract(epoch from now())::bigint").fetchall()
    deliver(connection, changed("user_a", T0))
    run(connection, api, "user_a")
    first = tombstones(connection)["user_a"]
    assert abs(first - now) < 30
    deliver(connection, deleted("user_a", T0))
    run(connection, api, "user_a")
    assert tombstones(connection) == {"user_a": T0 // 1000}


def test_a_hundred_users_take_a_call_and_nobody_is_asked_for_twice(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = clerk.fill(250, private=b'{"v":1}')
    results = list(refresh_users(connection, Policy(), api, [*ids, *ids]))
    assert [len(batch) for batch in results] == [100, 100, 50]
    assert [result.user_id for batch in results for result in batch] == ids
    assert api.calls == 3
    assert len(rows(connection)) == 250


def test_an_unusable_user_is_told_with_the_reason_and_the_others_go_on(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    deliver(connection, changed("user_odd", T0, private={"v": 1}))
    clerk.put({"id": "user_a"})
    clerk.odd("user_odd", b'{"id": "user_odd", "updated_at": "s3cr3tCanary"}')
    clerk.put({"id": "user_b", "private_metadata": "s3cr3tCanary"})
    ((a, odd, b),) = refresh_users(connection, Policy(), api, ["user_a", "user_odd", "user_b"])
    assert a == Result("user_a", "applied")
    assert odd == Result("user_odd", "unusable", "updated_at is not an integer")
    assert b == Result("user_b", "unusable", "private_metadata is not an object")
    assert rows(connection)["user_odd"] == ({"v": 1}, None)


@pytest.mark.parametrize("raw", [b'{"id": null}', b"17", b'{"id": "user_c", "id": 5}'])
def test_where_an_id_cannot_be_read_nobody_is_erased_who_may_be_that_user(
    connection: Connection, clerk: StandIn, api: ClerkApi, raw: bytes
) -> None:
    ids = clerk.fill(60)
    deliver(connection, *(changed(user_id, T0) for user_id in ids))
    clerk.odd(ids[20], raw)
    for user_id in ids[40:]:
        clerk.delete(user_id)
    outcomes = run(connection, api, *ids)
    assert outcomes[ids[20]] == "unusable"
    assert {outcomes[user_id] for user_id in ids[40:]} == {"erased"}
    assert all(outcomes[user_id] in ("applied", "unchanged") for user_id in (*ids[:20], *ids[21:40]))
    assert ids[20] in rows(connection)
    assert api.calls <= 15


def test_one_user_whom_postgres_refuses_does_not_keep_the_others_out(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = clerk.fill(5)
    connection.execute(f"alter table clerk.users add constraint refused check (user_id <> '{ids[2]}')")
    try:
        outcomes = run(connection, api, *ids)
    finally:
        connection.execute("alter table clerk.users drop constraint refused")
    assert [outcomes[user_id] for user_id in ids] == ["applied", "applied", "unusable", "applied", "applied"]
    assert len(rows(connection)) == 4


def test_an_answer_about_somebody_else_is_not_used(connection: Connection, clerk: StandIn, api: ClerkApi) -> None:
    deliver(connection, changed("user_a", T0))
    clerk.put({"id": "user_a"})
    clerk.odd("user_a", b'{"id": "user_b", "updated_at": 1700000000000}')
    with pytest.raises(SyncError, match="weren't asked for"):
        run(connection, api, "user_a")
    assert list(rows(connection)) == ["user_a"]


def test_a_webhook_in_the_middle_of_the_call_is_newer_than_the_answer(
    connect: Connect, clerk: StandIn, api: ClerkApi
) -> None:
    clerk.put({"id": "user_a", "updated_at": T0, "private_metadata": {"v": 1}})
    worker = connect()

    def newer(_: Call) -> None:
        deliver(worker, changed("user_a", T0 + 1, private={"v": 2}))

    clerk.before = newer
    connection = connect()
    assert run(connection, api, "user_a") == {"user_a": "older"}
    assert rows(connection)["user_a"] == ({"v": 2}, None)


# --- Those of whom something is missing


def missing(connection: Connection) -> int:
    return users.count_missing(connection)


def lacking(connection: Connection, clerk: StandIn, number: int) -> list[str]:
    """Users whose public metadata the policy EVERYTHING wants, and only Clerk has."""
    ids = clerk.fill(number, public=b'{"plan":"pro"}')
    bodies = [json.loads(body) for body in clerk.users.values()]
    deliver(connection, *(changed(user["id"], user["updated_at"], public={"plan": "pro"}) for user in bodies))
    users.reweigh_all(connection, EVERYTHING)
    assert missing(connection) == number
    return ids


def outcomes_of(connection: Connection, api: ClerkApi) -> list[str]:
    return [result.outcome for batch in refresh_missing(connection, EVERYTHING, api) for result in batch]


def test_what_only_clerk_has_comes_at_once_for_everybody_who_lacks_it(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = lacking(connection, clerk, 230)
    clerk.delete(ids[0])
    found = outcomes_of(connection, api)
    assert (found.count("applied"), found.count("erased")) == (229, 1)
    assert (missing(connection), api.calls) == (0, 3)
    assert all(public == {"plan": "pro"} for _, public in rows(connection).values())
    assert outcomes_of(connection, api) == []


def test_users_who_stay_unusable_end_the_refresh_of_the_missing_ones_all_the_same(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = lacking(connection, clerk, 120)
    for user_id in ids:
        clerk.odd(user_id, json.dumps({"id": user_id}).encode())
    assert set(outcomes_of(connection, api)) == {"unusable"}
    assert missing(connection) == 120


def test_with_the_key_of_another_instance_nobody_whom_nobody_named_is_erased(
    connection: Connection, clerk: StandIn
) -> None:
    lacking(connection, clerk, 120)
    deliver(connection, changed("user_other", T0))
    with (
        StandIn(LIVE) as another,
        contextlib.closing(api_of(another)) as api,
        pytest.raises(SyncError, match="nobody was erased"),
    ):
        outcomes_of(connection, api)
    assert len(rows(connection)) == 121


def test_where_clerk_knows_others_of_our_users_the_missing_ones_are_erased(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    for user_id in lacking(connection, clerk, 3):
        clerk.delete(user_id)
    deliver(connection, changed("user_other", T0))
    clerk.put({"id": "user_other", "updated_at": T0})
    assert outcomes_of(connection, api) == ["erased"] * 3
    assert list(rows(connection)) == ["user_other"]


# --- The command


@pytest.fixture
def env(clerk: StandIn, database_url: str) -> dict[str, Any]:
    return environment(clerk, database_url)


def test_the_command_prints_what_became_of_each_user_and_the_calls(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    clerk.put({"id": "user_a"})
    deliver(connection, changed("user_a", T0, private={"v": 1}), changed("user_b", T0))
    ran = command("refresh", "user_a", "user_b", env=env)
    assert ran.exit_code == 0
    assert [line.split() for line in ran.stdout.splitlines()[:2]] == [["user_a", "applied"], ["user_b", "erased"]]
    assert ran.stdout.endswith("2 users: 1 applied, 1 erased; 2 calls.\n")
    assert list(rows(connection)) == ["user_a"]


def test_json_tells_the_same_and_an_unusable_user_is_exit_code_1(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    clerk.put({"id": "user_a"})
    clerk.odd("user_b", b'{"id": "user_b"}')
    ran = command("refresh", "user_a", "user_b", "--json", env=env)
    assert ran.exit_code == 1
    assert json.loads(ran.stdout) == {
        "users": [
            {"user_id": "user_a", "outcome": "applied", "reason": None},
            {
                "user_id": "user_b",
                "outcome": "unusable",
                "reason": "updated_at is missing, so nothing tells the version",
            },
        ],
        "counts": {"applied": 1, "unusable": 1},
        "calls": 1,
    }
    assert list(rows(connection)) == ["user_a"]


@pytest.mark.parametrize(
    "arguments",
    [(), ("user_a", "--missing"), ("nonsense",), ("-user_a",), ("user_a,user_b",), ("user_",), ("user_ä",), ("",)],
)
def test_wrong_usage_is_exit_code_2_and_asks_nobody(
    clerk: StandIn, env: dict[str, Any], arguments: tuple[str, ...]
) -> None:
    assert command("refresh", *arguments, env=env).exit_code == 2
    assert clerk.calls == []


def test_without_a_key_or_with_a_wrong_one_nothing_changes_and_the_exit_code_is_2(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    deliver(connection, changed("user_a", T0))
    ran = command("refresh", "user_a", env=env | {"CLERK_SECRET_KEY": None})
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert "CLERK_SECRET_KEY is missing: copy the Secret key" in ran.stderr
    ran = command("refresh", "user_a", env=env | {"CLERK_SECRET_KEY": "sk_live_s3cr3tCanary"})
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert ran.stderr.startswith(
        "clerk-sync can't start:\n  CLERK_SECRET_KEY: Clerk's API refuses the key (401): copy "
    )
    assert list(rows(connection)) == ["user_a"]


def test_where_clerk_or_postgres_cannot_be_reached_nothing_changes_and_the_exit_code_is_1(
    connection: Connection, clerk: StandIn, env: dict[str, Any], database_url: str
) -> None:
    deliver(connection, changed("user_a", T0))
    clerk.close()
    ran = command("refresh", "user_a", "--patience", "0.2", env=env)
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert ran.stderr.startswith("clerk-sync: Clerk's API didn't answer for ")
    assert list(rows(connection)) == ["user_a"]
    gone = "postgresql://clerk@127.0.0.1:1/clerk"
    ran = command("refresh", "user_a", env=env | {"DATABASE_URL": gone})
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert ran.stderr.startswith("clerk-sync: Postgres doesn't answer: ")


def test_what_was_done_before_clerk_went_away_is_printed(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    ids = clerk.fill(150)

    def fail_from_the_second_call(_: Call) -> None:
        if len(clerk.calls) > 1:
            clerk.fail()

    clerk.before = fail_from_the_second_call
    ran = command("refresh", *ids, "--patience", "0.2", env=env)
    assert ran.exit_code == 1
    assert "100 users: 100 applied; " in ran.stdout
    assert "Clerk's API didn't answer" in ran.stderr
    assert len(rows(connection)) == 100


def test_the_missing_ones_are_refreshed_by_one_command_and_counted(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    ids = lacking(connection, clerk, 30)
    clerk.delete(ids[0])
    clerk.odd(ids[1], json.dumps({"id": ids[1]}).encode())
    env |= {"COPY_PUBLIC": "always", "COPY_UNSAFE": "always"}
    ran = command("refresh", "--missing", env=env)
    assert ran.exit_code == 1
    assert ran.stderr == "30 users to refresh.\n"
    *lines, counts, left = ran.stdout.splitlines()
    assert len(lines) == 2
    assert counts == "30 users: 28 applied, 1 erased, 1 unusable; 2 calls."
    assert left == "Still missing for 1 user."
    clerk.delete(ids[1])
    ran = command("refresh", "--missing", "--json", env=env)
    assert ran.exit_code == 0
    assert json.loads(ran.stdout)["counts"] == {"erased": 1}
    assert command("refresh", "--missing", env=env).stdout == "0 users: nobody to refresh; 0 calls.\n"


def test_every_call_is_booked_with_the_budget_that_all_processes_share(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    assert command("refresh", "user_a", env=env).exit_code == 0
    ((booked,),) = connection.execute("select count(*) from clerk.api_budget where paid_until > '-infinity'").fetchall()
    assert booked == 1
