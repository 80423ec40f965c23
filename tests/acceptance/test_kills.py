"""`kill -9` of any process while events flow: at the end everything acknowledged has had its effect, once."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Final

import psycopg
import pytest

from tests.acceptance.system import (
    CANARY,
    Client,
    System,
    Traffic,
    children,
    new_user,
    now_ms,
    user_event,
)
from tests.waiting import until


@pytest.mark.parametrize("name", ["web", "worker", "beat", "postgres", "redis"])
def test_nothing_acknowledged_is_missing_after_a_process_was_killed(system: System, name: str) -> None:
    with Traffic(system) as traffic:
        traffic.flow(50)
        pid = system.kill(name)
        system.await_restart(name, pid)
        traffic.flow(50)
    assert set(traffic.statuses) <= {200, 202, 503, None}
    if name in {"worker", "beat", "redis"}:
        assert set(traffic.statuses) <= {200, 202}, "the receiver doesn't need it"
    traffic.assert_all_applied()


@pytest.mark.parametrize("name", ["web", "postgres"])
def test_nothing_acknowledged_is_missing_after_a_child_of_it_was_killed(system: System, name: str) -> None:
    with Traffic(system) as traffic:
        traffic.flow(50)
        for child in children(system.pids[name])[:2]:
            with contextlib.suppress(ProcessLookupError):  # Postgres ends its others when it loses one
                os.kill(child, signal.SIGKILL)
        traffic.flow(50)
    assert set(traffic.statuses) <= {200, 202, 503, None}
    traffic.assert_all_applied()


WAITING: Final = """
select pid from pg_stat_activity
where datname = current_database() and application_name = 'clerk-sync worker' and wait_event_type = 'Lock'
"""


def test_worker_killed_in_mid_batch_leaves_all_of_it_and_the_next_one_applies_it(
    system: System, client: Client
) -> None:
    held, others = new_user(), [new_user() for _ in range(5)]
    client.deliver(user_event(held, now_ms(), {"n": 0}))
    until(lambda: system.rows(held))
    with psycopg.connect(system.database_url) as holder, system.connect() as watcher:
        holder.execute("select from clerk.users where user_id = %s for update", (held,))
        sent = [client.deliver(user_event(held, now_ms(), {"n": 1}))]
        backends = until(lambda: watcher.execute(WAITING).fetchall(), what="the batch")
        sent += [client.deliver(user_event(user_id, now_ms(), {"n": 2})) for user_id in others]
        sent += [client.deliver(user_event(held, now_ms(), {"n": 3}))]
        assert all(answer.outcome == (202, "accepted") for answer in sent)
        pid = system.kill("worker")
        system.await_restart("worker", pid)
        # Its transaction, still waiting in Postgres, has neither been lost nor half done.
        assert watcher.execute(WAITING).fetchall() == backends
        assert system.event(sent[0].svix_id) == ("pending", 0, None, True)
        assert system.rows(held)[held][0] == {"canary": CANARY, "n": 0}
    system.settle(15)
    rows = system.rows(held, *others)
    assert {user_id: row[0]["n"] for user_id, row in rows.items()} == {held: 3, **dict.fromkeys(others, 2)}
    assert {system.event(answer.svix_id) for answer in sent} == {("done", 1, None, False)}
