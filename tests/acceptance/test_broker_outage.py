"""Redis is a doorbell, never a store: hung, killed, wiped or absent, events are accepted and visible all the same."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import psycopg
import redis

from tests.acceptance.system import Client, System, Traffic, latency, new_user, now_ms, user_event
from tests.waiting import until

VISIBLE_WITHIN: Final = 10.0
ACKNOWLEDGED_WITHIN: Final = 1.0


def accept_and_see(client: Client, connection: psycopg.Connection[Any], for_seconds: float) -> float:
    """Deliver an event now and then for a while; the longest that one of them took to be visible."""
    waiting: dict[str, float] = {}
    seen: dict[str, float] = {}
    last_sent = started = time.monotonic()
    read = "select user_id from clerk.user_metadata where user_id = any(%s)"

    def all_seen() -> bool:
        nonlocal last_sent
        now = time.monotonic()
        if now - started < for_seconds and now - last_sent > 0.25:
            user_id, last_sent = new_user(), now
            answer = client.deliver(user_event(user_id, now_ms()))
            assert answer.outcome == (202, "accepted")
            assert answer.seconds < ACKNOWLEDGED_WITHIN
            waiting[user_id] = time.monotonic()
        for (user_id,) in connection.execute(read, (list(waiting),)).fetchall():
            seen[user_id] = time.monotonic() - waiting.pop(user_id)
        return now - started > for_seconds and not waiting

    until(all_seen, for_seconds + 2 * VISIBLE_WITHIN, "the visibility of every event")
    return max(seen.values())


def doorbell_works(client: Client, connection: psycopg.Connection[Any]) -> bool:
    """Whether events are visible well before a sweep would find them."""
    return statistics.median(latency(client, connection) for _ in range(9)) < 0.2


def test_events_are_visible_within_10_s_while_redis_hangs_and_at_once_when_it_is_back(
    system: System, client: Client
) -> None:
    with system.connect() as connection:
        until(lambda: doorbell_works(client, connection), 30, "the doorbell")
        with system.hung("redis"):
            assert accept_and_see(client, connection, for_seconds=7) < VISIBLE_WITHIN
        until(lambda: doorbell_works(client, connection), 40, "the doorbell")


def test_events_are_visible_within_10_s_while_redis_is_killed_and_at_once_when_it_is_back(
    system: System, client: Client
) -> None:
    with system.connect() as connection:
        pid = system.kill("redis")
        assert accept_and_see(client, connection, for_seconds=2) < VISIBLE_WITHIN
        system.await_restart("redis", pid)
        until(lambda: doorbell_works(client, connection), 40, "the doorbell")


def test_wiping_redis_and_cutting_its_connections_at_any_moment_loses_nothing(system: System) -> None:
    with redis.Redis.from_url(system.redis_url) as broker, Traffic(system) as traffic:
        wiped = 0

        def wipe() -> bool:
            nonlocal wiped
            broker.flushall()
            if wiped % 10 == 0:
                broker.client_kill_filter(skipme=True)  # everybody else's connection
            wiped += 1
            return traffic.acknowledged >= 200

        until(wipe, 20, "200 acknowledgements")
    assert wiped > 50
    assert set(traffic.statuses) <= {200, 202}
    traffic.assert_all_applied()


def test_system_whose_redis_was_never_there_serves_and_stops(new_system: Callable[..., System]) -> None:
    system = new_system(REDIS_URL="redis://127.0.0.1:1/0")
    system.start()
    with system.client() as client, system.connect() as connection:
        assert client.get("/readyz").status == 200
        assert accept_and_see(client, connection, for_seconds=1) < VISIBLE_WITHIN
    status = system.command("status", "--json")
    assert status.returncode == 1
    assert {check["name"]: check["ok"] for check in json.loads(status.stdout)["checks"]} == {
        "configuration": True,
        "Postgres": True,
        "schema": True,
        "privileges": True,
        "writing": True,
        "broker": False,
        "reconcile": True,
    }
    assert system.stop() == 0
