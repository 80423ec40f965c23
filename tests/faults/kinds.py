"""The faults, each a function that does it while events flow, and returns once it is over."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import psycopg
import redis

from tests.acceptance.system import ENVIRONMENT, PROGRAMS, children
from tests.faults.hosts import CLOCK, OWNER, Cluster, Host, ServerProcess, idle_connections
from tests.faults.sender import Sender
from worker.app import QUEUE


@dataclass(frozen=True, slots=True)
class Scene:
    """Where a fault takes place."""

    cluster: Cluster
    sender: Sender
    random: random.Random

    def hold(self, shortest: float, longest: float) -> None:
        """Let events flow for a while, a chance one."""
        threading.Event().wait(self.random.uniform(shortest, longest))

    def host(self) -> Host:
        """One of the hosts."""
        return self.random.choice(self.cluster.hosts)

    def some_hosts(self) -> list[Host]:
        """One of the hosts, or all."""
        return [self.host()] if self.random.random() < 0.5 else self.cluster.hosts

    def until(self, condition: Callable[[], object], limit_seconds: float) -> bool:
        """Wait for a moment that a fault wants to hit; whether it came."""
        deadline = time.monotonic() + limit_seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)  # between two looks, not instead of one
        return True


Inject = Callable[[Scene], None]


@dataclass(frozen=True, slots=True)
class Kind:
    """A fault. `weight`: how often it is chosen; `needs_broker`: the doorbell has to be heard again after it."""

    name: str
    inject: Inject
    weight: float = 1.0
    broker: bool = False


KINDS: Final[dict[str, Kind]] = {}


def fault(name: str, *, weight: float = 1.0, broker: bool = False) -> Callable[[Inject], Inject]:
    """Give a fault its name."""

    def register(inject: Inject) -> Inject:
        KINDS[name] = Kind(name, inject, weight, broker)
        return inject

    return register


# Processes


@fault("receiver killed", weight=0.5)
def receiver_killed(scene: Scene) -> None:
    scene.host().kill_part("web")


@fault("receiver: a child killed", weight=1)
def receiver_child_killed(scene: Scene) -> None:
    kill_some(scene, children(scene.host().system.pids["web"]))


@fault("receiver killed between commit and answer", weight=0.5)
def receiver_killed_unanswered(scene: Scene) -> None:
    host = scene.host()
    host.database.lose_replies()
    # What it sends now is committed, and it never learns of it.
    scene.hold(0.1, 0.8)
    host.kill_part("web")
    host.database.heal()


@fault("receiver hung", weight=0.5)
def receiver_hung(scene: Scene) -> None:
    with scene.host().hung_part("web"):
        scene.hold(0.3, 2)


@fault("receiver: a child hung", weight=0.5)
def receiver_child_hung(scene: Scene) -> None:
    with scene.host().hung_part("web", child=True):
        scene.hold(0.3, 2)


@fault("worker killed", weight=0.6)
def worker_killed(scene: Scene) -> None:
    for host in scene.some_hosts():
        host.kill_part("worker")


HOLD_SOME = "select user_id from clerk.users order by version desc limit 40 for update"
WAITING = """
select count(*) from pg_stat_activity
where datname = current_database() and application_name = 'clerk-sync worker' and wait_event_type = 'Lock'
"""


@fault("workers killed in mid-batch", weight=0.4)
def workers_killed_in_mid_batch(scene: Scene) -> None:
    with scene.cluster.connect() as holder, scene.cluster.connect() as watcher, holder.transaction():
        holder.execute(HOLD_SOME)
        scene.until(lambda: watcher.execute(WAITING).fetchone() != (0,), 4)
        for host in scene.cluster.hosts:
            host.kill_part("worker")


@fault("worker killed between commit and knowing of it", weight=0.5)
def worker_killed_unknowing(scene: Scene) -> None:
    host = scene.host()
    host.database.lose_replies()
    scene.hold(0.1, 2.5)
    host.kill_part("worker")
    host.database.heal()


@fault("worker hung", weight=0.5)
def worker_hung(scene: Scene) -> None:
    with contextlib.ExitStack() as hung:
        for host in scene.some_hosts():
            hung.enter_context(host.hung_part("worker"))
        scene.hold(0.3, 3)


@fault("beat killed", weight=0.6)
def beat_killed(scene: Scene) -> None:
    scene.host().kill_part("beat")


@fault("host killed: all its processes at once", weight=0.15)
def host_killed(scene: Scene) -> None:
    host = scene.host()
    host.kill()
    scene.hold(0, 1)
    host.start()


@fault("host stopped and started, as a deployment does", weight=0.12)
def host_restarted(scene: Scene) -> None:
    host = scene.host()
    host.stop()
    host.start()


@fault("everything killed at once, servers too", weight=0.15)
def everything_killed(scene: Scene) -> None:
    cluster = scene.cluster
    for host in cluster.hosts:
        host.kill()
    cluster.postgres.kill()
    cluster.redis.kill()
    cluster.postgres.start()
    cluster.redis.start()
    for host in cluster.hosts:
        host.begin()
    for host in cluster.hosts:
        host.await_ready()


# The clock. Svix's signatures are refused where it is more than five minutes off; the other host takes them.


@fault("clock off in one receiver", weight=0.05)
def receiver_clock_off(scene: Scene) -> None:
    clock_off(scene, "webhooks", scene.random.choice((-240, 240, -900, 900)))


@fault("clock off in one worker", weight=0.05)
def worker_clock_off(scene: Scene) -> None:
    clock_off(scene, "worker.main worker", scene.random.choice((-86_400, -300, 300, 86_400)))


def clock_off(scene: Scene, process: str, seconds: int) -> None:
    host = scene.host()
    host.stop()
    host.start(PYTHONPATH=str(CLOCK), CLOCK_OFF_IN=process, CLOCK_OFF_SECONDS=str(seconds))
    scene.hold(0.5, 1)
    host.stop()
    host.start()


# Redis


@fault("Redis killed", broker=True)
def redis_killed(scene: Scene) -> None:
    down_for_a_while(scene, scene.cluster.redis)


@fault("Redis wiped", weight=3, broker=True)
def redis_wiped(scene: Scene) -> None:
    with scene.cluster.broker() as broker:
        broker.flushall()


@fault("Redis evicts", weight=1.5, broker=True)
def redis_evicts(scene: Scene) -> None:
    with_memory(scene, "allkeys-random")


@fault("Redis full", weight=1.5, broker=True)
def redis_full(scene: Scene) -> None:
    with_memory(scene, "noeviction")


def with_memory(scene: Scene, policy: str) -> None:
    """Give Redis less memory than it has taken."""
    with scene.cluster.broker() as broker:
        broker.config_set("maxmemory-policy", policy)
        broker.config_set("maxmemory", 100_000)
        scene.hold(0.3, 1.5)
        broker.config_set("maxmemory", 0)
        broker.config_set("maxmemory-policy", "noeviction")


@fault("Redis hung", broker=True)
def redis_hung(scene: Scene) -> None:
    with scene.cluster.redis.hung():
        scene.hold(0.3, 4)


@fault("Redis: connections cut", weight=3, broker=True)
def redis_cut(scene: Scene) -> None:
    for _ in range(scene.random.randint(1, 4)):
        for host in scene.some_hosts():
            host.broker.cut()
        scene.hold(0, 0.3)


@fault("Redis refuses connections", broker=True)
def redis_refuses(scene: Scene) -> None:
    hosts = scene.some_hosts()
    for host in hosts:
        host.broker.refuse()
    scene.hold(0.3, 2)
    for host in hosts:
        host.broker.heal()


@fault("Redis half-open: old connections silent, new ones work", weight=0.7, broker=True)
def redis_half_open(scene: Scene) -> None:
    for host in scene.some_hosts():
        host.broker.half_open()


@fault("Redis mute: accepts, never answers", broker=True)
def redis_mute(scene: Scene) -> None:
    hosts = scene.some_hosts()
    for host in hosts:
        host.broker.mute()
    scene.hold(0.3, 3)
    for host in hosts:
        host.broker.heal()


@fault("Redis slow", broker=True)
def redis_slow(scene: Scene) -> None:
    for host in scene.cluster.hosts:
        host.broker.delay(scene.random.choice((0.05, 0.2, 1.0)))
    scene.hold(0.3, 1.5)
    for host in scene.cluster.hosts:
        host.broker.heal()


class Forged:
    """A pickle that would leave a trace where somebody loads it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._path}",)


