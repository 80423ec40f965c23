"""What an operator sees and does beside a running system: the commands, health and metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
from psycopg import sql

from tests.acceptance.system import CANARY, Client, System, new_user, now_ms, user_event
from tests.events import deleted
from tests.waiting import until

COUNTS: Final = {
    *("pending", "oldest_pending_seconds", "dead", "done"),
    *("users", "users_over_budget", "users_content_missing", "tombstones"),
}


def test_status_says_that_all_is_well_and_counts(system: System, client: Client) -> None:
    client.deliver(user_event(new_user(), now_ms()))
    system.settle()
    status = system.program("status", "--json")
    assert (status.returncode, status.stderr) == (0, "")
    found = json.loads(status.stdout)
    assert found["ok"] is True
    assert {check["name"]: check["problem"] for check in found["checks"]} == dict.fromkeys(
        ("configuration", "Postgres", "schema", "privileges", "writing", "broker", "reconcile")
    )
    assert [check["off"] for check in found["checks"]] == [*[None] * 6, "CLERK_SECRET_KEY isn't set"]
    assert found["counts"].keys() == COUNTS
    assert found["counts"]["pending"] == 0
    assert found["counts"]["users"] > 0
    plain = system.program("status")
    assert (plain.returncode, plain.stderr) == (0, "")
    assert "tombstones" in plain.stdout


def listed(system: System, *arguments: str) -> list[dict[str, Any]]:
    ran = system.command("events", "list", "--json", *arguments)
    assert (ran.returncode, ran.stderr) == (0, "")
    found = json.loads(ran.stdout)
    assert isinstance(found, list)
    return found


def test_events_are_listed_and_shown_without_their_bodies(system: System, client: Client) -> None:
    user_id = new_user()
    sent = [client.deliver(user_event(user_id, now_ms())).svix_id for _ in range(3)]
    dead = client.deliver(b'{"type": "user.updated", "data": {"id": "%s"}}' % user_id.encode()).svix_id
    system.settle()
    assert [event["svix_id"] for event in listed(system, "--user", user_id)] == [dead, *reversed(sent)]
    assert [event["svix_id"] for event in listed(system, "--user", user_id, "--state", "dead")] == [dead]
    assert len(listed(system, "--user", user_id, "--limit", "2")) == 2
    shown = system.program("events", "show", dead, "--json")
    assert (shown.returncode, shown.stderr) == (0, "")
    event = json.loads(shown.stdout)
    assert "body" not in event
    assert {key: event[key] for key in ("svix_id", "type", "user_id", "state")} == {
        "svix_id": dead,
        "type": "user.updated",
        "user_id": user_id,
        "state": "dead",
    }
    assert "nothing tells the version" in event["error"]
    assert event["body_bytes"] > 0
    missing = system.program("events", "show", "msg_of_nobody", "--json")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "msg_of_nobody" in missing.stderr


@pytest.fixture
def poisoned(system: System) -> Iterator[str]:
    """A user that Postgres refuses until the test says otherwise."""
    user_id = new_user()
    with system.connect() as connection:
        poison = sql.SQL("alter table clerk.users add constraint poison check (user_id <> {}) not valid")
        connection.execute(poison.format(user_id))
        yield user_id
        connection.execute("alter table clerk.users drop constraint if exists poison")


def test_event_that_postgres_refuses_holds_up_nobody_and_is_applied_by_a_retry(
    system: System, client: Client, poisoned: str
) -> None:
    good = new_user()
    bad = client.deliver(user_event(poisoned, now_ms(), {"n": 1}))
    assert bad.outcome == (202, "accepted")
    client.deliver(user_event(good, now_ms()))
    until(lambda: system.rows(good))
    event = until(lambda: (found := system.event(bad.svix_id)) and found[0] == "dead" and found)
    assert event
    assert event[3], "the body is kept for the retry"
    assert "23514" in (event[2] or "")

    with system.connect() as connection:
        connection.execute("alter table clerk.users drop constraint poison")
    retried = system.program("events", "retry", bad.svix_id, "--json")
    assert (retried.returncode, retried.stderr) == (0, "")
    assert json.loads(retried.stdout) == {"retried": [bad.svix_id], "not_dead": []}
    until(lambda: poisoned in system.rows(poisoned))
    assert system.event(bad.svix_id) == ("done", 2, None, False)

    again = system.command("events", "retry", bad.svix_id, "--json")
    assert again.returncode == 1
    assert json.loads(again.stdout) == {"retried": [], "not_dead": [bad.svix_id]}


def test_all_dead_events_can_be_retried_and_the_unusable_are_set_aside_again(system: System, client: Client) -> None:
    dead = client.deliver(b'{"type": "user.updated", "data": {}}').svix_id
    retried = system.command("events", "retry", "--dead", "--json")
    assert retried.returncode == 0
    assert dead in json.loads(retried.stdout)["retried"]
    system.settle()
    event = system.event(dead)
    assert event is not None
    assert event[:2] == ("dead", 1)
    assert system.command("events", "retry").returncode == 2
    assert system.command("events", "retry", "--dead", dead).returncode == 2


def test_dead_events_can_be_dismissed_which_erases_their_bodies(system: System, client: Client) -> None:
    dead = [client.deliver(b'{"type": "user.updated", "data": {}}').svix_id for _ in range(3)]
    dismissed = system.program("events", "dismiss", dead[0], "--json")
    assert (dismissed.returncode, dismissed.stderr) == (0, "")
    assert json.loads(dismissed.stdout) == {"dismissed": [dead[0]], "not_dead": []}
    assert system.event(dead[0]) == ("done", 0, "dismissed: data.id is missing", False)
    again = system.command("events", "dismiss", dead[0], dead[1])
    assert (again.returncode, again.stdout) == (1, "Dismissed: 1.\n")
    assert again.stderr == f"{dead[0]} is not an event that was set aside.\n"
    every = system.command("events", "dismiss", "--dead", "--json")
    assert every.returncode == 0
    assert dead[2] in json.loads(every.stdout)["dismissed"]
    assert listed(system, "--state", "dead") == []
    assert system.command("events", "dismiss").returncode == 2
    assert system.command("events", "dismiss", "--dead", dead[0]).returncode == 2


def test_send_signs_and_posts_a_body(system: System, tmp_path: Path) -> None:
    user_id = new_user()
    body = tmp_path / "event.json"
    body.write_bytes(user_event(user_id, now_ms()))
    sent = system.command("send", str(body), "--id", f"msg_{user_id}")
    assert (sent.returncode, sent.stderr) == (0, "")
    assert sent.stdout.split()[0] == "202"
    assert f"svix-id=msg_{user_id}" in sent.stdout
    until(lambda: system.rows(user_id))
    piped = system.program("send", "-", text=deleted(user_id, now_ms()).decode())
    assert piped.returncode == 0
    until(lambda: not system.rows(user_id))
    refused = system.command("send", str(body), "--secret", "whsec_AAAA")
    assert refused.returncode == 1
    assert refused.stdout.split()[0] == "400"
    assert system.command("send", str(body), "--secret", "sk_test_AAAA").returncode == 2
    assert system.command("send", str(tmp_path / "nowhere.json")).returncode == 2
    unheard = system.command("send", str(body), "--url", "http://127.0.0.1:1/webhooks/clerk")
    assert (unheard.returncode, unheard.stdout) == (1, "")
    assert "no answer" in unheard.stderr


def test_command_without_a_running_system_says_so(system: System, tmp_path: Path) -> None:
    missing = tmp_path / "none.json"
    for command in (("status",), ("events", "list"), ("send", str(system.info_path))):
        ran = system.command(*command, info=missing)
        assert ran.returncode == 2
        assert "is `clerk-sync up --info" in ran.stderr


def test_health_and_readiness(client: Client) -> None:
    alive = client.get("/healthz")
    assert (alive.status, alive.said) == (200, {"status": "alive"})
    ready = client.get("/readyz")
    assert (ready.status, ready.said) == (200, {"status": "ready", "problems": []})


def test_metrics_are_right_over_all_processes_whichever_answers(system: System) -> None:
    n = 60
    system.settle()
    before = system.metrics()

    def since(name: str) -> set[float]:
        """What this sample has grown by since the start, in several scrapes."""
        return {scraped.get(name, 0.0) - before.get(name, 0.0) for scraped in scrapes}

    def deliver(number: int) -> int:
        with system.client() as client:
            if number == 0:
                assert client.post(b"{}", {}).status == 400
                assert client.deliver(b'{"type": "session.created"}').status == 200
                assert client.deliver(b"{}").outcome == (202, "dead")
            return client.deliver(user_event(new_user(), now_ms())).status

    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(deliver, range(n))) == {202}
        system.settle()
        scrapes = list(pool.map(lambda _: system.metrics(), range(20)))
    # The receiver's, of which there are two processes.
    assert since("clerk_sync_deliveries_total{answer=accepted}") == {n}
    for answer in ("refused", "ignored", "dead"):
        assert since(f"clerk_sync_deliveries_total{{answer={answer}}}") == {1}
    assert since("clerk_sync_ack_seconds_count") == {n + 3}
    # The worker's.
    assert since("clerk_sync_events_processed_total{outcome=applied}") == {n}
    assert since("clerk_sync_freshness_seconds_count") == {n}
    # The database's.
    assert since("clerk_sync_events{state=done}") == {n}
    assert since("clerk_sync_events{state=dead}") == {1}
    assert since("clerk_sync_users") == {n}
    assert {scraped["clerk_sync_events{state=pending}"] for scraped in scrapes} == {0}
    assert {scraped["clerk_sync_oldest_pending_seconds"] for scraped in scrapes} == {0}
    assert {scraped["clerk_sync_database_up"] for scraped in scrapes} == {1}
    assert not any("user_" in name or CANARY in name for name in scrapes[0])
