"""`clerk-sync check` on real Postgres, before the real receiver: what it sends is seen, and leaves no trace."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import httpx
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.clerk import SECRET
from tests.events import changed, incoming
from tests.pulling import KEY, command, deliver, environment, webhook
from webhooks.app import create_app
from webhooks.recorder import Recorder
from webhooks.signature import make_verifier
from worker import check, db, inbox, reconcile, roles, sync, users
from worker.check import Line, Probe
from worker.clerk import confirm_instance, heard_of
from worker.clerk_api import ClerkApi
from worker.cli.check import _Shown, _through
from worker.cli.send import sign
from worker.db import Connection
from worker.events import RESERVED
from worker.policy import Policy
from worker.standin import StandIn

Connect = Callable[[], Connection]
POLICY: Final = Policy()
OLD_SECRET: Final = "whsec_" + base64.b64encode(bytes(range(1, 25))).decode()
USER: Final = RESERVED + "1"


class Receiver:
    """The receiver as it is deployed, but for the web server and the doorbell, behind httpx."""

    def __init__(self, database_url: str, *secrets: str, instance_id: str | None = None) -> None:
        self.recorder = Recorder(lambda: db.connect(database_url, "receiver"))
        app = create_app(
            verify=make_verifier(secrets),
            record=self.recorder.record,
            ring=lambda: None,
            problems=list,
            counts=lambda: None,
            instance_id=instance_id,
        )
        self.client = httpx.Client(transport=httpx.WSGITransport(app=app))


@pytest.fixture
def receiver(database_url: str) -> Iterator[Callable[..., httpx.Client]]:
    """Makes receivers; gives what leads to them."""
    made: list[Receiver] = []

    def make(*secrets: str, **how: Any) -> httpx.Client:
        made.append(Receiver(database_url, *(secrets or (SECRET,)), **how))
        return made[-1].client

    yield make
    for one in made:
        one.recorder.close()


@pytest.fixture
def probe(connection: Connection, connect: Connect, receiver: Callable[..., httpx.Client]) -> Probe:
    """A probe before a receiver, with a worker that works whenever the probe waits."""
    worker = connect()
    return Probe(
        connection,
        receiver(),
        "http://receiver",
        (SECRET,),
        "1",
        sign,
        pause=lambda _: sync.drain(worker, POLICY),
    )


def states(lines: list[Line]) -> dict[str, str]:
    return {line.name: line.state for line in lines}


def failure(probe: Probe) -> tuple[str, str]:
    """The one line that fails, and what it says."""
    (failed,) = [line for line in check.send_through(probe) if line.state == "fail"]
    (note,) = failed.notes
    return failed.name, note


def traces(connection: Connection) -> list[str]:
    """Where something of a made-up user is left."""
    return [
        table
        for table in ("clerk.users", "clerk.user_contents", "clerk.webhook_events")
        if connection.execute(f"select from {table} where starts_with(user_id, '{RESERVED}')").fetchall()
    ]


# --- The whole way


def test_a_user_is_sent_through_and_no_trace_is_left(connection: Connection, probe: Probe) -> None:
    deliver(connection, changed("user_real", private={"a": 1}))
    before = connection.execute("select * from clerk.user_metadata").fetchall()
    waited = []
    probe = replace(probe, observe=lambda what, *_: waited.append(what))
    lines = list(check.send_through(probe))
    assert states(lines) == dict.fromkeys(check.STEPS, "pass"), lines
    assert "user.created accepted (202)" in lines[0].notes[0]
    assert "visible in clerk.user_metadata" in lines[1].notes[0]
    assert set(waited) == {"the row", "the row's end"}
    assert check.remove(connection, probe.user_id) == Line("removal", "pass", ("no trace is left",))
    assert traces(connection) == []
    assert connection.execute("select * from clerk.user_metadata").fetchall() == before


def test_each_secret_of_a_rotation_is_tried(probe: Probe, receiver: Callable[..., httpx.Client]) -> None:
    both = replace(probe, secrets=(SECRET, OLD_SECRET))
    name, problem = failure(both)
    assert name == "repeat"
    assert problem.startswith("signed with secret 2 of 2: the signature doesn't match (400)")
    right = replace(both, token="2", client=receiver(SECRET, OLD_SECRET))
    assert states(list(check.send_through(right))) == dict.fromkeys(check.STEPS, "pass")


def test_a_wrong_secret_fails_the_delivery_and_skips_the_rest(
    connection: Connection, probe: Probe, receiver: Callable[..., httpx.Client]
) -> None:
    lines = list(check.send_through(replace(probe, client=receiver(OLD_SECRET))))
    assert states(lines) == {"delivery": "fail", "row": "skipped", "repeat": "skipped", "deletion": "skipped"}
    assert "another CLERK_WEBHOOK_SIGNING_SECRET" in lines[0].notes[0]
    assert SECRET not in str(lines)
    assert traces(connection) == []


def test_the_instance_is_told_to_a_receiver_that_takes_no_other(
    probe: Probe, receiver: Callable[..., httpx.Client]
) -> None:
    picky = replace(probe, client=receiver(SECRET, instance_id="ins_1"), instance_id="ins_2")
    assert failure(picky) == (
        "delivery",
        "the receiver takes it for another instance's: give it and this command the same CLERK_INSTANCE_ID",
    )
    same = replace(picky, instance_id="ins_1")
    assert states(list(check.send_through(same))) == dict.fromkeys(check.STEPS, "pass")


def test_without_a_worker_the_event_waits_in_the_inbox(connection: Connection, probe: Probe) -> None:
    alone = replace(probe, wait_seconds=0, pause=lambda _: None)
    name, problem = failure(alone)
    assert name == "row"
    assert problem.startswith("the event stands in the inbox, but no worker applied it within 0 s: is `worker` running")
    inbox.record(connection, [incoming(changed("user_before"))])
    assert "(waiting before it: 2)" in failure(replace(alone, token="2"))[1]
    for one in (probe, replace(probe, token="2")):
        assert check.remove(connection, one.user_id).notes == ("no trace is left",)
    assert traces(connection) == []
    assert sync.drain(connection, POLICY) == 1, "only the real user's event is left to be applied"


def test_a_receiver_on_another_database_is_told_at_once(probe: Probe) -> None:
    def elsewhere(_: httpx.Request) -> httpx.Response:
        return httpx.Response(202, json={"status": "accepted"})

    def never(_: float) -> None:
        pytest.fail("there is nothing to wait for")

    name, problem = failure(replace(probe, client=httpx.Client(transport=httpx.MockTransport(elsewhere)), pause=never))
    assert name == "row"
    assert problem.startswith("the event was accepted, but isn't in this database: the receiver writes to another one")
    assert USER in problem


def test_an_event_that_is_set_aside_says_why(connection: Connection, probe: Probe) -> None:
    def set_aside(_: float) -> None:
        connection.execute(
            "update clerk.webhook_events set state = 'dead', error = 'of the test', processed_at = now()"
        )

    assert failure(replace(probe, pause=set_aside)) == ("row", "the worker set the event aside: of the test")


def test_a_user_who_was_removed_by_something_else_is_told(connection: Connection, probe: Probe) -> None:
    def remove(_: float) -> None:
        sync.drain(connection, POLICY)
        users.erase(connection, USER)

    name, problem = failure(replace(probe, pause=remove))
    assert name == "row"
    assert "the event was applied, but the row isn't as it should be" in problem


def test_a_worker_that_stops_before_the_deletion_leaves_nothing_either(
    connection: Connection, connect: Connect, probe: Probe
) -> None:
    worker = connect()
    once = iter([True])

    def work_once(_: float) -> None:
        if next(once, False):
            sync.drain(worker, POLICY)

    name, problem = failure(replace(probe, wait_seconds=0.05, pause=work_once))
    assert name == "deletion"
    assert "no worker applied it within 0.05 s" in problem
    assert set(traces(connection)) == {"clerk.users", "clerk.user_contents", "clerk.webhook_events"}
    check.remove(connection, USER)
    assert traces(connection) == []
    assert sync.drain(connection, POLICY) == 0


# --- What is left


def test_what_earlier_checks_left_is_removed_but_nothing_of_one_that_may_be_running(
    connection: Connection, probe: Probe
) -> None:
    for token in ("old", "new"):
        lines = check.send_through(replace(probe, token=token))  # which ends here, as if it was killed
        assert [next(lines).state, next(lines).state] == ["pass", "pass"]
    old = {"user_id": RESERVED + "old"}
    connection.execute(
        "update clerk.users set synced_at = now() - interval '16 minutes' where user_id = %(user_id)s", old
    )
    connection.execute(
        "update clerk.webhook_events set received_at = now() - interval '16 minutes' where user_id = %(user_id)s", old
    )
    line = check.remove(connection, USER)
    assert line.notes == ("no trace is left", "removed what 1 earlier check had left")
    assert users.live(connection, [RESERVED + "old", RESERVED + "new"]) == [RESERVED + "new"]
    assert inbox.show(connection, "msg_clerk_sync_check_old_1") is None
    assert inbox.show(connection, "msg_clerk_sync_check_new_1") is not None


def test_nobody_else_is_ever_removed(connection: Connection) -> None:
    # Tombstones, a live user and an event, each with one half of what is reserved or nearly so.
    live = ["user_clerkXsyncXcheckX2", "user_live"]
    deliver(connection, *(changed(user_id) for user_id in ("user_clerk", "user_clerkXsyncXcheckX1", *live)))
    for user_id in ("user_clerk", "user_clerkXsyncXcheckX1"):
        users.erase(connection, user_id)
    inbox.record(connection, [incoming(changed("user_late"), "msg_clerk_sync_check_1_1")])
    connection.execute("update clerk.users set synced_at = now() - interval '1 day'")
    connection.execute("update clerk.webhook_events set received_at = now() - interval '1 day'")
    count = "select (select count(*) from clerk.users), (select count(*) from clerk.webhook_events)"
    assert connection.execute(count).fetchone() == (4, 5)
    check.remove(connection, USER)
    assert connection.execute(count).fetchone() == (4, 5)
    assert sorted(users.live(connection, live)) == live


@pytest.fixture
def worker_url(connection: Connection, database_url: str) -> Iterator[str]:
    """The address for a login with the worker's role and no more."""
    connection.execute("create role login_of_check login password 'check' in role clerk_worker")
    parts = conninfo_to_dict(database_url)
    yield f"postgresql://login_of_check:check@{parts['host']}:{parts['port']}/{parts['dbname']}"
    connection.execute("drop role login_of_check")


