"""Who owns the broker can ring the doorbell and nothing else, judged by a worker that runs as in production."""

from __future__ import annotations

import base64
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from tests.events import changed, incoming
from tests.waiting import until
from worker import inbox, local, supervise
from worker.app import QUEUE
from worker.db import Connection
from worker.tasks import DRAIN, RETIRED

CANARY: Final = "c4nary"
VISIBLE_WITHIN: Final = 10.0


class Worker:
    """The Procfile's own worker on the session's servers; its whole output stands in a file."""

    def __init__(self, servers: local.Urls, folder: Path) -> None:
        self._log = folder / "worker.log"
        command = supervise.parse_procfile(supervise.find_procfile().read_text("utf-8"))["worker"]
        with self._log.open("wb") as output:
            self.process = local.launch(
                [str(Path(sys.executable).parent / "celery"), *command.split()[1:]],
                stop_signal=signal.SIGTERM,
                environment={
                    "PATH": os.defpath,
                    "DATABASE_URL": servers.database,
                    "REDIS_URL": servers.redis,
                    "LOG_LEVEL": "DEBUG",
                },
                output=output,
                folder=folder,
            )

    @property
    def output(self) -> str:
        return self._log.read_text("utf-8")

    def assert_unharmed(self) -> None:
        """It lives, and has said nothing of what it was sent."""
        assert self.process.poll() is None, self.output[-3000:]
        assert CANARY not in self.output

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            local.kill_group_now(self.process)
            self.process.wait()


@pytest.fixture(scope="module")
def running(servers: local.Urls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with redis.Redis.from_url(servers.redis) as client:
        client.flushall()
    made = Worker(servers, tmp_path_factory.mktemp("worker"))
    yield made
    made.stop()


@pytest.fixture
def broker(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
        yield client
        client.flushall()


@pytest.fixture
def worker(running: Worker, broker: redis.Redis) -> Worker:
    """A worker that hears the broker."""
    assert running.process.poll() is None, running.output[-3000:]
    assert_it_listens(broker)
    return running


def assert_it_listens(broker: redis.Redis) -> None:
    broker.lpush(QUEUE, message())
    until(lambda: broker.llen(QUEUE) == 0, 20, "a worker that listens")


def message(
    task: Any = DRAIN,
    body: bytes | None = None,
    *,
    headers: dict[str, Any] | None = None,
    properties: dict[str, Any] | None = None,
    outside: dict[str, Any] | None = None,
) -> bytes:
    """A message as Celery puts it into Redis, with something else in it."""
    task_id = str(uuid.uuid4())
    if body is None:
        body = json.dumps([[], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]).encode()
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": task,
                "id": task_id,
                "root_id": task_id,
                "parent_id": None,
                "group": None,
                "retries": 0,
                "timelimit": [None, None],
                "eta": None,
                "expires": None,
                "argsrepr": "()",
                "kwargsrepr": "{}",
                "origin": f"gen1@{CANARY}",
                **(headers or {}),
            },
            "properties": {
                "correlation_id": task_id,
                "delivery_mode": 2,
                "delivery_info": {"exchange": QUEUE, "routing_key": QUEUE},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
                **(properties or {}),
            },
            **(outside or {}),
        }
    ).encode()


def body(args: Any = (), kwargs: Any = None, **embed: Any) -> bytes:
    return json.dumps([args, kwargs or {}, embed]).encode()


