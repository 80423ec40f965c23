"""The whole product as processes: `clerk-sync up` runs the Procfile's own commands, and tests see it from outside."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Self, TypeVar

import psycopg
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from tests.clerk import sign
from tests.events import deleted, envelope
from tests.waiting import until
from worker import local
from worker.cli import main

T = TypeVar("T")

PROGRAMS: Final = Path(sys.executable).parent
START_SECONDS: Final = 60.0
ENVIRONMENT: Final = {"PATH": os.pathsep.join((str(PROGRAMS), os.defpath)), "HOME": os.environ.get("HOME", "/")}

CANARY: Final = "c4n4ry-7f3a"
"""Stands in everything personal that these tests send, and may come out at the view alone."""

_clock = itertools.count(int(time.time() * 1000))


def now_ms() -> int:
    """Clerk's clock: later at each call."""
    return next(_clock)


def new_user() -> str:
    """The id of a user that no other test knows."""
    return f"user_{uuid.uuid4().hex}"


def user_event(
    user_id: str,
    version: int,
    private: Mapping[str, Any] | None = None,
    *,
    public: Mapping[str, Any] | None = None,
    unsafe: Mapping[str, Any] | None = None,
    event_type: str = "user.updated",
    instance_id: str | None = None,
) -> bytes:
    """A user's event as Clerk sends it, with the canary in every value that is nobody else's business."""
    body = json.loads(
        envelope(
            event_type,
            {
                "object": "user",
                "id": user_id,
                "updated_at": version,
                "first_name": f"First {CANARY}",
                "last_name": f"Last {CANARY}",
                "username": f"name-{CANARY}",
                "email_addresses": [{"object": "email_address", "email_address": f"{CANARY}@example.com"}],
                "private_metadata": {"canary": CANARY, **(private or {})},
                "public_metadata": {"canary": CANARY, **(public or {})},
                "unsafe_metadata": {"canary": CANARY, **(unsafe or {})},
            },
            version + 15,
        )
    )
    body["event_attributes"] = {"http_request": {"client_ip": "192.0.2.77", "user_agent": f"Agent {CANARY}"}}
    if instance_id:
        body["instance_id"] = instance_id
    return json.dumps(body).encode()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the receiver said, and how long it took."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    seconds: float
    svix_id: str = ""

    @property
    def said(self) -> dict[str, Any]:
        """The JSON."""
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found

    @property
    def outcome(self) -> tuple[int, str]:
        """Status and `status`, the two that the contract's table names."""
        return self.status, self.said["status"]


