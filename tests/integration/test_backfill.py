"""`backfill`: every user from Clerk, whatever happens meanwhile, to Clerk, to us and to the users."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.events import changed, deleted, incoming
from tests.pulling import LIVE, api_of, command, environment
from tests.waiting import until
from worker import inbox, runs, sync
from worker.api_budget import ApiBudget
from worker.backfill import Progress, backfill
from worker.clerk_api import ClerkApi
from worker.db import Connection
from worker.errors import ClerkUnavailable, ConfigError, SyncError
from worker.policy import Policy
from worker.runs import SEEN, Run
from worker.standin import Answer, Call, StandIn, rendered
from worker.sweep import ahead

Connect = Callable[[], Connection]

IDS = "select user_id from clerk.user_metadata"
RUNS = "select id, state, calls, error, finished_at is not null, counters from clerk.runs order by id"


def deliver(connection: Connection, *bodies: bytes) -> None:
    inbox.record(connection, [incoming(body) for body in bodies])
    sync.drain(connection, Policy())


def here(connection: Connection) -> set[str]:
    return {user_id for (user_id,) in connection.execute(IDS)}


def counters(run: Run) -> dict[str, int]:
    return {name: run.counters[name] for name in SEEN if run.counters[name]}


def pages(clerk: StandIn) -> list[Call]:
    """The calls for pages, without those that look whether single users exist."""
    return [call for call in clerk.calls if call.path == "/v1/users" and "user_id" not in call.query]


def at_page(clerk: StandIn, number: int, happens: Callable[[Call], object]) -> None:
    """Have something happen once, just before a page is answered."""
    pending = [happens]

    def before(call: Call) -> None:
        if "user_id" not in call.query and len(pages(clerk)) == number and pending:
            pending.pop()(call)

    clerk.before = before


# --- What comes


def test_every_user_comes_in_the_fewest_calls(connection: Connection, clerk: StandIn, api: ClerkApi) -> None:
    ids = clerk.fill(2_600, private=b'{"v":1}')
    run = backfill(connection, Policy(), api)
    assert here(connection) == set(ids)
    assert (run.state, counters(run)) == ("done", {"applied": 2_600})
    assert run.calls == api.calls == len(clerk.calls) == 1 + 6


@pytest.mark.parametrize(("users", "calls"), [(0, 2), (1, 2), (499, 2), (500, 3), (501, 3), (998, 3), (999, 4)])
def test_the_list_ends_with_the_first_page_that_is_short(
    connection: Connection, clerk: StandIn, api: ClerkApi, users: int, calls: int
) -> None:
    ids = clerk.fill(users)
    run = backfill(connection, Policy(), api)
    assert here(connection) == set(ids)
    assert (run.users, run.calls) == (users, calls)


def test_what_is_newer_here_stays_and_nobody_is_revived(connection: Connection, clerk: StandIn, api: ClerkApi) -> None:
    ids = clerk.fill(20, private=b'{"v":1}')
    at = {user_id: json.loads(body)["updated_at"] for user_id, body in clerk.users.items()}
    deliver(
        connection,
        changed(ids[0], at[ids[0]] + 1, private={"v": 2}),
        changed(ids[1], at[ids[1]], private={"v": 1}),
        deleted(ids[2], at[ids[2]]),
    )
    run = backfill(connection, Policy(), api)
    assert counters(run) == {"applied": 17, "older": 1, "unchanged": 1, "tombstoned": 1}
    rows = dict(connection.execute("select user_id, private_metadata from clerk.user_metadata").fetchall())
    assert rows == {user_id: {"v": 2 if user_id == ids[0] else 1} for user_id in ids if user_id != ids[2]}


def test_a_second_backfill_begins_anew_and_changes_nothing(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    clerk.fill(700)
    first = backfill(connection, Policy(), api)
    second = backfill(connection, Policy(), api)
    assert second.id > first.id
    assert counters(second) == {"unchanged": 700}


def test_a_list_that_seems_to_end_too_soon_is_read_on(
    connection: Connection, clerk: StandIn, api: ClerkApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = clerk.fill(1_200)
    whole = clerk.answer

    def cut_short(target: str, *rest: Any) -> Answer:
        answer = whole(target, *rest)
        if "limit=500" in target and len(pages(clerk)) in (1, 3):
            return Answer(200, rendered(json.loads(answer.body)[:-7]))
        return answer

    monkeypatch.setattr(clerk, "answer", cut_short)
    run = backfill(connection, Policy(), api)
    assert here(connection) == set(ids)
    assert counters(run) == {"applied": 1_200}


def test_a_list_that_ends_far_too_soon_is_not_taken_for_whole(
    connection: Connection, clerk: StandIn, api: ClerkApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = set(clerk.fill(1_200)[:100])
    whole = clerk.answer

    def cut_short(target: str, *rest: Any) -> Answer:
        answer = whole(target, *rest)
        if "limit=500" in target:
            return Answer(200, rendered([user for user in json.loads(answer.body) if user["id"] in listed]))
        return answer

    monkeypatch.setattr(clerk, "answer", cut_short)
    with pytest.raises(SyncError, match="isn't whole"):
        backfill(connection, Policy(), api)
    assert [(state, error) for _, state, _, error, *_ in connection.execute(RUNS)] == [
        ("failed", "Clerk counts 1,200 users, and its list ends after 100: it isn't whole")
    ]


def test_odd_users_are_told_and_everybody_else_comes(connection: Connection, clerk: StandIn, api: ClerkApi) -> None:
    ids = clerk.fill(1_300)
    odd = {
        ids[3]: b'{"id": "%s"}' % ids[3].encode(),
        ids[4]: b'{"id": null, "s3cr3t": "Canary"}',
        ids[498]: b"[17]",
        ids[499]: b"null",
        ids[500]: b'{"id": 5}',
        ids[1299]: b'"s3cr3tCanary"',
    }
    for user_id, raw in odd.items():
        clerk.odd(user_id, raw)
    run = backfill(connection, Policy(), api)
    assert here(connection) == set(ids) - set(odd)
    assert counters(run) == {"applied": 1_294, "unusable": 6}
    assert run.state == "done"
    assert [user["user_id"] for user in run.unusable] == [ids[3], None, None, None, None, None]
    assert run.unusable[0]["reason"] == "updated_at is missing, so nothing tells the version"
    ((told,),) = connection.execute("select unusable::text from clerk.runs").fetchall()
    assert "anary" not in told


def test_unusable_users_are_all_counted_and_the_first_hundred_named(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    for user_id in clerk.fill(150):
        clerk.odd(user_id, b'{"id": "%s"}' % user_id.encode())
    run = backfill(connection, Policy(), api)
    assert (counters(run), len(run.unusable)) == ({"unusable": 150}, 100)


def test_a_page_whose_ids_cannot_be_read_at_all_fails_the_run_with_a_sentence(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    for user_id in clerk.fill(500):
        clerk.odd(user_id, b"{}")
    with pytest.raises(SyncError, match="no way to go on"):
        backfill(connection, Policy(), api)


def test_a_user_whom_postgres_refuses_does_not_keep_the_page_out(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = clerk.fill(30)
    connection.execute(f"alter table clerk.users add constraint refused check (user_id <> '{ids[7]}')")
    try:
        run = backfill(connection, Policy(), api)
    finally:
        connection.execute("alter table clerk.users drop constraint refused")
    assert counters(run) == {"applied": 29, "unusable": 1}
    assert run.unusable == [{"user_id": ids[7], "reason": "Postgres refuses it: CheckViolation (23514)"}]


# --- What happens meanwhile


@pytest.mark.parametrize(
    ("gone", "lost_cursor"), [(1, 200), (2, 404), (2, 200), (3, 422), (400, 404), (500, 422), (500, 200)]
)
def test_users_at_the_cursor_may_be_deleted_between_two_pages(
    connection: Connection, clerk: StandIn, api: ClerkApi, gone: int, lost_cursor: int
) -> None:
    clerk.lost_cursor = lost_cursor
    ids = clerk.fill(2_000)

    def delete(_: Call) -> None:
        for user_id in ids[500 - gone : 500]:
            clerk.delete(user_id)

    at_page(clerk, 2, delete)
    run = backfill(connection, Policy(), api)
    # Whoever was pulled before is erased by the webhook, or by reconciling: nobody else may be missing.
    assert here(connection) == set(ids)
    assert counters(run) == {"applied": 2_000}
    assert len(pages(clerk)) <= 7
    assert run.state == "done"


def test_only_the_last_user_being_deleted_costs_a_look_at_the_one_before(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = clerk.fill(1_200)
    at_page(clerk, 2, lambda _: clerk.delete(ids[499]))
    assert backfill(connection, Policy(), api).state == "done"
    assert [call.query["user_id"] for call in clerk.calls if "user_id" in call.query] == [[ids[498], ids[499]]]
    assert here(connection) == set(ids)


@pytest.mark.parametrize("lost_cursor", [422, 404, 200])
def test_the_cursor_may_be_lost_again_and_again(
    connection: Connection, clerk: StandIn, api: ClerkApi, lost_cursor: int
) -> None:
    clerk.lost_cursor = lost_cursor
    ids = clerk.fill(2_600)

    def delete_cursors(call: Call) -> None:
        for user_id in call.query.get("starting_after", ()):
            if user_id in clerk.users:
                clerk.delete(user_id)

    clerk.before = delete_cursors
    run = backfill(connection, Policy(), api)
    assert run.state == "done"
    assert len(pages(clerk)) <= 2 * 6
    assert here(connection) == set(ids)


def test_an_empty_page_ends_the_list_only_where_the_cursor_is_there(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    clerk.lost_cursor = 200
    ids = clerk.fill(500)

    def delete_last_and_create(_: Call) -> None:
        clerk.delete(ids[-1])
        clerk.delete(ids[-2])
        clerk.put({"id": "user_new"})

    at_page(clerk, 2, delete_last_and_create)
    backfill(connection, Policy(), api)
    assert "user_new" in here(connection)


def test_everybody_may_be_deleted_meanwhile(connection: Connection, clerk: StandIn, api: ClerkApi) -> None:
    ids = clerk.fill(1_500)

    def delete(_: Call) -> None:
        for user_id in ids:
            clerk.delete(user_id)

    at_page(clerk, 3, delete)
    run = backfill(connection, Policy(), api)
    assert run.state == "done"
    assert run.users < 1_500


def test_an_answer_that_ignores_the_cursor_fails_the_run_instead_of_going_round(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    clerk.fill(1_500)

    def ignore(call: Call) -> None:
        if "starting_after" in call.query:
            del call.query["starting_after"]

    clerk.before = ignore
    with pytest.raises(SyncError, match="another page than the one that was asked for"):
        backfill(connection, Policy(), api)


def test_users_who_are_updated_created_and_deleted_between_pages_end_up_as_clerk_has_them(
    connect: Connect, clerk: StandIn, api: ClerkApi
) -> None:
    ids = clerk.fill(1_700, private=b'{"v":1}')
    worker = connect()
    turn = iter(range(100))

    def life(call: Call) -> None:
        """Every page finds others changed, of whom webhooks tell at once: some before the page, some after it."""
        at = next(turn)
        for user_id in (ids[at], ids[600 + at], ids[1_600 + at]):
            clerk.update(user_id, private_metadata={"v": 2})
            deliver(worker, changed(user_id, json.loads(clerk.users[user_id])["updated_at"], private={"v": 2}))
        for user_id in (ids[100 + at], ids[1_500 + at]):
            clerk.delete(user_id)
            deliver(worker, deleted(user_id, 1_790_000_000_000))
        clerk.put({"id": f"user_new{at}", "private_metadata": {"v": 3}})

    clerk.before = life
    connection = connect()
    run = backfill(connection, Policy(), api)
    assert run.state == "done"
    rows = dict(connection.execute("select user_id, private_metadata from clerk.user_metadata").fetchall())
    now = {user_id: json.loads(body)["private_metadata"] for user_id, body in clerk.users.items()}
    created_last = f"user_new{next(turn) - 1}"
    assert rows == {user_id: value for user_id, value in now.items() if user_id in rows or user_id != created_last}


def test_a_storm_of_429_is_waited_out_and_no_call_is_made_in_the_pause(connect: Connect, clerk: StandIn) -> None:
    ids = clerk.fill(1_200)
    clerk.fail(1, 429, retry_after=0)
    at_page(clerk, 2, lambda _: clerk.fail(1, 429, retry_after=1))
    budget = ApiBudget(connect(), LIVE, 0.5)
    with contextlib.closing(api_of(clerk, take=budget.take, block=budget.block)) as api:
        run = backfill(connect(), Policy(), api)
    assert (run.state, run.calls) == ("done", 4 + 2)
    assert here(connect()) == set(ids)
    times = [call.at for call in clerk.calls]
    assert times[4] - times[3] >= 0.99


# --- Runs


def test_a_run_that_failed_goes_on_where_it_was(connection: Connection, clerk: StandIn, api: ClerkApi) -> None:
    ids = clerk.fill(2_300)
    clerk.odd(ids[0], b"{}")
    at_page(clerk, 4, lambda _: clerk.fail(1_000, 500))
    with contextlib.closing(api_of(clerk, patience=0.1)) as impatient, pytest.raises(ClerkUnavailable):
        backfill(connection, Policy(), impatient)
    ((_, state, calls, error, finished, counted),) = connection.execute(RUNS).fetchall()
    assert (state, finished, counted) == ("failed", True, {"applied": 1_497, "unusable": 1})
    assert calls == len(clerk.calls)
    assert "didn't answer" in error
    clerk._failures.clear()
    seen: list[int] = []
    before = len(clerk.calls)
    run = backfill(connection, Policy(), api, observe=lambda progress: seen.append(progress.before))
    assert counters(run) == {"applied": 2_299, "unusable": 1}
    assert set(seen) == {1_498}
    assert len(clerk.calls) - before == 3
    assert run.calls == len(clerk.calls)
    assert here(connection) == set(ids[1:])
    ((_, state, _, error, _, _),) = connection.execute(RUNS).fetchall()
    assert (state, error) == ("done", None)


def test_a_run_that_was_cut_short_can_be_begun_anew(connection: Connection, clerk: StandIn, api: ClerkApi) -> None:
    clerk.fill(1_200)
    interrupt_after(connection, api, 2)
    run = backfill(connection, Policy(), api, restart=True)
    assert counters(run) == {"unchanged": 999, "applied": 201}
    assert run.calls == 4


def interrupt_after(connection: Connection, api: ClerkApi, times: int) -> None:
    """Ctrl-C after some commits."""
    left = [times]

    def observe(progress: Progress) -> None:
        if progress.run.users:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backfill(connection, Policy(), api, observe=observe)


def test_ctrl_c_leaves_a_run_that_goes_on(connection: Connection, clerk: StandIn, api: ClerkApi) -> None:
    ids = clerk.fill(1_200)
    interrupt_after(connection, api, 1)
    ((_, state, _, error, _, counted),) = connection.execute(RUNS).fetchall()
    assert (state, error, counted) == ("failed", "interrupted", {"applied": 500})
    run = backfill(connection, Policy(), api)
    assert counters(run) == {"applied": 1_200}
    assert here(connection) == set(ids)


def test_a_run_whose_cursor_was_deleted_before_it_goes_on_misses_nobody(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = clerk.fill(1_200)
    interrupt_after(connection, api, 1)
    for user_id in ids[400:500]:
        clerk.delete(user_id)
    run = backfill(connection, Policy(), api)
    assert run.state == "done"
    assert here(connection) == set(ids)


def test_a_second_run_at_once_is_refused_and_told_of_the_first(
    connect: Connect, clerk: StandIn, api: ClerkApi, database_url: str
) -> None:
    clerk.fill(1_200)
    refused: list[str] = []

    def second(progress: Progress) -> None:
        if progress.run.users == 500:
            ran = command("backfill", env=environment(clerk, database_url))
            assert (ran.exit_code, ran.stdout) == (1, "")
            refused.append(ran.stderr)

    backfill(connect(), Policy(), api, observe=second)
    (sentence,) = refused
    assert sentence.startswith("clerk-sync: another backfill is running: run ")
    assert sentence.endswith(", 500 users so far\n")
    ((state,),) = connect().execute("select state from clerk.runs").fetchall()
    assert state == "done"


def test_a_run_that_has_lost_its_connection_neither_writes_nor_keeps_others_out(
    connect: Connect, clerk: StandIn, api: ClerkApi
) -> None:
    clerk.fill(1_200)
    connection, other = connect(), connect()

    def cut(progress: Progress) -> None:
        if progress.run.users == 500:
            other.execute("select pg_terminate_backend(%s)", [connection.info.backend_pid])

    with pytest.raises(Exception, match=r"terminat|closed|lost"):
        backfill(connection, Policy(), api, observe=cut)
    ((_, state, _, _, _, counted),) = other.execute(RUNS).fetchall()
    assert (state, counted) == ("running", {"applied": 500})
    run = backfill(other, Policy(), api)
    assert counters(run) == {"applied": 1_200}


def test_a_process_that_is_killed_in_the_middle_goes_on_when_it_is_started_again(
    connect: Connect, clerk: StandIn, database_url: str
) -> None:
    ids = clerk.fill(2_600)
    reached = threading.Event()
    go_on = threading.Event()

    def hold(_: Call) -> None:
        reached.set()
        go_on.wait(60)

    at_page(clerk, 4, hold)
    env = {**os.environ, **{k: v for k, v in environment(clerk, database_url).items() if v is not None}}
    arguments = [sys.executable, "-m", "worker.cli", "backfill", "--json"]
    connection = connect()
    with subprocess.Popen(arguments, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert reached.wait(60)
        until(lambda: len(here(connection)) >= 500, what="a page")
        process.send_signal(signal.SIGKILL)
        process.wait()
    go_on.set()
    ((_, state, _, _, finished, counted),) = connection.execute(RUNS).fetchall()
    assert (state, finished) == ("running", False)
    assert counted == {"applied": len(here(connection))}
    assert 500 <= counted["applied"] < 2_000
    until(lambda: free(connection), what="the lock of the killed process")
    ran = subprocess.run(arguments, env=env, capture_output=True, text=True, check=True, timeout=60)
    result = json.loads(ran.stdout)
    assert (result["state"], result["users"], result["applied"]) == ("done", 2_600, 2_600)
    assert here(connection) == set(ids)
    # What was fetched twice is at most what had been read ahead.
    assert len(pages(clerk)) <= 6 + 3


def free(connection: Connection) -> bool:
    with contextlib.suppress(SyncError), runs.alone(connection):
        return True
    return False


# --- Reading ahead


def test_reading_ahead_gives_everything_in_order_and_raises_what_was_raised() -> None:
    def numbers() -> Iterator[int]:
        yield from range(5)
        raise SyncError("no more")

    got: list[int] = []
    with pytest.raises(SyncError, match="no more"), ahead(numbers()) as some:
        got.extend(some)
    assert got == [0, 1, 2, 3, 4]
    with ahead(iter(range(5))) as some:
        assert list(some) == [0, 1, 2, 3, 4]


def test_reading_ahead_ends_with_the_block_and_is_never_far_ahead() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with ahead(numbers()) as some:
        assert next(some) == 0
        until(lambda: len(made) >= 3)
    assert len(made) <= 4
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]


# --- The command


@pytest.fixture
def env(clerk: StandIn, database_url: str) -> dict[str, Any]:
    return environment(clerk, database_url)


def test_the_command_says_what_became_of_the_users(connection: Connection, clerk: StandIn, env: dict[str, Any]) -> None:
    clerk.fill(1_200)
    ran = command("backfill", env=env)
    ((run_id,),) = connection.execute("select id from clerk.runs").fetchall()
    assert ran.exit_code == 0
    assert ran.stderr == f"Run {run_id} begins: 1,200 users.\n"
    first, second = ran.stdout.splitlines()
    assert (
        first == f"Run {run_id} is done: 1,200 users (1,200 applied, 0 unchanged, 0 older, 0 tombstoned, 0 unusable)."
    )
    assert second.startswith("4 calls to Clerk's API; ")


def test_the_command_lists_whom_it_could_not_use_and_exits_1(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    clerk.put({"id": "user_a"})
    clerk.odd("user_b", b'{"id": "user_b", "s3cr3t": "Canary"}')
    ran = command("backfill", env=env)
    assert ran.exit_code == 1
    assert "  user_b: updated_at is missing, so nothing tells the version\n" in ran.stdout
    assert "anary" not in ran.output
    ran = command("backfill", "--json", env=env)
    assert (ran.exit_code, ran.stderr) == (1, "")
    result = json.loads(ran.stdout)
    assert {name: result[name] for name in ("state", "users", "unchanged", "unusable", "calls")} == {
        "state": "done",
        "users": 2,
        "unchanged": 1,
        "unusable": 1,
        "calls": 2,
    }
    assert [user["user_id"] for user in result["unusable_users"]] == ["user_b"]


def test_the_command_goes_on_after_an_error_and_says_so(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    clerk.fill(1_200)
    at_page(clerk, 2, lambda _: clerk.fail(1_000, 500))
    ran = command("backfill", "--patience", "0.2", env=env)
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert "didn't answer" in ran.stderr
    assert ran.stderr.endswith("What was done stays; clerk-sync backfill goes on from there.\n")
    clerk._failures.clear()
    ran = command("backfill", env=env)
    assert ran.exit_code == 0
    assert " goes on after 500 of 1,200 users." in ran.stderr
    assert "1,200 users (1,200 applied" in ran.stdout


def test_without_a_key_or_with_a_wrong_one_or_without_clerk_nothing_changes(
    connection: Connection, clerk: StandIn, env: dict[str, Any]
) -> None:
    deliver(connection, changed("user_a"))
    ran = command("backfill", env=env | {"CLERK_SECRET_KEY": None})
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert "CLERK_SECRET_KEY is missing" in ran.stderr
    ran = command("backfill", env=env | {"CLERK_SECRET_KEY": "sk_live_s3cr3tCanary"})
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert ran.stderr.startswith(
        "clerk-sync can't start:\n  CLERK_SECRET_KEY: Clerk's API refuses the key (401): copy "
    )
    clerk.close()
    ran = command("backfill", "--patience", "0.2", env=env)
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert ran.stderr.startswith("clerk-sync: Clerk's API didn't answer for ")
    assert here(connection) == {"user_a"}
    assert connection.execute(RUNS).fetchall() == []


def test_a_key_that_is_withdrawn_in_the_middle_fails_the_run(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    clerk.fill(1_200)

    def withdraw(progress: Progress) -> None:
        clerk.secret_key = "sk_live_of_tomorrow"

    with pytest.raises(ConfigError, match="refuses the key"):
        backfill(connection, Policy(), api, observe=withdraw)
    ((_, state, _, error, _, _),) = connection.execute(RUNS).fetchall()
    assert (state, "refuses the key" in error) == ("failed", True)