@fault("Redis: forged messages", weight=2, broker=True)
def redis_forged(scene: Scene) -> None:
    trace = scene.cluster.folder / "forged"
    forged: list[bytes] = [
        b"",
        b"not JSON",
        b"[]",
        b'{"body": "", "headers": {}}',
        b'{"body": "W10=", "content-type": "application/json", "headers": {"task": "os.system"}, "properties": {}}',
        pickle.dumps(Forged(str(trace))),
    ]
    with scene.cluster.broker() as broker:
        for _ in range(10):
            broker.lpush(QUEUE, scene.random.choice(forged))
    scene.hold(0.5, 1)
    assert not trace.exists(), "somebody loaded a pickle from the broker"


# Postgres


@fault("Postgres killed")
def postgres_killed(scene: Scene) -> None:
    down_for_a_while(scene, scene.cluster.postgres)


@fault("Postgres restarted")
def postgres_restarted(scene: Scene) -> None:
    scene.cluster.postgres.stop(scene.random.choice((signal.SIGINT, signal.SIGQUIT)))
    scene.hold(0, 1)
    scene.cluster.postgres.start()


BACKENDS = """
select pid from pg_stat_activity
where datname = current_database() and application_name like 'clerk-sync%'
"""


@fault("Postgres: a backend killed, all others restart", weight=0.7)
def postgres_backend_killed(scene: Scene) -> None:
    with contextlib.suppress(psycopg.OperationalError), scene.cluster.connect(superuser=True) as connection:
        kill_some(scene, [pid for (pid,) in connection.execute(BACKENDS)][:1])