def test_the_workers_own_login_will_do_and_leaves_a_tombstone_that_another_removes(
    connection: Connection, probe: Probe, worker_url: str
) -> None:
    with db.connect(worker_url, "test") as limited:
        lines = list(check.send_through(replace(probe, connection=limited)))
        assert states(lines) == dict.fromkeys(check.STEPS, "pass"), lines
        assert "this login may not read the view" in lines[1].notes[0]
        line = check.remove(limited, USER)
    assert line.state == "pass"
    assert line.notes[1].startswith("tombstones of such users that stay: 1. ")
    assert traces(connection) == ["clerk.users"]
    connection.execute("update clerk.users set synced_at = now() - interval '1 day'")
    assert check.remove(connection, RESERVED + "2").notes[1] == "removed what 1 earlier check had left"
    assert traces(connection) == []


def test_a_postgres_that_goes_away_in_the_middle_fails_the_rest_and_what_was_sent_is_removed_all_the_same(
    connection: Connection, connect: Connect, database_url: str, probe: Probe
) -> None:
    broken = connect()
    shown = _Shown(quiet=True)
    _through(shown, database_url, replace(probe, connection=broken, pause=lambda _: broken.close()))
    assert states(shown.lines) == {
        "delivery": "pass",
        **dict.fromkeys(("row", "repeat", "deletion"), "fail"),
        "removal": "pass",
    }
    assert shown.lines[1].notes == ("Postgres failed: OperationalError: the connection is closed",)
    assert traces(connection) == []
    _through(shown, "postgresql://me:hush@127.0.0.1:1/none", probe)
    assert shown.lines[-1].state == "fail"
    assert "it removes what earlier checks left" in shown.lines[-1].notes[0]
    assert "hush" not in str(shown.lines)


