"""`kill -9` of a worker in mid-batch, step by step. Kills of all kinds under load are in test_faults.py."""

from __future__ import annotations

from typing import Final

import psycopg

from tests.acceptance.system import (
    CANARY,
    Client,
    System,
    new_user,
    now_ms,
    user_event,
)
from tests.waiting import until

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