TERMINATE = f"select pg_terminate_backend(pid) from ({BACKENDS}) as ours"  # noqa: S608 - two constants


@fault("Postgres ends our sessions", weight=3)
def postgres_terminates(scene: Scene) -> None:
    with scene.cluster.connect(superuser=True) as connection:
        for _ in range(scene.random.randint(1, 5)):
            connection.execute(TERMINATE)
            scene.hold(0, 0.2)


@fault("Postgres hung")
def postgres_hung(scene: Scene) -> None:
    with scene.cluster.postgres.hung():
        scene.hold(0.3, 3)


@fault("Postgres: connections cut", weight=3)
def postgres_cut(scene: Scene) -> None:
    for _ in range(scene.random.randint(1, 5)):
        for host in scene.some_hosts():
            host.database.cut()
        scene.hold(0, 0.3)


@fault("Postgres refuses connections")
def postgres_refuses(scene: Scene) -> None:
    hosts = scene.some_hosts()
    for host in hosts:
        host.database.refuse()
    scene.hold(0.3, 2.5)
    for host in hosts:
        host.database.heal()


@fault("Postgres half-open: old connections silent, new ones work", weight=0.4)
def postgres_half_open(scene: Scene) -> None:
    for host in scene.some_hosts():
        host.database.half_open()


@fault("Postgres mute: accepts, never answers", weight=0.4)
def postgres_mute(scene: Scene) -> None:
    hosts = scene.some_hosts()
    for host in hosts:
        host.database.mute()
    scene.hold(0.3, 3)
    for host in hosts:
        host.database.heal()


@fault("Postgres commits, and the answer is lost", weight=2)
def postgres_replies_lost(scene: Scene) -> None:
    hosts = scene.some_hosts()
    for host in hosts:
        host.database.lose_replies()
    scene.hold(0.2, 2)
    for host in hosts:
        host.database.heal()