# --- Beside a reconcile


def test_a_made_up_user_counts_for_nothing_in_a_reconcile(
    connection: Connection, clerk: StandIn, api: ClerkApi, probe: Probe
) -> None:
    clerk.fill(3)
    deliver(connection, *(webhook(clerk, user_id) for user_id in clerk.users))
    next(lines := check.send_through(probe))
    next(lines)  # it is live now
    assert users.live(connection, [USER]) == [USER]
    assert users.count_live(connection) == 3
    drift = reconcile.check(connection, POLICY, api, key=KEY, sleep=lambda _: None)
    assert (drift.total, drift.counts["gone"]) == (0, 0)
    done = reconcile.reconcile(connection, POLICY, api, key=KEY, full=True, sleep=lambda _: None)
    assert (done.counters["gone"], done.counters["erased"]) == (0, 0)
    assert not any(USER in call.query.get("user_id", ()) for call in clerk.calls)
    assert users.live(connection, [USER]) == [USER], "the check goes on undisturbed"
    users.erase(connection, USER)
    assert users.count_live(connection) == 3


def test_a_key_is_never_judged_by_a_made_up_user(
    connection: Connection, clerk: StandIn, api: ClerkApi, probe: Probe
) -> None:
    clerk.fill(3)
    next(lines := check.send_through(probe))
    next(lines)
    assert heard_of(connection) == []
    confirm_instance(connection, api, KEY, strict=True)


