"""What the faults are done to: servers, and two hosts that each run the Procfile's processes, with proxies between."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import psycopg
import redis

from tests.acceptance.system import Client, System, children
from tests.clerk import SECRET
from tests.faults.proxy import Proxy
from tests.waiting import until
from worker import local

T = TypeVar("T")

OWNER: Final = "app"
"""The role of the processes: it owns the database and is no superuser, whom limits on connections don't bind."""

CLOCK: Final = Path(__file__).parent / "clock"

START_SECONDS: Final = 90.0


class Launcher:
    """One thread that starts all processes: on Linux they are told to end when the thread that started them does."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "launcher")

    def __call__(self, start: Callable[[], T]) -> T:
        """Run it in that thread."""
        return self._executor.submit(start).result()

    def stop(self) -> None:
        """End the thread."""
        self._executor.shutdown()


class ServerProcess:
    """An embedded server by its process: what `up` does for itself, to be killed and started at will."""

    def __init__(self, server: local.Server, log: Path, launch: Launcher) -> None:
        self.server = server
        self._log = log
        self._launch = launch
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()

    def start(self) -> None:
        """Start it where it doesn't run, and wait until it answers."""
        with self._starting:
            self._start_once()

    def _start_once(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self._process is None or local.ended(self._process):
                # Backends of a killed postmaster live on for a moment with the memory that the new one needs.
                self._process = self._launch(self._start)
            if local.answers(self.server):
                return
            assert time.monotonic() < deadline, f"{self.server.name} doesn't start:\n{self._log.read_text()[-2000:]}"
            time.sleep(0.02)  # between two looks, not instead of one

    def kill(self) -> None:
        """SIGKILL to it and all its children."""
        assert self._process
        local.kill_group(self._process)

    def stop(self, number: signal.Signals) -> None:
        """Send a signal and wait for its end."""
        assert self._process
        self._process.send_signal(number)
        until(lambda: self._process is None or local.ended(self._process), 30, f"the end of {self.server.name}")
        local.kill_group(self._process)

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        """Alive, connected and silent for a while."""
        assert self._process
        with stopped([self._process.pid, *children(self._process.pid)]):
            yield

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as output:
            return local.start(self.server, output)


class Host:
    """One `clerk-sync up`: a receiver, a worker and a beat that reach the servers through proxies of their own."""

    def __init__(self, folder: Path, servers: tuple[local.Server, local.Server], launch: Launcher, **env: str) -> None:
        folder.mkdir(mode=0o711)
        database, broker = (Proxy(local.HOST, local.free_port(), local.HOST, server.port) for server in servers)
        self.database, self.broker = database, broker
        self.port = local.free_port()
        self.url = f"http://{local.HOST}:{self.port}/webhooks/clerk"
        self._launch = launch
        self._environment = {
            "DATABASE_URL": f"postgresql://{OWNER}:{servers[0].password}@{local.HOST}:{database.port}/{OWNER}",
            "REDIS_URL": f"redis://:{servers[1].password}@{local.HOST}:{broker.port}/0",
            "CLERK_WEBHOOK_SIGNING_SECRET": SECRET,
            "COPY_PUBLIC": "always",
            "COPY_UNSAFE": "always",
            "SESSION_CLAIMS_BUDGET": "100000",
            **env,
        }
        self._folder = folder
        self.system = System(folder, self._environment, self.port)

    @property
    def database_url(self) -> str:
        """Postgres, by way of its proxy."""
        return self._environment["DATABASE_URL"]

    def start(self, **environment: str) -> None:
        """Start it, and return when it is ready."""
        self.begin(**environment)
        self.await_ready()

    def begin(self, **environment: str) -> None:
        """Start it, with something set otherwise for this time."""
        self.system = System(self._folder, self._environment | environment, self.port)
        self.system.info_path.unlink(missing_ok=True)
        self._launch(self.system.launch)

    def await_ready(self) -> None:
        """Wait until it says that it is ready."""
        until(lambda: self.system.info_path.exists() or self.system.ended, START_SECONDS, "the start of a host")
        assert not self.system.ended, f"a host ended at its start:\n{self.system.output[-3000:]}"

    def stop(self) -> None:
        """Stop it as a deployment does."""
        self.system.stop(limit_seconds=40)

    def kill(self) -> None:
        """The power fails: SIGKILL to everything at once."""
        pids = self.tree()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.system.reap()

    def tree(self) -> list[int]:
        """All of its processes."""
        found: list[int] = []
        waiting = [self.system.pid]
        while waiting:
            pid = waiting.pop()
            found.append(pid)
            waiting += children(pid)
        return found

    def kill_part(self, name: str) -> None:
        """SIGKILL to one of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.system.pids[name], signal.SIGKILL)

    @contextlib.contextmanager
    def hung_part(self, name: str, *, child: bool = False) -> Iterator[None]:
        """One of its processes, or only one of that one's children, is alive, connected and silent for a while."""
        pid = self.system.pids[name]
        with stopped(children(pid)[:1] if child else [pid, *children(pid)]):
            yield

    def answers(self) -> bool:
        """Whether its receiver says that it is ready."""
        with Client(self.url, SECRET, timeout=6) as client, contextlib.suppress(OSError, http.client.HTTPException):
            return client.get("/readyz").status == 200
        return False

    def metrics(self) -> dict[str, float]:
        """One scrape: each sample by its name and labels."""
        with Client(self.url, SECRET, timeout=6) as client:
            return client.metrics()

    def revive(self) -> None:
        """Start it again where it ended by itself, as a machine's service manager does."""
        if self.system.ended:
            if self.system.running:
                self.system.reap()
            self.begin()


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """SIGSTOP, and later SIGCONT to those that are still there."""
    done = []
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                done.append(pid)
        yield
    finally:
        for pid in reversed(done):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


class Cluster:
    """Postgres, Redis and two hosts, in a folder. `connect` and `redis` go past the proxies."""

    def __init__(self, folder: Path, hosts: int = 2, **environment: str) -> None:
        folder.mkdir(mode=0o711, exist_ok=True)
        self.folder = folder
        self.launch = Launcher()
        data = folder / "servers"
        data.mkdir(mode=0o711)
        self.postgres = ServerProcess(local.postgres(data), folder / "postgres.log", self.launch)
        self.redis = ServerProcess(local.redis(data), folder / "redis.log", self.launch)
        servers = (self.postgres.server, self.redis.server)
        self.hosts = [Host(folder / f"host{number}", servers, self.launch, **environment) for number in range(hosts)]

    def start(self) -> None:
        """Start everything on an empty database."""
        self.postgres.start()
        self.redis.start()
        with psycopg.connect(self.postgres.server.url, autocommit=True) as connection:
            password = self.postgres.server.password
            connection.execute(f"create role {OWNER} login createrole password '{password}'")
            connection.execute(f"create database {OWNER} owner {OWNER}")
        for host in self.hosts:
            host.database.start()
            host.broker.start()
            host.begin()
        for host in self.hosts:
            host.await_ready()

    def stop(self) -> None:
        """Stop everything that runs, and keep the folder."""
        for host in self.hosts:
            if host.system.running:
                host.kill() if host.system.ended else host.stop()
            host.database.stop()
            host.broker.stop()
        for server in (self.postgres, self.redis):
            server.kill()
        self.launch.stop()

    def mend(self) -> None:
        """Undo whatever a fault may have left: after several at once, one may have undone too little."""
        self.postgres.start()
        self.redis.start()
        for host in self.hosts:
            host.database.heal()
            host.broker.heal()
        with self.connect(superuser=True) as connection:
            connection.execute(f"alter role {OWNER} connection limit -1")
            connection.execute(f"alter role {OWNER} reset default_transaction_read_only")
        with self.broker() as broker:
            broker.config_set("maxmemory", 0)
            broker.config_set("maxmemory-policy", "noeviction")

    def connect(self, *, superuser: bool = False) -> psycopg.Connection[Any]:
        """A connection to the database, in autocommit."""
        url = urllib.parse.urlsplit(self.postgres.server.url)
        user = url.username if superuser else OWNER
        return psycopg.connect(
            host=url.hostname, port=url.port, user=user, password=url.password, dbname=OWNER, autocommit=True
        )

    def broker(self) -> redis.Redis:
        """A client of the broker."""
        return redis.Redis.from_url(self.redis.server.url, socket_timeout=5)


def idle_connections(port: int, number: int, sent: bytes = b"") -> list[socket.socket]:
    """So many connections that say this much, and no more."""
    made = []
    for _ in range(number):
        connection = socket.create_connection((local.HOST, port), timeout=5)
        connection.sendall(sent)
        made.append(connection)
    return made
