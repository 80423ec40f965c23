"""`reconcile`: what differs from Clerk is found and repaired, whatever was lost, and nobody is erased wrongly."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.events import changed, deleted
from tests.pulling import KEY, LIVE, api_of, deliver, webhook
from tests.waiting import until
from worker import reconcile as reconciling
from worker import runs, sweep, users
from worker.backfill import backfill
from worker.clerk import EXAMPLES, confirm_instance
from worker.clerk_api import MOST_USERS, ClerkApi
from worker.db import Connection
from worker.errors import ClerkUnavailable, ConfigError, SyncError
from worker.policy import Copy, Policy
from worker.reconcile import check, reconcile
from worker.runs import FULL, INCREMENTAL, Run
from worker.standin import Call, StandIn, now_ms

Connect = Callable[[], Connection]
T0 = 1_700_000_000_000
POLICY = Policy()

VERSIONS = "select user_id, (extract(epoch from updated_at) * 1000)::bigint, private_metadata from clerk.user_metadata"
STATES = "select kind, cause, state from clerk.runs order by id"


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 20, so that a few dozen users are many pages."""
    pages_of(20, monkeypatch)
    monkeypatch.setattr(reconciling, "OVERLAP", 2)
    monkeypatch.setattr(reconciling, "ENOUGH", 18)


def pages_of(number: int, patch: pytest.MonkeyPatch) -> None:
    for module in (sweep, reconciling):
        patch.setattr(module, "MOST_USERS", number)


def at_once(_: float) -> None:
    """Wait for nothing."""


def run(connection: Connection, api: ClerkApi, **options: Any) -> Run:
    return reconcile(connection, POLICY, api, key=KEY, **{"sleep": at_once, **options})


def here(connection: Connection) -> dict[str, tuple[int, Any]]:
    return {user_id: (version, private) for user_id, version, private in connection.execute(VERSIONS)}


def there(clerk: StandIn) -> dict[str, tuple[int, Any]]:
    at_clerk = [json.loads(raw) for raw in clerk.users.values()]
    return {user["id"]: (user["updated_at"], user["private_metadata"]) for user in at_clerk}


def pages(clerk: StandIn) -> list[Call]:
    return [call for call in clerk.calls if call.path == "/v1/users" and "user_id" not in call.query]


def look_ups(clerk: StandIn) -> list[Call]:
    return [call for call in clerk.calls if len(call.query.get("user_id", ())) > 2]


def once(clerk: StandIn, when: Callable[[Call], bool], happens: Callable[[Call], object]) -> None:
    """Have something happen just before the first answer that is meant."""
    pending = [happens]

    def before(call: Call) -> None:
        if pending and when(call):
            pending.pop()(call)

    clerk.before = before


def at_page(number: int, clerk: StandIn) -> Callable[[Call], bool]:
    """The page of this number from now on, the first being 1."""
    earlier = len(pages(clerk))
    return lambda call: "user_id" not in call.query and len(pages(clerk)) - earlier == number


def filled(clerk: StandIn, connection: Connection, api: ClerkApi, number: int) -> list[str]:
    """Users whom Clerk and we have alike, after a full run."""
    ids = clerk.fill(number, private=b'{"v":1}')
    with pytest.MonkeyPatch.context() as patch:
        pages_of(MOST_USERS, patch)  # the quickest way
        assert run(connection, api, full=True).state == "done"
    clerk.forget_calls()
    return ids


def delete(clerk: StandIn, *user_ids: str) -> None:
    for user_id in user_ids:
        clerk.delete(user_id)


def update(clerk: StandIn, *user_ids: str) -> None:
    for user_id in user_ids:
        clerk.update(user_id, private_metadata={"v": 2})


# --- What was lost


