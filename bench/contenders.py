"""Who is measured: what each runs, how far it is behind, and when an event of it became visible."""

from __future__ import annotations

import contextlib
import http.client
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.servers import Connection, Servers
from worker import local
from worker.supervise import find_procfile, parse_procfile

ROOT: Final = Path(__file__).parent.parent
START_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0
POLL_SECONDS: Final = 0.05
"""Seldom enough not to count in what Postgres costs."""

PATH: Final = "/webhooks/clerk"


@dataclass(frozen=True, slots=True)
class Contender:
    """One design: the commands of its processes, the table that its events end in, and where they may wait before."""

    name: str
    short: str
    """As part of a database's name."""
    commands: Mapping[str, str]
    redis_number: int
    table: str | None
    """Where an event is visible, by user_id and version. None: nowhere."""
    waiting_in: str | None = None
    """`inbox`, `queue`, or nowhere."""
    clears_inbox: bool = False
    """Begins with an empty inbox: nobody empties it."""


GTHREAD: Final = "gunicorn --workers 2 --threads 8 --worker-class gthread --preload --keep-alive 75 --log-level warning"
OUR_SERVER: Final = "gunicorn --config python:webhooks.server"
QUEUE: Final = "celery"


def bind(server: str) -> str:
    """A web server's command with the address, which ours takes from the environment by itself."""
    return f"{server} --bind 0.0.0.0:$PORT" if server == GTHREAD else server


def contenders(rivals_server: str = "gthread", rivals_pool: str = "prefork") -> dict[str, Contender]:
    """All of them, by name. The rivals are served by gunicorn's threads or by our own web server."""
    server = bind(GTHREAD if rivals_server == "gthread" else OUR_SERVER)
    procfile = parse_procfile(find_procfile().read_text("utf-8"))
    found = (
        Contender(
            "ours",
            "ours",
            {name: command for name, command in procfile.items() if name != "release"},
            0,
            "clerk.users",
            "inbox",
        ),
        Contender("inline", "inline", {"web": f"{server} bench.rivals:inline()"}, 1, "app_users"),
        Contender(
            "task per event",
            "task",
            {
                "web": f"{server} bench.rivals:task_per_event()",
                "worker": f"celery --quiet --app bench.rival_worker worker --pool {rivals_pool} --concurrency 2"
                " --without-mingle --without-gossip --without-heartbeat --loglevel WARNING",
            },
            1,
            "app_users",
            "queue",
        ),
        Contender(
            "insert alone",
            "insert",
            {"web": f"{OUR_SERVER} bench.rivals:insert_alone"},
            1,
            None,
            clears_inbox=True,
        ),
    )
    return {contender.name: contender for contender in found}


# Running


@dataclass(frozen=True, slots=True)
class Running:
    """A contender's processes at work on one database."""

    contender: Contender
    servers: Servers
    database: str
    port: int
    pids: tuple[int, ...]
    connection: Connection

    def waiting(self) -> int:
        """How many events were acknowledged and are not applied yet."""
        match self.contender.waiting_in:
            case "inbox":
                return pending(self.connection)
            case "queue":
                return queued(self.servers, self.contender.redis_number)
            case _:
                return 0

    def drained(self, seconds: float) -> int:
        """Wait until nothing waits any more, so long at most; how many events still do."""
        deadline = time.monotonic() + seconds
        while (left := self.waiting()) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return left

    def clear(self) -> None:
        """Throw away what waits."""
        match self.contender.waiting_in:
            case "inbox":
                self.connection.execute(FORGET_PENDING)
            case "queue":
                with self.servers.redis(self.contender.redis_number) as client:
                    client.delete(QUEUE)
        self.drained(10)

    def said(self) -> str:
        """The end of what its processes have written."""
        return said(self.contender, self.servers)


PENDING = "select count(*) from clerk.webhook_events where state = 'pending'"
FORGET_PENDING = "delete from clerk.webhook_events where state = 'pending'"


