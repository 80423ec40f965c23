"""What no webhook told of is repaired by the periodic reconcile, with or without a broker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.acceptance.system import CANARY, System, new_user, now_ms, user_event
from tests.pulling import LIVE
from tests.waiting import until
from worker import local
from worker.standin import StandIn

REPAIRED_WITHIN: Final = 10.0


@pytest.fixture
def clerk() -> Iterator[StandIn]:
    with StandIn(LIVE) as standin:
        yield standin


@pytest.fixture
def reconciling(new_system: Callable[..., System], clerk: StandIn) -> Callable[..., System]:
    """Starts systems that reconcile with the stand-in each second."""

    def start(**environment: str) -> System:
        system = new_system(
            RECONCILE_SECONDS="1",
            CLERK_SECRET_KEY=clerk.secret_key,
            CLERK_API_URL=clerk.url,
            LOG_LEVEL="DEBUG",
            **environment,
        )
        system.start()
        return system

    return start


def sign_up(clerk: StandIn, **private: str) -> str:
    """A user that Clerk has and sends no webhook of."""
    user_id = new_user()
    clerk.put({"id": user_id, "first_name": CANARY, "private_metadata": {"canary": CANARY, **private}})
    return user_id


def lost_events_are_repaired(system: System, clerk: StandIn, deleted: str) -> str:
    """A sign-up, a change and a deletion of which no webhook came; the user who signed up."""
    user_id = sign_up(clerk)
    until(lambda: system.rows(user_id), REPAIRED_WITHIN, "the user of whom no webhook came")
    assert system.rows(user_id)[user_id][0] == {"canary": CANARY}
    clerk.update(user_id, private_metadata={"plan": "pro"})
    until(lambda: system.rows(user_id)[user_id][0].get("plan"), REPAIRED_WITHIN, "the change of which no webhook came")
    clerk.delete(deleted)
    until(lambda: not system.rows(deleted), REPAIRED_WITHIN, "the deletion of which no webhook came")
    return user_id


def test_lost_webhooks_are_repaired_with_redis_and_while_it_is_dead_and_a_run_ends_with_the_system(
    reconciling: Callable[..., System], clerk: StandIn, tmp_path: Path
) -> None:
    tmp_path.chmod(0o711)
    # Of the test's own, since nobody starts this one again.
    with local.lock(tmp_path):
        server = local.redis(tmp_path)
        with (tmp_path / "redis.log").open("wb") as output:
            redis = local.start(server, output)
        try:
            local.wait_ready(server, redis, 20)
            system = reconciling(REDIS_URL=server.url)
            delivered = new_user()
            clerk.put({"id": delivered, "updated_at": (version := now_ms())})
            with system.client() as client:
                assert client.deliver(user_event(delivered, version)).outcome == (202, "accepted")
            until(lambda: system.rows(delivered))
            user_id = lost_events_are_repaired(system, clerk, deleted=delivered)
        finally:
            local.kill_group_now(redis)
            redis.wait()
    lost_events_are_repaired(system, clerk, deleted=user_id)

    clerk.fill(500)  # so that a run goes on for a while
    clerk.slow(0.3)
    clerk.forget_calls()
    until(lambda: clerk.calls, what="a run")
    started = time.monotonic()
    assert system.stop() == 0
    assert time.monotonic() - started < 8
    assert "didn't stop within" not in system.output
    assert "the periodic reconcile was cut short: the worker is stopping" in system.output
    assert "Traceback" not in system.output
    assert CANARY not in system.output
    assert clerk.secret_key not in system.output