def signature(task: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    options = {"queue": CANARY, "task_id": str(uuid.uuid4())}
    return {"task": task, "args": args, "kwargs": kwargs, "options": options, "subtask_type": None, "immutable": False}


class Touch:
    """What unpickles by making a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


EVIL: Final = Path(f"/tmp/clerk-sync-evil-{os.getpid()}")  # noqa: S108 - it must never be there
LINK: Final = signature(RETIRED, CANARY)
PICKLE: Final = pickle.dumps([[Touch(EVIL)], {}, {}])
YAML: Final = f"!!python/object/apply:os.system ['touch {EVIL}']".encode()
FAR: Final = "2099-01-01T00:00:00+00:00"

FORGED: Final[dict[str, bytes]] = {
    "nothing": b"",
    "junk bytes": b"\xff\x00\x80" + CANARY.encode(),
    "not JSON": b"{" + CANARY.encode(),
    "a number": b"5",
    "a number of many digits": b"1" * 10_000,
    "a list": b"[[], {}]",
    "a string": json.dumps(CANARY).encode(),
    "null": b"null",
    "an empty object": b"{}",
    "a deep one": b"[" * 100_000 + b"]" * 100_000,
    "kombu's own types": b'{"__type__": "decimal", "__value__": "c4nary"}',
    "no properties": json.dumps({"body": "", "headers": {"task": DRAIN}}).encode(),
    "properties of a wrong type": message(properties=None).replace(b'"properties": {', b'"properties": 5, "x": {'),
    "no delivery info": message(properties={"delivery_info": None}),
    "delivery info of a wrong type": message(properties={"delivery_info": [CANARY]}),
    "a delivery tag of a wrong type": message(properties={"delivery_tag": {CANARY: 1}}),
    "an unknown body encoding": message(properties={"body_encoding": CANARY}),
    "a priority of a wrong type": message(properties={"priority": CANARY}),
    "a body that isn't base64": message(body=b"x").replace(b'"eA=="', b'"%%%"'),
    "a body of a wrong type": message(body=b"x").replace(b'"eA=="', b'{"a": 1}'),
    "a body that isn't a task's": message(body=CANARY.encode()),
    "a body of a wrong shape": message(body=b"[]"),
    "headers of a wrong type": json.dumps({**json.loads(message()), "headers": [CANARY]}).encode(),
    "no headers": json.dumps({**json.loads(message()), "headers": None}).encode(),
    "the protocol before": message(headers={"task": None}, body=json.dumps({"task": CANARY, "id": "1"}).encode()),
    "pickle": message(
        body=PICKLE, outside={"content-type": "application/x-python-serialize", "content-encoding": "binary"}
    ),
    "pickle that is called JSON": message(body=PICKLE),
    "pickle by its short name": message(body=PICKLE, outside={"content-type": "pickle"}),
    "yaml": message(body=YAML, outside={"content-type": "application/x-yaml"}),
    "no content type": message(outside={"content-type": None}),
    "another content type": message(outside={"content-type": CANARY}),
    "another content encoding": message(outside={"content-encoding": CANARY}),
    "a compression of its own": message(headers={"compression": CANARY}),
    "a compressed body": message(headers={"compression": "application/x-gzip"}, body=gzip.compress(body())),
    "a body that unfolds a hundred times": message(
        headers={"compression": "application/x-gzip"}, body=gzip.compress(b" " * 30_000_000)
    ),
    "an unknown task": message(CANARY),
    "a task of a wrong type": message([CANARY]),
    "a task of Celery's that runs others": message("celery.map", body([LINK, [[CANARY]]])),
    "a task of Celery's that returns what it is given": message("celery.accumulate", body([CANARY])),
    "a task of Celery's that waits for a chord": message("celery.chord_unlock", body([CANARY, LINK])),
    "arguments": message(body=body([CANARY])),
    "arguments by name": message(body=body([], {CANARY: CANARY})),
    "another name to be shown": message(headers={"shadow": CANARY}, body=body([CANARY])),
    "an id of a wrong type": message(headers={"id": [CANARY]}),
    "retries": message(headers={"retries": 10**30}, body=body([CANARY])),
    "a time to run that is far away": message(headers={"eta": FAR}),
    "a time to run that is none": message(headers={"eta": CANARY}),
    "a time to end that is none": message(headers={"expires": CANARY}),
    "a time to end that is past": message(headers={"expires": "2001-01-01T00:00:00+00:00"}),
    "a limit of time": message(headers={"timelimit": [0.001, 0.001]}),
    "a limit of time of a wrong type": message(headers={"timelimit": CANARY}),
    "an answer to be sent": message(headers={"ignore_result": False}, properties={"reply_to": CANARY}),
    "a task to follow": message(body=body(callbacks=[LINK], errbacks=[LINK])),
    "a task to follow a failure": message(body=body([CANARY], callbacks=[LINK], errbacks=[LINK])),
    "a chain": message(body=body(chain=[LINK])),
    "a chord": message(headers={"group": CANARY}, body=body(chord=LINK)),
    "a stamp": message(headers={"stamped_headers": [CANARY], "stamps": {CANARY: [CANARY]}}),
    "replaced tasks": message(headers={"replaced_task_nesting": CANARY, "group_index": CANARY}),
    "a megabyte of nothing": message(CANARY, b"x" * 1_000_000),
}

OURS: Final = (QUEUE.encode(), b"_kombu.")


def is_visible(connection: Connection, user_id: str) -> bool:
    query = "select from clerk.user_metadata where user_id = %s"
    return connection.execute(query, (user_id,)).fetchone() is not None


def seconds_to_visible(connection: Connection, broker: redis.Redis, *, ring: bool = True) -> float:
    """How long it takes until an event is applied that comes now."""
    user_id = f"user_{uuid.uuid4().hex}"
    started = time.monotonic()
    inbox.record(connection, [incoming(changed(user_id))])
    if ring:
        broker.lpush(QUEUE, message())
    until(lambda: is_visible(connection, user_id), VISIBLE_WITHIN, "the visibility")
    return time.monotonic() - started


def test_a_forged_message_is_a_ring_at_most(
    worker: Worker, broker: redis.Redis, connect: Callable[[], Connection]
) -> None:
    for name, forged in FORGED.items():
        broker.lpush(QUEUE, forged)
        until(lambda: broker.llen(QUEUE) == 0, what=f"the end of {name}")
        worker.assert_unharmed()
    assert seconds_to_visible(connect(), broker) < VISIBLE_WITHIN
    until(lambda: broker.llen(QUEUE) == 0)
    worker.assert_unharmed()
    assert not EVIL.exists()
    # Nothing was sent on, answered or kept.
    assert [key for key in broker.scan_iter() if not key.startswith(OURS)] == []


def test_ten_thousand_forged_messages_delay_nobody(
    worker: Worker, broker: redis.Redis, connect: Callable[[], Connection]
) -> None:
    connection = connect()
    forged = [one for one in FORGED.values() if len(one) < 10_000]
    broker.lpush(QUEUE, *(forged[number % len(forged)] for number in range(10_000)))
    assert seconds_to_visible(connection, broker) < VISIBLE_WITHIN
    until(lambda: broker.llen(QUEUE) < 9_900, 30, "a worker that goes on")
    worker.assert_unharmed()


def test_a_message_of_fifty_megabytes_is_dropped(
    worker: Worker, broker: redis.Redis, connect: Callable[[], Connection]
) -> None:
    broker.lpush(QUEUE, message(CANARY, b"x" * 37_500_000))
    assert seconds_to_visible(connect(), broker) < VISIBLE_WITHIN
    until(lambda: broker.llen(QUEUE) == 0)
    worker.assert_unharmed()


PIDBOX: Final = ("shutdown", "pool_restart", "revoke", "terminate", "rate_limit", "add_consumer", "pool_shrink")


def test_nobody_listens_to_remote_control(
    worker: Worker, broker: redis.Redis, connect: Callable[[], Connection]
) -> None:
    for method in PIDBOX:
        order = {"method": method, "arguments": {"queue": CANARY, "task_id": CANARY, "n": 1}, "destination": None}
        sent = message(body=json.dumps(order).encode())
        assert broker.publish("/0.celery.pidbox", sent) == 0
        assert broker.publish("/0.celeryev", sent) == 0
        broker.lpush(QUEUE, sent)
        for key in ("celery@worker.celery.pidbox", "celery.pidbox", "celeryev"):
            broker.lpush(key, sent)
    assert seconds_to_visible(connect(), broker) < VISIBLE_WITHIN
    assert broker.llen("celery.pidbox") == len(PIDBOX)
    worker.assert_unharmed()


KEYS: Final = (QUEUE, f"_kombu.binding.{QUEUE}", "unacked", "unacked_index", "unacked_mutex")


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_another_type_stops_neither_worker_nor_events(
    worker: Worker, broker: redis.Redis, connect: Callable[[], Connection], key: str
) -> None:
    broker.delete(key)
    broker.hset(key, CANARY, CANARY)
    broker.client_kill_filter(_type="normal", skipme=True)  # so that it meets this at its start, too
    assert seconds_to_visible(connect(), broker, ring=False) < VISIBLE_WITHIN
    worker.assert_unharmed()
    broker.delete(key)
    assert_it_listens(broker)


def test_junk_in_the_keys_of_the_queue_stops_neither_worker_nor_events(
    worker: Worker, broker: redis.Redis, connect: Callable[[], Connection]
) -> None:
    broker.zadd("unacked_index", {CANARY: 1.0, "other": 1.0})
    broker.hset("unacked", mapping={CANARY: CANARY, "other": json.dumps([{CANARY: 1}, CANARY, CANARY])})
    broker.sadd(f"_kombu.binding.{QUEUE}", CANARY, f"{CANARY}\x06\x16\x06\x16{CANARY}")
    broker.client_kill_filter(_type="normal", skipme=True)
    assert seconds_to_visible(connect(), broker, ring=False) < VISIBLE_WITHIN
    assert_it_listens(broker)
    worker.assert_unharmed()