def pending(connection: Connection) -> int:
    """Events in our inbox that are to be applied."""
    (count,) = connection.execute(PENDING).fetchone() or (0,)
    return int(count)


def queued(servers: Servers, redis_number: int) -> int:
    """Messages in Celery's queue, and those that a worker holds and hasn't acknowledged."""
    with servers.redis(redis_number) as client:
        waiting, held = client.pipeline(transaction=False).llen(QUEUE).hlen("unacked").execute()
    return int(waiting) + int(held)


@contextlib.contextmanager
def running(
    contender: Contender, servers: Servers, database: str, only: Sequence[str] | None = None
) -> Iterator[Running]:
    """Run a contender's processes, or only those named, for the length of a `with` block.

    Their output is in the servers' folder, in one file for each.
    """
    port = local.free_port()
    environment = {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.defpath)),
        "HOME": os.environ.get("HOME", "/"),
        "PYTHONPATH": str(ROOT),
        "PORT": str(port),
        "DATABASE_URL": servers.database_url(database),
        "REDIS_URL": servers.redis_url(contender.redis_number),
        "CLERK_WEBHOOK_SIGNING_SECRET": servers.signing_secret,
    }
    names = [name for name in contender.commands if only is None or name in only]
    started: dict[str, subprocess.Popen[bytes]] = {}
    with servers.connect(database) as connection, servers.redis(contender.redis_number) as client:
        client.flushdb()
        if contender.clears_inbox:
            connection.execute("truncate clerk.webhook_events")
        try:
            for name in names:
                command = contender.commands[name].replace("$PORT", str(port))
                started[name] = _start(command, environment, _log(servers, contender, name))
            if "web" in names:
                _wait_for_web(port, started.values(), lambda: said(contender, servers))
            pids = tuple(process.pid for process in started.values())
            yield Running(contender, servers, database, port, pids, connection)
        finally:
            _stop(started.values())


def said(contender: Contender, servers: Servers) -> str:
    """The end of what a contender's processes have written."""
    logs = [_log(servers, contender, name) for name in contender.commands]
    return "".join(f"{log.name}:\n{log.read_text('utf-8', 'replace')[-2000:]}\n" for log in logs if log.exists())


def _log(servers: Servers, contender: Contender, name: str) -> Path:
    return servers.folder / f"{contender.short}-{name}.log"


def _start(command: str, environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    program, *arguments = shlex.split(command)
    with log.open("ab") as output:
        return local.launch(
            (str(Path(sys.executable).parent / program), *arguments),
            stop_signal=signal.SIGTERM,
            environment=environment,
            output=output,
            folder=ROOT,
        )


def _wait_for_web(port: int, started: Collection[subprocess.Popen[bytes]], said: Callable[[], str]) -> None:
    """Return once it answers anything but 503: ours isn't ready as long as it says that."""
    deadline = time.monotonic() + START_SECONDS
    while not _answers(port):
        if time.monotonic() > deadline or any(map(local.ended, started)):
            raise RuntimeError(f"a contender doesn't start:\n{said()}")
        time.sleep(POLL_SECONDS)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status != 503
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """End them as a supervisor does, and kill what is left."""
    for process in processes:
        if not local.ended(process):
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        while not local.ended(process) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        local.kill_group(process)


# When events became visible

VISIBLE: Final = {
    "clerk.users": """
select user_id, version, extract(epoch from pg_xact_commit_timestamp(xmin))::float8 from clerk.users
where user_id = any(%s)
""",
    "app_users": """
select user_id, version, extract(epoch from pg_xact_commit_timestamp(xmin))::float8 from app_users
where user_id = any(%s)
""",
}


def visible(connection: Connection, table: str, user_ids: Sequence[str]) -> dict[str, tuple[int, float]]:
    """The version that each user has, and the wall clock of its commit.

    Postgres takes that time just before it flushes the commit to disk, so a row is seen some 0.4 ms later than this.
    """
    rows = connection.execute(VISIBLE[table], (list(user_ids),), binary=True)
    return {user: (version, at) for user, version, at in rows}