def test_of_a_population_with_lost_and_reordered_webhooks_the_exact_drift_is_named_and_repaired_whole(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    chance = random.Random(7)
    ids = clerk.fill(2_000, private=b'{"v":1}')
    lost_creations = set(chance.sample(ids, 40))
    changes = [webhook(clerk, user_id) for user_id in ids if user_id not in lost_creations]
    updated = chance.sample(ids, 1_000)
    lost_updates = set(chance.sample(updated, 20))
    update(clerk, *updated)
    changes += [webhook(clerk, user_id) for user_id in updated if user_id not in lost_updates]
    gone = chance.sample(sorted(set(ids) - set(updated)), 200)
    lost_deletions = set(chance.sample(gone, 2))
    delete(clerk, *gone)
    changes += [webhook(clerk, user_id) for user_id in gone if user_id not in lost_deletions]
    changes += chance.sample(changes, len(changes) // 20)
    chance.shuffle(changes)
    deliver(connection, *changes)

    repaired_by_others = set(updated) - lost_updates  # their next webhook brought them whole
    missing = lost_creations - repaired_by_others - set(gone)
    assert missing
    drift = check(connection, POLICY, api, key=KEY, sleep=at_once)
    assert {name: sorted(found) for name, found in drift.named.items()} == {
        "missing": sorted(missing),
        "outdated": sorted(lost_updates - missing),
        "incomplete": [],
        "gone": sorted(lost_deletions - lost_creations),
    }
    done = run(connection, api, full=True)
    assert (done.state, done.counters["missing"]) == ("done", len(missing))
    assert done.counters["outdated"] == len(lost_updates - missing)
    assert done.counters["gone"] == done.counters["erased"] == len(lost_deletions - lost_creations)
    assert here(connection) == there(clerk)
    assert check(connection, POLICY, api, key=KEY, sleep=at_once).total == 0
    deliver(connection, *chance.sample(changes, 500))
    assert here(connection) == there(clerk)


def test_the_events_that_the_dashboard_sends_as_examples_are_erased_by_a_full_run(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    clerk.put({"id": "user_a"})
    deliver(connection, webhook(clerk, "user_a"), *(changed(user_id) for user_id in EXAMPLES))
    done = run(connection, api, full=True)
    assert (done.counters["gone"], list(here(connection))) == (2, ["user_a"])


def test_a_kind_of_metadata_that_is_to_be_kept_now_comes_with_the_next_full_run(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    clerk.fill(30, public=b'{"plan":"pro"}')
    run(connection, api)
    everything = Policy(public=Copy.ALWAYS)
    drift = check(connection, everything, api, key=KEY, sleep=at_once)
    assert (drift.total, drift.counts["unweighed"]) == (0, 30)
    users.reweigh_all(connection, everything)
    drift = check(connection, everything, api, key=KEY, sleep=at_once)
    assert drift.counts == {"incomplete": 30}
    done = reconcile(connection, everything, api, key=KEY, full=True, sleep=at_once)
    assert done.counters["incomplete"] == done.counters["applied"] == 30
    assert check(connection, everything, api, key=KEY, sleep=at_once).counts == {"same": 30}
    assert connection.execute("select distinct public_metadata from clerk.user_metadata").fetchall() == [
        ({"plan": "pro"},)
    ]


# --- Which run


def test_the_first_run_is_a_full_one_and_a_quiet_one_after_it_takes_two_calls(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    clerk.fill(1_200)
    first = run(connection, api)
    assert (first.kind, first.cause, first.counters["missing"], first.calls) == (FULL, "first", 1_200, 1 + 3 + 1)
    quiet = run(connection, api)
    assert (quiet.kind, quiet.cause, quiet.state, quiet.calls) == (INCREMENTAL, "asked", "done", 2)
    assert quiet.counters["unchanged"] == 500


@pytest.mark.parametrize("number", [0, 1, 499])
def test_where_all_users_fit_in_one_page_every_run_is_a_full_one_of_two_calls(
    connection: Connection, clerk: StandIn, api: ClerkApi, number: int
) -> None:
    clerk.fill(number)
    for _ in range(2):
        done = run(connection, api, periodic=True)
        assert (done.kind, done.cause, done.calls, done.users) == (FULL, "small", 2, number)


@pytest.mark.usefixtures("small_pages")
def test_a_periodic_run_is_a_full_one_once_a_day_and_an_asked_one_is_not(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    filled(clerk, connection, api, 60)
    assert run(connection, api, periodic=True).kind == INCREMENTAL
    yesterday = "update clerk.runs set (started_at, finished_at) = (started_at - day, finished_at - day) from (values "
    connection.execute(f"{yesterday} (interval '1 day')) as one (day)")
    assert run(connection, api).kind == INCREMENTAL
    daily = run(connection, api, periodic=True)
    assert (daily.kind, daily.cause) == (FULL, "daily")
    assert run(connection, api, periodic=True).kind == INCREMENTAL


@pytest.mark.usefixtures("small_pages")
def test_a_long_daily_run_that_failed_is_not_made_again_at_once(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    filled(clerk, connection, api, 60)
    run(connection, api)
    connection.execute(
        "update clerk.runs set state = 'failed', started_at = now() - interval '61 s' where kind = 'full'"
    )
    done = run(connection, api, periodic=True)
    assert (done.kind, done.cause) == (INCREMENTAL, "periodic")
    connection.execute("update clerk.runs set finished_at = started_at + interval '5 s' where kind = 'full'")
    assert run(connection, api, periodic=True).cause == "daily"


def test_a_backfill_that_was_whole_is_followed_by_incremental_runs(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = clerk.fill(600, private=b'{"v":1}')
    backfill(connection, POLICY, api)
    update(clerk, ids[3])
    done = run(connection, api)
    assert (done.kind, done.counters["outdated"], done.calls) == (INCREMENTAL, 1, 2)
    assert here(connection) == there(clerk)


# --- Incremental


def test_a_thousand_changes_are_repaired_in_five_calls(connection: Connection, clerk: StandIn, api: ClerkApi) -> None:
    ids = filled(clerk, connection, api, 5_000)
    update(clerk, *ids[2_000:3_000])
    done = run(connection, api)
    assert (done.kind, done.counters["outdated"], done.calls) == (INCREMENTAL, 1_000, 5)
    assert here(connection) == there(clerk)
    assert run(connection, api).calls == 2


@pytest.mark.usefixtures("small_pages")
def test_a_change_is_found_behind_any_number_of_later_ones_that_were_delivered(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = filled(clerk, connection, api, 200)
    update(clerk, ids[0])
    for user_id in ids[1:80]:
        update(clerk, user_id)
        deliver(connection, webhook(clerk, user_id))
    done = run(connection, api)
    assert (done.kind, done.counters["outdated"]) == (INCREMENTAL, 1)
    assert here(connection) == there(clerk)


@pytest.mark.usefixtures("small_pages")
def test_more_changes_than_an_incremental_run_is_good_for_make_it_a_full_one(
    connection: Connection, clerk: StandIn, api: ClerkApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = filled(clerk, connection, api, 200)
    monkeypatch.setattr(reconciling, "MOST_PAGES", 3)
    update(clerk, *ids[:150])
    done = run(connection, api)
    assert (done.kind, done.cause, done.counters["outdated"]) == (FULL, "many", 150)
    assert here(connection) == there(clerk)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(("page", "number"), [(2, 2), (2, 3), (2, 60), (3, 3), (3, 18)])
def test_deletions_between_two_pages_of_changes_hide_nobody(
    connection: Connection, clerk: StandIn, api: ClerkApi, page: int, number: int
) -> None:
    ids = filled(clerk, connection, api, 160)
    at = now_ms()
    for place, user_id in enumerate(ids[:70]):
        clerk.update(user_id, at=at - place, private_metadata={"v": 2})
    gone = ids[10 : 10 + number]
    once(clerk, at_page(page, clerk), lambda _: delete(clerk, *gone))
    done = run(connection, api)
    assert (done.kind, done.state) == (INCREMENTAL, "done")
    deliver(connection, *(webhook(clerk, user_id) for user_id in gone))
    assert here(connection) == there(clerk)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("page", [1, 3])
def test_updates_between_two_pages_of_changes_are_repaired_by_this_run_or_the_next(
    connection: Connection, clerk: StandIn, api: ClerkApi, page: int
) -> None:
    ids = filled(clerk, connection, api, 160)
    update(clerk, *ids[:50])
    once(clerk, at_page(page, clerk), lambda _: update(clerk, *ids[28:35], *ids[100:110]))
    first = run(connection, api)
    assert (first.kind, first.state) == (INCREMENTAL, "done")
    second = run(connection, api)
    assert (second.kind, second.state) == (INCREMENTAL, "done")
    assert here(connection) == there(clerk)


@pytest.mark.usefixtures("small_pages")
def test_users_from_the_future_neither_end_the_runs_nor_hide_what_changed(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = filled(clerk, connection, api, 160)
    for user_id in ids[:30]:
        clerk.update(user_id, at=now_ms() + 10_000_000_000, private_metadata={"v": 9})
    assert run(connection, api).counters["outdated"] == 30
    update(clerk, *ids[60:100])
    done = run(connection, api)
    assert (done.kind, done.counters["outdated"]) == (INCREMENTAL, 40)
    assert here(connection) == there(clerk)


@pytest.mark.usefixtures("small_pages")
def test_what_a_failed_run_did_not_come_to_is_repaired_by_the_next(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = filled(clerk, connection, api, 200)
    update(clerk, *ids[:100])
    before = runs.covered(connection)
    once(clerk, at_page(3, clerk), lambda _: clerk.fail(10_000, 500))
    with contextlib.closing(api_of(clerk, patience=0.05)) as impatient, pytest.raises(ClerkUnavailable):
        run(connection, impatient)
    assert runs.covered(connection) == before
    assert connection.execute(STATES).fetchall()[-1] == ("incremental", "asked", "failed")
    clerk._failures.clear()
    # Who was repaired is in front of everybody else, as if it had been delivered.
    done = run(connection, api)
    assert (done.kind, done.state) == (INCREMENTAL, "done")
    assert here(connection) == there(clerk)


# --- Counts


@pytest.mark.usefixtures("small_pages")
def test_a_missed_deletion_is_noticed_by_the_counts(connection: Connection, clerk: StandIn, api: ClerkApi) -> None:
    ids = filled(clerk, connection, api, 60)
    delete(clerk, ids[7])
    done = run(connection, api)
    assert (done.kind, done.cause, done.counters["erased"]) == (FULL, "counts", 1)
    assert here(connection) == there(clerk)
    assert run(connection, api).calls == 2


@pytest.mark.usefixtures("small_pages")
def test_a_missed_deletion_is_noticed_beside_a_missed_creation(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = filled(clerk, connection, api, 60)
    delete(clerk, ids[7])
    clerk.put({"id": "user_new"})
    done = run(connection, api)
    assert (done.cause, done.counters["missing"], done.counters["erased"]) == ("counts", 1, 1)
    assert here(connection) == there(clerk)


@pytest.mark.usefixtures("small_pages")
def test_a_missed_creation_with_an_old_time_is_noticed_by_the_counts(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    filled(clerk, connection, api, 60)
    clerk.put({"id": "user_old", "created_at": T0 - 5, "updated_at": T0 - 5})
    done = run(connection, api)
    assert (done.cause, done.counters["missing"]) == ("counts", 1)
    assert here(connection) == there(clerk)


@pytest.mark.usefixtures("small_pages")
def test_sign_ups_and_deletions_that_are_under_way_start_no_full_run(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = filled(clerk, connection, api, 60)
    for happens in (lambda: clerk.put({"id": "user_new"}), lambda: delete(clerk, ids[3])):
        late: list[bytes] = []

        def under_way(_: Call, happens: Callable[[], object] = happens, late: list[bytes] = late) -> None:
            happens()
            late.extend(webhook(clerk, user_id) for user_id in ("user_new", ids[3]))

        once(clerk, lambda call: call.path.endswith("count"), under_way)
        waits: list[float] = []

        def arrive(seconds: float, late: list[bytes] = late, waits: list[float] = waits) -> None:
            waits.append(seconds)
            deliver(connection, *late)

        done = run(connection, api, sleep=arrive)
        assert (done.kind, done.state) == (INCREMENTAL, "done")
        assert waits in ([], [2.0])
        assert here(connection) == there(clerk)


@pytest.mark.usefixtures("small_pages")
def test_a_full_run_for_the_counts_waits_where_the_last_one_was_long(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = filled(clerk, connection, api, 60)
    delete(clerk, ids[7])
    connection.execute("update clerk.runs set started_at = finished_at - interval '60 seconds'")
    assert run(connection, api).kind == INCREMENTAL
    connection.execute(
        "update clerk.runs set started_at = started_at - interval '11 minutes',"
        " finished_at = finished_at - interval '11 minutes' where kind = 'full'"
    )
    assert run(connection, api).kind == FULL
    assert here(connection) == there(clerk)


@pytest.mark.usefixtures("small_pages")
def test_users_who_can_never_be_here_are_told_once_by_the_counts_and_start_no_further_full_runs(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = filled(clerk, connection, api, 60)
    deliver(connection, deleted(ids[3], T0))
    clerk.odd("user_odd", b'{"id": "user_odd"}')
    clerk.odd("user_nameless", b"{}")
    first = run(connection, api)
    assert (first.kind, first.cause) == (FULL, "counts")
    assert (first.counters["tombstoned"], first.counters["unusable"], first.counters["surplus"]) == (1, 2, 3)
    assert (run(connection, api).kind, run(connection, api).calls) == (INCREMENTAL, 2)
    assert check(connection, POLICY, api, key=KEY, sleep=at_once).total == 0


# --- Nobody is erased wrongly


def with_some_gone(clerk: StandIn, connection: Connection, api: ClerkApi, number: int = 90) -> list[str]:
    """Three whose deletion was lost, besides others whom we have; gives those."""
    ids = filled(clerk, connection, api, number)
    gone = [ids[5], ids[25], ids[-1]]
    delete(clerk, *gone)
    return gone


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("number", [1, 4])
def test_a_run_that_fails_before_the_sweep_is_whole_erases_nobody_and_the_next_one_does(
    connection: Connection, clerk: StandIn, api: ClerkApi, number: int
) -> None:
    gone = with_some_gone(clerk, connection, api)
    once(clerk, at_page(number, clerk), lambda _: clerk.fail(10_000, 503))
    with contextlib.closing(api_of(clerk, patience=0.05)) as impatient, pytest.raises(ClerkUnavailable):
        run(connection, impatient, full=True)
    assert set(gone) < set(here(connection))
    assert connection.execute(STATES).fetchall()[-1] == ("full", "asked", "failed")
    clerk._failures.clear()
    assert run(connection, api, full=True).counters["erased"] == 3
    assert here(connection) == there(clerk)


@pytest.mark.usefixtures("small_pages")
def test_a_connection_that_is_cut_after_the_sweep_erases_nobody(
    connect: Connect, clerk: StandIn, api: ClerkApi
) -> None:
    connection, other = connect(), connect()
    gone = with_some_gone(clerk, connection, api)
    pid = connection.info.backend_pid
    once(clerk, lambda _: bool(look_ups(clerk)), lambda _: other.execute("select pg_terminate_backend(%s)", [pid]))
    with pytest.raises(Exception, match=r"terminat|closed|lost"):
        run(connection, api, full=True)
    assert set(gone) < set(here(other))
    done = run(other, api, full=True)
    assert done.counters["erased"] == 3
    assert [state for _, _, state in other.execute(STATES)] == ["done", "failed", "done"]
    assert here(other) == there(clerk)


KILLED = """
import sys
import httpx
from worker import db
from worker.clerk_api import MOST_USERS, ClerkApi
from worker.policy import Policy
from worker.reconcile import reconcile
key, url, database_url = sys.argv[1:]
client = httpx.Client(trust_env=False)
api = ClerkApi(key, url, lambda: 0.0, on_retry_after=lambda _: None, client=client)
reconcile(db.connect(database_url, "killed"), Policy(), api, key="killed", full=True)
"""


def test_a_process_that_is_killed_between_the_sweep_and_the_erasing_erases_nobody(
    connect: Connect, clerk: StandIn, api: ClerkApi, database_url: str
) -> None:
    connection = connect()
    gone = with_some_gone(clerk, connection, api)
    reached, go_on = threading.Event(), threading.Event()

    def hold(_: Call) -> None:
        reached.set()
        go_on.wait(60)

    once(clerk, lambda _: bool(look_ups(clerk)), hold)
    arguments = [sys.executable, "-c", KILLED, clerk.secret_key, clerk.url, database_url]
    with subprocess.Popen(arguments) as process:
        try:
            assert reached.wait(60)
        finally:
            process.kill()
    go_on.set()
    assert set(gone) < set(here(connection))
    until(lambda: is_free(connection), what="the lock of the killed process")
    assert run(connection, api, full=True).counters["erased"] == 3
    assert connection.execute(STATES).fetchall()[-2:] == [("full", "asked", "failed"), ("full", "asked", "done")]
    assert here(connection) == there(clerk)


def is_free(connection: Connection) -> bool:
    with contextlib.suppress(SyncError), runs.alone(connection):
        return True
    return False


def answers(clerk: StandIn, when: Callable[[Call], bool], **query: list[str]) -> None:
    """Answer some calls as if they had asked for something else."""

    def before(call: Call) -> None:
        if when(call):
            call.query.update(query)

    clerk.before = before


NOBODY = {"created_at_before": ["1"]}


@pytest.mark.usefixtures("small_pages")
def test_empty_lists_erase_nobody(connection: Connection, clerk: StandIn, api: ClerkApi) -> None:
    with_some_gone(clerk, connection, api)
    before = here(connection)
    answers(clerk, lambda call: call.path == "/v1/users", **NOBODY)
    with pytest.raises(SyncError, match="counts 87 users, and its list ends after 0"):
        run(connection, api, full=True)
    with pytest.raises(SyncError, match="counts 87 users, and its list ends after 0"):
        check(connection, POLICY, api, key=KEY, sleep=at_once)
    assert here(connection) == before


@pytest.mark.usefixtures("small_pages")
def test_empty_answers_about_single_users_erase_nobody(connection: Connection, clerk: StandIn, api: ClerkApi) -> None:
    with_some_gone(clerk, connection, api)
    before = here(connection)
    answers(clerk, lambda call: len(call.query.get("user_id", ())) > 2, **NOBODY)
    with pytest.raises(SyncError, match="nobody was erased"):
        run(connection, api, full=True)
    with pytest.raises(SyncError, match="nobody was erased"):
        check(connection, POLICY, api, key=KEY, sleep=at_once)
    assert here(connection) == before


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("page", [1, 3])
def test_a_page_that_is_short_is_not_the_end_while_users_are_missing(
    connection: Connection, clerk: StandIn, api: ClerkApi, page: int
) -> None:
    clerk.fill(90, private=b'{"v":1}')
    answers(clerk, at_page(page, clerk), limit=["7"])
    done = run(connection, api, full=True)
    assert (done.counters["missing"], done.counters["surplus"]) == (90, 0)
    assert here(connection) == there(clerk)


def test_nobody_is_erased_nor_missed_where_clerk_lowers_its_largest_page(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = filled(clerk, connection, api, 620)
    update(clerk, *ids[300:330])
    delete(clerk, ids[7])

    def lowered(call: Call) -> None:
        if int(call.query.get("limit", ["0"])[0]) > 100:
            call.query["limit"] = ["10"]

    clerk.before = lowered
    done = run(connection, api)
    assert (done.kind, done.cause) == (FULL, "many")
    assert (done.counters["outdated"], done.counters["erased"]) == (30, 1)
    assert here(connection) == there(clerk)
    assert check(connection, POLICY, api, key=KEY, sleep=at_once).total == 0


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("status", [429, 503])
def test_a_storm_of_errors_is_waited_out(connection: Connection, clerk: StandIn, api: ClerkApi, status: int) -> None:
    with_some_gone(clerk, connection, api)
    turn = iter(range(1000))

    def every_other(_: Call) -> None:
        if next(turn) % 2:
            clerk.fail(1, status, retry_after=0 if status == 429 else None)

    clerk.before = every_other
    with contextlib.closing(api_of(clerk)) as hasty:
        hasty._sleep = at_once
        assert run(connection, hasty, full=True).counters["erased"] == 3
    clerk.before = None
    assert here(connection) == there(clerk)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(("lost_cursor", "number"), [(422, 2), (404, 25), (200, 1), (200, 25)])
def test_a_cursor_that_is_lost_in_the_middle_hides_nobody(
    connection: Connection, clerk: StandIn, api: ClerkApi, lost_cursor: int, number: int
) -> None:
    clerk.lost_cursor = lost_cursor
    ids = filled(clerk, connection, api, 90)
    clerk.put({"id": "user_new"})
    gone = ids[57 - number : 57]
    once(clerk, at_page(4, clerk), lambda _: delete(clerk, *gone))
    done = run(connection, api, full=True)
    assert done.counters["missing"] == 1
    deliver(connection, *(webhook(clerk, user_id) for user_id in gone))
    assert here(connection) == there(clerk)


@pytest.mark.usefixtures("small_pages")
def test_users_who_come_change_and_go_during_a_sweep_with_their_webhooks_stand_as_clerk_has_them(
    connect: Connect, clerk: StandIn, api: ClerkApi
) -> None:
    connection, worker = connect(), connect()
    ids = filled(clerk, connection, api, 120)
    turn = iter(range(100))

    def life(_: Call) -> None:
        at = next(turn)
        clerk.put({"id": f"user_new{at}", "private_metadata": {"v": 3}})
        update(clerk, ids[at], ids[119 - at], ids[60 + at])
        delete(clerk, ids[30 + at], ids[90 - at])
        for user_id in (f"user_new{at}", ids[at], ids[119 - at], ids[60 + at], ids[30 + at], ids[90 - at]):
            deliver(worker, webhook(clerk, user_id))

    clerk.before = life
    done = run(connection, api, full=True)
    assert (done.state, done.counters["erased"]) == ("done", 0)
    assert here(connection) == there(clerk)


def test_a_user_whose_sign_up_is_not_listed_yet_is_not_taken_for_gone(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    (known, *_) = clerk.fill(20)
    deliver(connection, webhook(clerk, known), changed("user_new", now_ms(), private={"v": 1}))
    waits: list[float] = []

    def appears(seconds: float) -> None:
        waits.append(seconds)
        clerk.put({"id": "user_new", "private_metadata": {"v": 1}})

    done = run(connection, api, sleep=appears)
    assert (done.counters["erased"], waits) == (0, [2.0])
    assert here(connection) == there(clerk)


def test_users_whom_clerk_lists_unreadably_keep_their_rows(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = filled(clerk, connection, api, 130)
    odd = {
        ids[0]: b'{"id": "%s"}' % ids[0].encode(),
        ids[1]: b'{"id": null}',
        ids[2]: b"17",
        ids[3]: b'{"id": "%s", "updated_at": 1, "private_metadata": []}' % ids[3].encode(),
    }
    for user_id, raw in odd.items():
        clerk.odd(user_id, raw)
    delete(clerk, ids[129])
    done = run(connection, api, full=True)
    assert done.counters["erased"] == 1
    assert set(odd) < set(here(connection))
    assert set(here(connection)) == set(ids[:129])


def test_who_was_deleted_here_is_neither_revived_nor_drift(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = filled(clerk, connection, api, 30)
    deliver(connection, deleted(ids[3], T0))
    for _ in range(2):
        drift = check(connection, POLICY, api, key=KEY, sleep=at_once)
        assert (drift.total, drift.counts) == (0, {"same": 29, "tombstoned": 1})
        done = run(connection, api, full=True)
        assert (done.counters["tombstoned"], done.counters["unchanged"]) == (1, 29)
        assert set(here(connection)) == set(ids) - {ids[3]}


def test_ids_that_clerk_cannot_be_asked_for_are_told_and_stay(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    filled(clerk, connection, api, 5)
    odd = ["-user_a", "user_a,user_b", "someone"]
    deliver(connection, *(changed(user_id) for user_id in odd))
    done = run(connection, api, full=True)
    assert sorted(user["user_id"] for user in done.unusable) == sorted(odd)
    assert set(odd) < set(here(connection))
    drift = check(connection, POLICY, api, key=KEY, sleep=at_once)
    assert (drift.total, sorted(unusable.user_id or "" for unusable in drift.unusable)) == (0, sorted(odd))


def test_the_key_of_another_instance_is_refused_before_anything_is_asked_of_it(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    filled(clerk, connection, api, 30)
    before = here(connection)
    with StandIn(LIVE) as another, contextlib.closing(api_of(another)) as wrong:
        another.put({"id": "user_of_another_instance"})
        with pytest.raises(ConfigError, match="the key may be that of another instance"):
            confirm_instance(connection, wrong, "wrong", strict=False)
        assert another.count_by_path() == {"/v1/users": 1}
    assert here(connection) == before


def test_a_key_by_which_users_came_erases_nobody_of_whom_webhooks_tell(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    clerk.fill(5)
    confirm_instance(connection, api, "wrong", strict=True)
    run(connection, api)
    confirm_instance(connection, api, "wrong", strict=True)
    deliver(connection, *(changed(f"user_{number}", private={"v": 1}) for number in range(3)))
    # An incremental run erases nobody, and each call counts; a full one sees by itself whom the sweep met.
    confirm_instance(connection, api, "wrong", strict=False)
    for erases in (
        lambda: confirm_instance(connection, api, "wrong", strict=True),
        lambda: run(connection, api, full=True),
        lambda: check(connection, POLICY, api, key=KEY, sleep=at_once),
    ):
        with pytest.raises(ConfigError, match="the key may be that of another instance"):
            erases()
    assert len(here(connection)) == 8


def test_a_key_is_confirmed_once(connection: Connection, clerk: StandIn, api: ClerkApi) -> None:
    clerk.put({"id": "user_a"})
    deliver(connection, webhook(clerk, "user_a"), *(changed(user_id) for user_id in EXAMPLES))
    confirm_instance(connection, api, "right", strict=False)
    confirm_instance(connection, api, "right", strict=True)
    assert [call.query["user_id"] for call in clerk.calls] == [["user_a"]]


def test_more_than_a_fifth_of_our_users_are_erased_only_when_told_to(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = filled(clerk, connection, api, 500)
    for user_id in ids[:101]:
        clerk.delete(user_id)
    with pytest.raises(SyncError, match="lacks 101 of our users, more than a fifth: nobody was erased"):
        run(connection, api, full=True)
    assert len(here(connection)) == 500
    assert run(connection, api, full=True, erase_many=True).counters["erased"] == 101
    assert set(here(connection)) == set(ids[101:])


# --- Checking


EVERYTHING_HERE = (
    "select xmin, ctid, users from clerk.users order by user_id",
    "select xmin, ctid, contents from clerk.user_contents as contents order by user_id",
    "select xmin, ctid, events from clerk.webhook_events as events order by svix_id",
    "select xmin, ctid, runs from clerk.runs order by id",
)


def all_rows(connection: Connection) -> list[Any]:
    return [connection.execute(statement).fetchall() for statement in EVERYTHING_HERE]


@pytest.mark.usefixtures("small_pages")
def test_a_check_writes_nothing_and_runs_beside_a_full_run(connect: Connect, clerk: StandIn, api: ClerkApi) -> None:
    connection, other = connect(), connect()
    ids = filled(clerk, connection, api, 90)
    update(clerk, *ids[:4])
    delete(clerk, ids[9])
    clerk.put({"id": "user_new"})
    clerk.odd(ids[20], b"{}")
    before = all_rows(connection)
    drift = check(connection, POLICY, api, key=KEY, sleep=at_once)
    named = {name: set(found) for name, found in drift.named.items()}
    assert named == {"missing": {"user_new"}, "outdated": set(ids[:4]), "incomplete": set(), "gone": {ids[9]}}
    assert all_rows(connection) == before

    beside: list[int] = []
    with contextlib.closing(api_of(clerk)) as another:

        def at_the_end(progress: reconciling.Progress) -> None:
            if progress.phase == "looking up" and not beside:
                beside.append(check(other, POLICY, another, key=KEY, sleep=at_once).total)

        assert run(connection, api, full=True, observe=at_the_end).state == "done"
    assert beside == [0]
    assert check(connection, POLICY, api, key=KEY, sleep=at_once).total == 0


def test_what_a_webhook_repairs_in_the_meantime_is_no_drift(
    connection: Connection, clerk: StandIn, api: ClerkApi
) -> None:
    ids = filled(clerk, connection, api, 30)
    update(clerk, ids[0], ids[1])
    delete(clerk, ids[2], ids[3])
    clerk.put({"id": "user_new"})

    def arrive(_: float) -> None:
        deliver(connection, *(webhook(clerk, user_id) for user_id in (ids[0], ids[2], "user_new")))

    drift = check(connection, POLICY, api, key=KEY, sleep=arrive)
    assert drift.named == {"missing": [], "outdated": [ids[1]], "incomplete": [], "gone": [ids[3]]}


def test_a_sign_up_that_is_not_listed_yet_is_no_drift(connection: Connection, clerk: StandIn, api: ClerkApi) -> None:
    (known, *_) = clerk.fill(20)
    run(connection, api)
    deliver(connection, webhook(clerk, known), changed("user_new", now_ms()))
    assert check(connection, POLICY, api, key=KEY, sleep=lambda _: clerk.put({"id": "user_new"})).total == 0