@fault("Postgres slow")
def postgres_slow(scene: Scene) -> None:
    for host in scene.cluster.hosts:
        host.database.delay(scene.random.choice((0.02, 0.1, 0.4)))
    scene.hold(0.3, 1.5)
    for host in scene.cluster.hosts:
        host.database.heal()


@fault("Postgres at its connection limit")
def postgres_full(scene: Scene) -> None:
    with scene.cluster.connect(superuser=True) as connection:
        connection.execute(f"alter role {OWNER} connection limit {scene.random.choice((0, 1, 2))}")
        connection.execute(TERMINATE)
        scene.hold(0.5, 2)
        connection.execute(f"alter role {OWNER} connection limit -1")


@fault("Postgres read-only, as after a failover")
def postgres_read_only(scene: Scene) -> None:
    with scene.cluster.connect(superuser=True) as connection:
        connection.execute(f"alter role {OWNER} set default_transaction_read_only = on")
        connection.execute(TERMINATE)
        scene.hold(0.3, 2)
        connection.execute(f"alter role {OWNER} reset default_transaction_read_only")
        if scene.random.random() < 0.5:  # or nobody hangs up, and sessions stay read-only
            connection.execute(TERMINATE)


@fault("a long lock on clerk.users", weight=1.5)
def users_locked(scene: Scene) -> None:
    lock(scene, "clerk.users")


@fault("a long lock on clerk.webhook_events", weight=1.5)
def inbox_locked(scene: Scene) -> None:
    lock(scene, "clerk.webhook_events")


def lock(scene: Scene, table: str) -> None:
    with scene.cluster.connect() as connection, connection.transaction():
        connection.execute(f"lock table {table} in access exclusive mode")
        scene.hold(0.3, 12 if scene.random.random() < 0.1 else 2)


@fault("clerk-sync migrate in the midst of it", weight=0.3)
def migrated(scene: Scene) -> None:
    subprocess.run(
        (str(PROGRAMS / "clerk-sync"), "migrate"),
        env={**ENVIRONMENT, "DATABASE_URL": scene.host().database_url},
        capture_output=True,
        check=True,
        timeout=60,
    )


# Whoever reaches the endpoint


@fault("200 connections with half a request", weight=0.5)
def half_requests(scene: Scene) -> None:
    head = b"POST /webhooks/clerk HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
    connections = idle_connections(scene.host().port, 200, scene.random.choice((b"", head, head + b"\r\n{")))
    scene.hold(0.5, 1.5)
    for connection in connections:
        connection.close()


# Several


@fault("two faults at once", weight=3)
def two_at_once(scene: Scene) -> None:
    at_once(scene, 2)


@fault("three faults at once", weight=1.5)
def three_at_once(scene: Scene) -> None:
    at_once(scene, 3)


APART: Final = frozenset(
    {
        "two faults at once",
        "three faults at once",
        # These start what another one may have stopped for good reason.
        "everything killed at once, servers too",
        "host killed: all its processes at once",
        "host stopped and started, as a deployment does",
        "clock off in one receiver",
        "clock off in one worker",
        "clerk-sync migrate in the midst of it",
    }
)


def at_once(scene: Scene, number: int) -> None:
    names = scene.random.sample(sorted(KINDS.keys() - APART), number)
    scenes = [Scene(scene.cluster, scene.sender, random.Random(scene.random.random())) for _ in names]
    failed: list[BaseException] = []

    def run(name: str, own: Scene) -> None:
        try:
            KINDS[name].inject(own)
        # One of them may find away what another one took away.
        except (psycopg.Error, redis.RedisError, OSError, KeyError):
            pass
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(names, scenes, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    scene.cluster.mend()


def kill_some(scene: Scene, pids: list[int]) -> None:
    for pid in pids:
        if scene.random.random() < 0.7 or pid == pids[-1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def down_for_a_while(scene: Scene, server: ServerProcess) -> None:
    server.kill()
    scene.hold(0, 1.5)
    server.start()