# --- The command

CLOSED: Final = "http://127.0.0.1:1"


@pytest.fixture
def env(clerk: StandIn, database_url: str, redis_url: str) -> dict[str, Any]:
    return environment(
        clerk, database_url, REDIS_URL=redis_url, CLERK_WEBHOOK_SIGNING_SECRET=SECRET, CLERK_INSTANCE_ID=None
    )


def lines_of(env: dict[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """The lines of `check --json` before a port that nobody listens at."""
    ran = command("check", "--json", "--url", CLOSED, env=env)
    assert ran.exit_code == 1
    return {line["name"]: (line["state"], line["notes"]) for line in json.loads(ran.stdout)["checks"]}


def test_what_the_settings_lead_to_is_looked_at(connection: Connection, clerk: StandIn, env: dict[str, Any]) -> None:
    clerk.fill(2)
    lines = lines_of(env)
    assert [name for name, (state, _) in lines.items() if state == "pass"] == [
        *("settings", "signing secret", "Postgres", "schema", "privileges", "writing", "roles"),
        *("broker", "Clerk's API", "weights", "removal"),
    ]
    assert lines["roles"][1] == ["clerk_receiver, clerk_worker, clerk_reader, clerk_writer"]
    assert lines["Clerk's API"][1] == ["the key is taken; Clerk has 2 users, and none is here yet"]
    assert (lines["delivery"][0], lines["row"]) == ("fail", ("skipped", ["delivery failed"]))
    assert "nothing answers at 127.0.0.1:1 (ConnectionRefusedError)" in lines["delivery"][1][0]


def test_a_broker_that_is_away_is_only_a_warning(connection: Connection, env: dict[str, Any]) -> None:
    state, (note,) = lines_of(env | {"REDIS_URL": "redis://127.0.0.1:1/0"})["broker"]
    assert state == "warning"
    assert "events are applied all the same, by sweeps" in note


def test_clerks_key_is_tried_with_one_call(connection: Connection, clerk: StandIn, env: dict[str, Any]) -> None:
    clerk.fill(2)
    deliver(connection, *(webhook(clerk, user_id) for user_id in clerk.users))
    assert lines_of(env)["Clerk's API"] == (
        "pass",
        ["the key is taken, and of the instance whose users are here (2 of 2 asked for)"],
    )
    assert len(clerk.calls) == 1
    with StandIn() as another:
        other = environment(another, env["DATABASE_URL"])
        state, (note,) = lines_of(env | other)["Clerk's API"]
    assert state == "fail"
    assert "the key may be that of another instance" in note
    state, (note,) = lines_of(env | {"CLERK_SECRET_KEY": "sk_live_wrong"})["Clerk's API"]
    assert (state, "Clerk's API refuses the key (401)" in note, "sk_live" in note) == ("fail", True, False)
    assert lines_of(env | {"CLERK_SECRET_KEY": None})["Clerk's API"][0] == "skipped"


def test_users_whom_other_settings_weighed_are_a_warning(connection: Connection, env: dict[str, Any]) -> None:
    deliver(connection, changed("user_a"))
    assert lines_of(env | {"CLERK_SECRET_KEY": None})["weights"] == ("pass", [])
    state, (note,) = lines_of(env | {"CLERK_SECRET_KEY": None, "COPY_PUBLIC": "always"})["weights"]
    assert state == "warning"
    assert note.startswith("1 of 1 user were weighed by other settings")


@pytest.fixture
def old_schema(connection: Connection) -> Iterator[None]:
    connection.execute("update clerk.schema_version set version_num = '0006'")
    yield
    connection.execute("update clerk.schema_version set version_num = %s", [db.SCHEMA_VERSION])


@pytest.mark.usefixtures("old_schema")
def test_an_old_schema_fails_and_nothing_is_sent(env: dict[str, Any]) -> None:
    lines = lines_of(env)
    assert lines["schema"] == (
        "fail",
        [f"the schema is at 0006, this code needs {db.SCHEMA_VERSION}: run clerk-sync migrate"],
    )
    assert {lines[name][0] for name in (*check.STEPS, "removal", "Clerk's API", "roles")} == {"skipped"}


def test_missing_privileges_fail_for_the_login_and_for_each_role(
    connection: Connection, worker_url: str, env: dict[str, Any]
) -> None:
    try:
        connection.execute("revoke delete on clerk.runs from clerk_worker")
        connection.execute("revoke select on clerk.user_metadata from clerk_reader")
        lines = lines_of(env | {"DATABASE_URL": worker_url})
    finally:
        connection.execute(roles.grants().encode())
    assert lines["privileges"][0] == "fail"
    assert "lacks delete on clerk.runs" in lines["privileges"][1][0]
    assert lines["roles"][0] == "fail"
    assert [note.split()[0] for note in lines["roles"][1]] == ["clerk_worker", "clerk_reader"]
    assert lines["delivery"][0] == "skipped"


def test_a_postgres_that_takes_no_writes_fails_and_one_that_is_away_is_told(
    connection: Connection, worker_url: str, env: dict[str, Any]
) -> None:
    connection.execute("alter role login_of_check set default_transaction_read_only = on")
    lines = lines_of(env | {"DATABASE_URL": worker_url})
    assert (lines["writing"], lines["delivery"][0]) == (("fail", [roles.READ_ONLY]), "skipped")
    lines = lines_of(env | {"DATABASE_URL": "postgresql://me:hush@127.0.0.1:1/none"})
    assert lines["Postgres"][0] == "fail"
    assert lines["Postgres"][1][0].startswith("doesn't answer: ")
    assert "hush" not in str(lines)
    assert lines["writing"] == ("skipped", ["Postgres can't be asked"])
