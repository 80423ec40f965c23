"""Postgres hung or killed: 503 in time, 202 again soon after its return, and nothing acknowledged is missing."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from tests.acceptance.system import Answer, Client, System, Traffic, new_user, now_ms, user_event
from tests.waiting import until

AT_ONCE: Final = 40
"""More deliveries than the receiver has threads."""

HUNG_SECONDS: Final = 6.0
"""Longer than any one delivery waits."""

REFUSED_WITHIN: Final = 5.0
BACK_WITHIN: Final = 5.0


def deliver_once(system: System) -> Answer:
    with system.client() as client:
        return client.deliver(user_event(new_user(), now_ms()))


def deliver_for_a_while(system: System) -> list[Answer]:
    until = time.monotonic() + HUNG_SECONDS
    answers = []
    while time.monotonic() < until:
        answers.append(deliver_once(system))
        time.sleep(0.2)  # a load, not a wait
    return answers


def test_deliveries_are_answered_503_in_under_5_s_while_postgres_hangs_and_202_soon_after(
    system: System, client: Client
) -> None:
    client.deliver(user_event(new_user(), now_ms()))
    system.settle()
    with ThreadPoolExecutor(AT_ONCE + 2) as senders:
        with system.hung("postgres"):
            waiting = [senders.submit(deliver_for_a_while, system) for _ in range(AT_ONCE)]
            ready = senders.submit(client.get, "/readyz")
            metrics = senders.submit(system.metrics)
            answers = [answer for one in waiting for answer in one.result()]
            assert {answer.status for answer in answers} == {503}
            assert all(int(answer.headers["retry-after"]) > 0 for answer in answers)
            assert max(answer.seconds for answer in answers) < REFUSED_WITHIN
            assert ready.result().status == 503
            assert "Postgres" in ready.result().said["problems"][0]
            assert metrics.result()["clerk_sync_database_up"] == 0
            assert client.get("/healthz").status == 200
        returned = time.monotonic()
        # From every process of the receiver.
        until(
            lambda: {answer.status for answer in senders.map(lambda _: deliver_once(system), range(20))} == {202},
            BACK_WITHIN,
            "202 for all",
        )
        assert time.monotonic() - returned < BACK_WITHIN
    assert client.get("/readyz").status == 200
    system.settle()


def test_postgres_that_is_killed_costs_no_acknowledged_event(system: System) -> None:
    with Traffic(system) as traffic:
        traffic.flow(50)
        pid = system.kill("postgres")
        killed = time.monotonic()
        system.await_restart("postgres", pid)
        traffic.flow(50)
        assert time.monotonic() - killed < 10
    assert set(traffic.statuses) <= {200, 202, 503}
    traffic.assert_all_applied()
