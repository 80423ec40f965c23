"""Another broker is a matter of one URL: the system on a real RabbitMQ, where one is installed."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.acceptance.system import Client, System, new_user, now_ms, user_event
from tests.clerk import SECRET
from tests.waiting import until
from worker import local

INSTALLED: Final = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"))

pytestmark = pytest.mark.skipif(not INSTALLED, reason="Debian's rabbitmq-server isn't installed")


def answers(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def rabbitmq(tmp_path: Path) -> Iterator[str]:
    """A RabbitMQ of its own that is just starting; its URL."""
    port, distribution, names = (local.free_port() for _ in range(3))
    (tmp_path / "plugins").write_text("[].")
    environment = {
        "PATH": os.defpath,
        "HOME": str(tmp_path),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(names),
        "RABBITMQ_NODENAME": f"clerk{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(distribution),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_MNESIA_BASE": str(tmp_path / "mnesia"),
        "RABBITMQ_LOG_BASE": str(tmp_path / "log"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(tmp_path / "plugins"),
        "RABBITMQ_CONFIG_FILE": str(tmp_path / "none"),
        "RABBITMQ_CONF_ENV_FILE": str(tmp_path / "none"),
        "RABBITMQ_LOGS": "-",
    }
    with (tmp_path / "output").open("wb") as output:
        # Ours, since the one that the server starts would stay.
        epmd = subprocess.Popen(["epmd"], env=environment, stdout=output, stderr=output)
        until(lambda: answers(names), what="epmd")
        server = local.launch([str(INSTALLED[-1])], stop_signal=15, environment=environment, output=output)
        yield f"amqp://guest:guest@127.0.0.1:{port}//"
        local.kill_group_now(server)
        server.wait()
        epmd.kill()
        epmd.wait()


def test_events_are_seen_at_once_with_rabbitmq_as_the_broker(new_system: Callable[..., System], rabbitmq: str) -> None:
    system = new_system(REDIS_URL=rabbitmq, CLERK_WEBHOOK_SIGNING_SECRET=SECRET)
    system.start()  # while the broker still does
    assert "redis" not in system.pids
    with system.client() as client:
        before = new_user()
        assert client.deliver(user_event(before, now_ms())).status == 202
        until(lambda: system.rows(before), what="an event without the broker")
        until(lambda: client.metrics()["clerk_sync_wake_ups_total"] > 0, 40, "the broker")
        # Until Celery has bound its queue, and the doorbell its connection, a sweep may be first.
        until(lambda: at_once(system, client), 20, "a wake-up for each event")
    status = system.command("status")
    assert status.returncode == 0, status.stdout
    started = time.monotonic()
    assert system.stop() == 0
    assert time.monotonic() - started < 5, "the worker hears that it is to stop"


DOORBELL: Final = "clerk_sync_drains_total{cause=doorbell}"


def at_once(system: System, client: Client) -> bool:
    """Whether it is a wake-up, and no sweep, that has an event applied."""
    before = client.metrics()[DOORBELL]
    user_id = new_user()
    assert client.deliver(user_event(user_id, now_ms())).status == 202
    until(lambda: system.rows(user_id))
    return client.metrics()[DOORBELL] > before