class Client:
    """One connection to the receiver, kept alive as Svix keeps its own."""

    def __init__(self, url: str, secret: str, timeout: float = 15.0) -> None:
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname
        self._secret = secret
        self._path = parts.path
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(
        self,
        method: str,
        path: str | None = None,
        body: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request. Raises OSError or http.client.HTTPException where no answer comes."""
        started = time.perf_counter()
        try:
            self._connection.request(
                method, path or self._path, body, headers or {}, encode_chunked=isinstance(body, Iterator)
            )
            response = self._connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise
        return Answer(response.status, response.headers, text, time.perf_counter() - started)

    def get(self, path: str) -> Answer:
        """A plain GET."""
        return self.ask("GET", path)

    def metrics(self) -> dict[str, float]:
        """One scrape: each sample by its name and labels."""
        answer = self.get("/metrics")
        assert answer.status == 200
        return {
            sample.name + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(answer.body.decode())
            for sample in family.samples
        }

    def post(self, body: bytes | Iterator[bytes], headers: Mapping[str, str]) -> Answer:
        """Post to the endpoint with these headers."""
        return self.ask("POST", None, body, {"content-type": "application/json", **headers})

    def deliver(self, body: bytes, svix_id: str | None = None, *, secret: str | None = None) -> Answer:
        """Post as Svix does: signed now, with an id of its own."""
        headers = sign(secret or self._secret, body, svix_id=svix_id)
        answer = self.post(body, headers)
        return Answer(answer.status, answer.headers, answer.body, answer.seconds, headers["svix-id"])


READ: Final = """
select user_id, private_metadata, public_metadata, unsafe_metadata, (extract(epoch from updated_at) * 1000)::bigint
from clerk.user_metadata
where user_id = any(%(user_ids)s)
"""
EVENT: Final = "select state, attempts, error, body is not null from clerk.webhook_events where svix_id = %(svix_id)s"
PENDING: Final = "select count(*) from clerk.webhook_events where state = 'pending'"

Row = tuple[Any, Any, Any, int]


class System:
    """A running `clerk-sync up` in a folder; its whole output stands in `output`."""

    def __init__(self, folder: Path, environment: Mapping[str, str], port: int = 0) -> None:
        self._port = port
        self.data_dir = folder / "data"
        self.info_path = folder / "info.json"
        self._log = folder / "output.log"
        self._environment = {**ENVIRONMENT, **environment}
        self._process: subprocess.Popen[bytes] | None = None
        self._file: IO[bytes] | None = None

    # Running

    def start(self) -> None:
        """Start, and return when it says that it is ready."""
        self.launch()
        until(lambda: self.info_path.exists() or self.ended, START_SECONDS, "the start")
        assert not self.ended, f"it ended at its start:\n{self.output}"

    def launch(self) -> None:
        """Start, and return at once."""
        self._file = self._log.open("ab")
        command = [PROGRAMS / "clerk-sync", "up", "--port", str(self._port)]
        command += ["--data-dir", self.data_dir, "--info", self.info_path]
        self._process = local.launch(
            [str(part) for part in command],
            stop_signal=signal.SIGTERM,
            environment=self._environment,
            output=self._file,
            folder=self.data_dir.parent,
        )

    def stop(self, number: signal.Signals = signal.SIGTERM, limit_seconds: float = 30.0) -> int:
        """Send a signal, wait for the end; the exit code."""
        assert self._process
        assert self._file
        try:
            self._process.send_signal(number)
            return self._process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            local.kill_group_now(self._process)
            self._process.wait()
            raise
        finally:
            self._file.close()
            self._process = None

    @property
    def running(self) -> bool:
        """Whether it was started and has not been stopped."""
        return self._process is not None

    @property
    def ended(self) -> bool:
        """Whether its process is gone, or was never started."""
        return self._process is None or self._process.poll() is not None

    @property
    def pid(self) -> int:
        """The process that keeps the others alive."""
        assert self._process
        return self._process.pid

    def reap(self) -> None:
        """Note its end, after it was killed from outside."""
        assert self._process
        assert self._file
        self._process.wait(10)
        self._file.close()
        self._process = None

    # What it says of itself

    @property
    def output(self) -> str:
        """All that it has printed, and its parts through it."""
        return self._log.read_text("utf-8")

    @property
    def info(self) -> dict[str, Any]:
        """What `--info` says now."""
        found = json.loads(self.info_path.read_text("utf-8"))
        assert isinstance(found, dict)
        return found

    @property
    def url(self) -> str:
        """The webhook endpoint."""
        return str(self.info["url"])

    @property
    def signing_secret(self) -> str:
        """The newest signing secret."""
        return str(self.info["signing_secret"])

    @property
    def database_url(self) -> str:
        """Postgres."""
        return str(self.info["database_url"])

    @property
    def redis_url(self) -> str:
        """The broker."""
        return str(self.info["redis_url"])

    @property
    def pids(self) -> dict[str, int]:
        """The processes by name, as they are now."""
        return dict(self.info["pids"])

    # Using it

    def client(self, timeout: float = 15.0) -> Client:
        """A new connection to the receiver."""
        return Client(self.url, self.signing_secret, timeout)

    def connect(self) -> psycopg.Connection[Any]:
        """A new connection to the database, in autocommit."""
        return psycopg.connect(self.database_url, autocommit=True, connect_timeout=5)

    def program(
        self, *arguments: str, text: str | None = None, info: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `clerk-sync` beside it, as an operator does: in the same environment, or with something set otherwise."""
        return subprocess.run(
            (str(PROGRAMS / "clerk-sync"), *arguments, "--info", str(info or self.info_path)),
            env=self._environment | environment,
            input=text,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def command(
        self, *arguments: str, text: str | None = None, info: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the same in this process, which spares the half a second that each program takes to load.

        Every command is run as a program too, by at least one test.
        """
        arguments = (*arguments, "--info", str(info or self.info_path))
        env = {**dict.fromkeys(os.environ), **self._environment, **environment}
        ran = CliRunner(catch_exceptions=False).invoke(main, arguments, input=text, env=env)
        return subprocess.CompletedProcess(arguments, ran.exit_code, ran.stdout, ran.stderr)

    def rows(self, *user_ids: str) -> dict[str, Row]:
        """What an application reads of these users."""
        with self.connect() as connection:
            found = connection.execute(READ, {"user_ids": list(user_ids)})
            return {user_id: (private, public, unsafe, at) for user_id, private, public, unsafe, at in found}

    def event(self, svix_id: str) -> tuple[str, int, str | None, bool] | None:
        """State, attempts, error, and whether there is a body, of one event in the inbox."""
        with self.connect() as connection:
            return connection.execute(EVENT, {"svix_id": svix_id}).fetchone()

    def pending(self) -> int:
        """How many events wait."""
        with self.connect() as connection:
            return int((connection.execute(PENDING).fetchone() or (0,))[0])

    def settle(self, limit_seconds: float = 10.0) -> None:
        """Wait until nothing is pending."""
        until(lambda: self.pending() == 0, limit_seconds, "an empty inbox")

    def metrics(self) -> dict[str, float]:
        """One scrape over a new connection: each sample by its name and labels."""
        with self.client() as client:
            return client.metrics()

    # Hurting it

    def kill(self, name: str) -> int:
        """SIGKILL to one of its processes; the pid it had."""
        pid = self.pids[name]
        os.kill(pid, signal.SIGKILL)
        return pid

    def await_restart(self, name: str, pid: int, limit_seconds: float = 15.0) -> None:
        """Wait until a process that had this pid runs anew."""
        until(lambda: self.pids[name] != pid, limit_seconds, f"the restart of {name}")

    @contextlib.contextmanager
    def hung(self, name: str) -> Iterator[None]:
        """Stop one of its processes and all of its children with SIGSTOP for a while: alive, connected, and silent."""
        pid = self.pids[name]
        stopped = [pid]
        os.kill(pid, signal.SIGSTOP)
        try:
            for child in children(pid):
                os.kill(child, signal.SIGSTOP)
                stopped.append(child)
            yield
        finally:
            for one in reversed(stopped):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGCONT)


def children(pid: int) -> list[int]:
    """The processes whose parent this one is."""
    if sys.platform == "linux":
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                # The name, in brackets, can hold anything.
                if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(path.parent.name))
        return found
    listed = subprocess.run(("ps", "-A", "-o", "pid=,ppid="), capture_output=True, text=True, check=True)
    pairs = (line.split() for line in listed.stdout.splitlines())
    return [int(child) for child, parent in pairs if int(parent) == pid]


def latency(client: Client, connection: psycopg.Connection[Any], limit_seconds: float = 15.0) -> float:
    """Seconds from the answer to an event until an application sees its row."""
    user_id = new_user()
    answer = client.deliver(user_event(user_id, now_ms(), event_type="user.created"))
    answered = time.perf_counter()
    assert answer.outcome == (202, "accepted")
    seen = "select exists (select from clerk.user_metadata where user_id = %s)"
    while not (connection.execute(seen, (user_id,)).fetchone() or (False,))[0]:
        assert time.perf_counter() - answered < limit_seconds, f"not visible within {limit_seconds:g} s"
        time.sleep(0.002)
    return time.perf_counter() - answered


@dataclass(frozen=True, slots=True)
class _Sent:
    svix_id: str
    body: bytes


class Traffic:
    """Events of a few users, sent one after the other by a thread and, as Svix does, again until acknowledged.

    Users change, are deleted, and make room for new ones. `statuses` counts every answer, None being no answer.
    """

    USERS: Final = 5
    DELETE_EVERY: Final = 13
    LIMIT_SECONDS: Final = 60.0

    def __init__(self, system: System) -> None:
        self._system = system
        self._url, self._secret = system.url, system.signing_secret
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)
        self._unacknowledged: deque[_Sent] = deque()
        self._users = [new_user() for _ in range(self.USERS)]
        self.expected: dict[str, int | None] = {}
        self.statuses: Counter[int | None] = Counter()
        self.acknowledged = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(self.LIMIT_SECONDS + 20)

    def flow(self, more: int, limit_seconds: float = 20.0) -> None:
        """Wait until so many more events were acknowledged."""
        wanted = self.acknowledged + more
        until(lambda: self.acknowledged >= wanted, limit_seconds, f"{more} more acknowledgements")

    def assert_all_applied(self, limit_seconds: float = 15.0) -> None:
        """Everything that was acknowledged has had its effect, and nothing is pending. Once the thread has ended."""
        assert not self._thread.is_alive()
        assert not self._unacknowledged, "some events were never acknowledged"
        self._system.settle(limit_seconds)
        rows = self._system.rows(*self.expected)
        found = {user_id: rows[user_id][0]["n"] if user_id in rows else None for user_id in self.expected}
        assert found == self.expected

    def _run(self) -> None:
        deadline = time.monotonic() + self.LIMIT_SECONDS
        numbers = itertools.count(1)
        with Client(self._url, self._secret) as client:
            while time.monotonic() < deadline:
                if not self._stopping.is_set():
                    self._unacknowledged.append(self._next(next(numbers)))
                elif not self._unacknowledged:
                    return
                if not self._send(client, self._unacknowledged.popleft()):
                    time.sleep(0.05)
                self._stopping.wait(0.003)

    def _next(self, number: int) -> _Sent:
        slot = number % self.USERS
        user_id = self._users[slot]
        version = now_ms()
        if number % self.DELETE_EVERY:
            self.expected[user_id] = number
            body = user_event(user_id, version, {"n": number})
        else:
            self.expected[user_id] = None
            self._users[slot] = new_user()
            body = deleted(user_id, version)
        return _Sent(f"msg_{uuid.uuid4().hex}", body)

    def _send(self, client: Client, event: _Sent) -> bool:
        try:
            status: int | None = client.deliver(event.body, event.svix_id).status
        except (OSError, http.client.HTTPException):
            status = None
        self.statuses[status] += 1
        if status in {200, 202}:
            self.acknowledged += 1
            return True
        self._unacknowledged.append(event)
        return False
