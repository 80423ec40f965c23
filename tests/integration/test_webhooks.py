"""The receiver on real Postgres: the contract's table for POST /webhooks/clerk, and what it does without servers."""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from tests.clerk import SECRET, sign
from tests.events import changed, deleted, envelope, incoming
from tests.waiting import until
from webhooks.app import create_app
from webhooks.connections import LARGEST_BODY
from webhooks.health import Health
from webhooks.recorder import Recorder
from webhooks.signature import make_verifier
from worker import db, inbox, sync
from worker.db import Connection
from worker.errors import Unavailable
from worker.policy import Policy


class Receiver:
    """The receiver as it is deployed, but for the web server and the doorbell: the rings are counted."""

    def __init__(self, database_url: str, *, instance_id: str | None = None, limit_seconds: float = 4.0) -> None:
        self.rings = 0
        self.recorder = Recorder(
            lambda: db.connect(database_url, "receiver", statement_ms=3000, answer_seconds=1),
            limit_seconds=limit_seconds,
        )
        health = Health(lambda: db.connect(database_url, "health"))
        app = create_app(
            verify=make_verifier([SECRET]),
            record=self.recorder.record,
            ring=self._ring,
            problems=health.problems,
            counts=health.counts,
            instance_id=instance_id,
        )
        self.client: FlaskClient = app.test_client()

    def _ring(self) -> None:
        self.rings += 1

    def post(self, body: bytes, headers: dict[str, str] | None = None, **how: Any) -> TestResponse:
        sent = sign(SECRET, body, **how) if headers is None else headers
        return self.client.post("/webhooks/clerk", data=body, headers=sent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.recorder.close()


@pytest.fixture
def receiver(database_url: str) -> Iterator[Receiver]:
    with Receiver(database_url) as made:
        yield made


def stored(connection: Connection) -> list[tuple[Any, ...]]:
    query = "select svix_id, type, user_id, version, state, error, body is not null from clerk.webhook_events"
    return connection.execute(query).fetchall()


def test_an_authentic_event_is_accepted_once_it_is_committed(
    receiver: Receiver, connect: Callable[[], Connection]
) -> None:
    answer = receiver.post(changed("user_a", 5), svix_id="msg_1")
    assert (answer.status_code, answer.json) == (202, {"status": "accepted"})
    assert stored(connect()) == [("msg_1", "user.updated", "user_a", 5, "pending", None, True)]
    assert receiver.rings == 1


def test_the_same_delivery_is_a_duplicate_while_it_is_pending_and_accepted_once_it_was_applied(
    receiver: Receiver, connect: Callable[[], Connection]
) -> None:
    body = changed()
    assert receiver.post(body, svix_id="msg_1").status_code == 202
    answer = receiver.post(body, svix_id="msg_1")
    assert (answer.status_code, answer.json) == (200, {"status": "duplicate"})
    connection = connect()
    assert sync.drain(connection, Policy()) == 1
    answer = receiver.post(body, svix_id="msg_1")
    assert (answer.status_code, answer.json) == (202, {"status": "accepted"})
    assert sync.drain(connection, Policy()) == 1


def test_a_duplicate_does_not_wait_for_the_worker_that_holds_its_row(
    receiver: Receiver, connect: Callable[[], Connection]
) -> None:
    body, connection = changed(), connect()
    assert receiver.post(body, svix_id="msg_1").status_code == 202
    with connection.transaction():
        assert len(inbox.claim(connection, 1)) == 1
        started = time.monotonic()
        assert receiver.post(body, svix_id="msg_1").status_code == 200
        assert time.monotonic() - started < 1


def test_both_header_families_are_read(receiver: Receiver) -> None:
    body = changed()
    headers = {name.replace("svix-", "webhook-"): value for name, value in sign(SECRET, body).items()}
    assert receiver.post(body, headers).status_code == 202


def test_other_types_are_ignored_and_not_stored(receiver: Receiver, connect: Callable[[], Connection]) -> None:
    for body in (envelope("session.created", {"user": {"id": "user_a"}}, 5), envelope("email.created", None, 5)):
        answer = receiver.post(body)
        assert (answer.status_code, answer.json) == (200, {"status": "ignored"})
    assert stored(connect()) == []
    assert receiver.rings == 0


def test_another_instance_is_ignored_with_a_warning(
    database_url: str, connect: Callable[[], Connection], caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps(json.loads(changed()) | {"instance_id": "ins_other"}).encode()
    with Receiver(database_url, instance_id="ins_mine") as receiver:
        answer = receiver.post(body)
    assert (answer.status_code, answer.json) == (200, {"status": "ignored"})
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert stored(connect()) == []


@pytest.mark.parametrize(
    "body", [b"not JSON", b"[]", b"", envelope("user.updated", {"id": 5}, 5), changed(private="not an object")]
)
def test_an_unusable_event_is_recorded_as_dead(
    receiver: Receiver, connect: Callable[[], Connection], body: bytes
) -> None:
    answer = receiver.post(body, svix_id="msg_1")
    assert (answer.status_code, answer.json) == (202, {"status": "dead"})
    ((svix_id, _, _, _, state, error, has_body),) = stored(connect())
    assert (svix_id, state, has_body) == ("msg_1", "dead", True)
    assert error
    assert receiver.post(body, svix_id="msg_1").json == {"status": "dead"}
    assert receiver.rings == 0


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (changed(), {}),
        (changed(), sign(SECRET, b"other")),
        (changed(), sign(SECRET, changed(), timestamp=5)),
        (changed(), sign(SECRET, changed()) | {"svix-signature": "v1"}),
        (changed(), sign(SECRET, changed()) | {"svix-signature": "v1,%%%"}),
        (b"\xff\xfe", sign(SECRET, b"\xff\xfe")),
    ],
    ids=["none", "of another body", "stale", "no comma", "not base64", "not UTF-8"],
)
def test_what_is_not_authentic_is_refused_and_leaves_no_trace(
    receiver: Receiver,
    connect: Callable[[], Connection],
    caplog: pytest.LogCaptureFixture,
    body: bytes,
    headers: dict[str, str],
) -> None:
    answer = receiver.post(body, headers)
    assert answer.status_code == 400
    assert set(answer.json or {}) == {"error"}
    assert stored(connect()) == []
    assert "user_a" not in answer.text + caplog.text


def test_a_body_of_one_mebibyte_is_taken_and_a_larger_one_is_not(receiver: Receiver) -> None:
    head, tail = changed(private={"a": "x"}).split(b'"x"')
    body = head + b'"' + b"x" * (LARGEST_BODY - len(head) - len(tail) - 2) + b'"' + tail
    assert len(body) == LARGEST_BODY
    assert receiver.post(body).status_code == 202
    assert receiver.post(body + b" ").status_code == 413


def test_an_error_that_nobody_thought_of_is_a_503_and_its_text_stays_inside(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver.client.application, "testing", False)
    monkeypatch.setattr("webhooks.app.read_event", lambda *_, **__: int("c4nary"))
    answer = receiver.post(changed())
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    assert "c4nary" not in answer.text


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_another_method_is_405(receiver: Receiver, method: str) -> None:
    assert receiver.client.open("/webhooks/clerk", method=method).status_code == 405


def test_an_unknown_path_is_404(receiver: Receiver) -> None:
    assert receiver.client.post("/webhooks/other").status_code == 404
    assert receiver.client.get("/").status_code == 404


def test_a_log_line_tells_the_delivery_and_nothing_of_its_content(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    body = changed("user_1", private={"k": "c4nary"}, public={"k": "c4nary"}, unsafe={"k": "c4nary"})
    receiver.post(body.replace(b'"Ada"', b'"c4nary"'), svix_id="msg_1")
    (record,) = [record for record in caplog.records if record.name == "webhooks.app"]
    assert record.__dict__["svix_id"] == "msg_1"
    assert record.__dict__["user_id"] == "user_1"
    assert record.__dict__["answer"] == "accepted"
    assert "c4nary" not in str([record.__dict__ for record in caplog.records])


def test_a_burst_shares_its_commits_and_each_delivery_gets_its_own_answer(
    receiver: Receiver, connect: Callable[[], Connection]
) -> None:
    connection = connect()
    before = connection.execute("select txid_current()").fetchone() or (0,)
    promises = [receiver.recorder.record(_incoming(number % 120)) for number in range(150)]
    assert stored(connection) == []
    assert sum(promise() for promise in promises) == 120
    assert len(stored(connection)) == 120
    after = connection.execute("select txid_current()").fetchone() or (0,)
    assert after[0] - before[0] == 3, "a hundred deliveries a commit, and this look itself"


def test_a_row_that_postgres_refuses_costs_the_others_of_its_commit_nothing(
    receiver: Receiver, connect: Callable[[], Connection]
) -> None:
    odd = dataclasses.replace(_incoming(2), type="nul \0")
    promises = [receiver.recorder.record(delivery) for delivery in (_incoming(1), odd, _incoming(3))]
    assert promises[0]()
    with pytest.raises(Unavailable):
        promises[1]()
    assert promises[2]()
    assert len(stored(connect())) == 2


def _incoming(number: int) -> inbox.Incoming:
    return incoming(changed(f"user_{number}"), f"msg_{number}")


def test_without_postgres_it_is_503_with_retry_after() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        receiver = Receiver(f"postgresql://nobody@127.0.0.1:{taken.getsockname()[1]}/none")
        started = time.monotonic()
        answer = receiver.post(changed())
        assert time.monotonic() - started < 5
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert receiver.client.get("/healthz").status_code == 200
    assert receiver.client.get("/readyz").status_code == 503
    assert "clerk_sync_database_up 0.0" in receiver.client.get("/metrics").text


@pytest.fixture
def silent_server() -> Iterator[int]:
    """Accepts connections and never says a word: a Postgres that hangs, or a network that swallows."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_postgres_that_never_answers_is_503_within_the_limit(silent_server: int) -> None:
    receiver = Receiver(f"postgresql://nobody@127.0.0.1:{silent_server}/none")
    with ThreadPoolExecutor(8) as pool:
        started = time.monotonic()
        answers = [pool.submit(receiver.post, changed()) for _ in range(8)]
        assert {answer.result().status_code for answer in answers} == {503}
        assert time.monotonic() - started < 4.5
    started = time.monotonic()
    assert receiver.post(changed()).status_code == 503
    assert time.monotonic() - started < 0.5, "while it is known to be away, nobody waits"


def test_a_commit_that_hangs_is_given_up_and_the_next_one_succeeds(
    database_url: str, connect: Callable[[], Connection]
) -> None:
    connection = connect()
    with Receiver(database_url, limit_seconds=0.5) as receiver:
        assert receiver.post(changed("user_a")).status_code == 202
        with connection.transaction():
            connection.execute("lock table clerk.webhook_events in exclusive mode")
            started = time.monotonic()
            assert receiver.post(changed("user_b")).status_code == 503
            assert time.monotonic() - started < 1
        until(lambda: receiver.post(changed("user_c")).status_code == 202)


def test_delivery_that_has_waited_for_its_thread_has_the_less_time_for_its_commit(
    database_url: str, connect: Callable[[], Connection]
) -> None:
    connection = connect()
    with Receiver(database_url) as receiver, connection.transaction():
        connection.execute("lock table clerk.webhook_events in exclusive mode")
        started = time.monotonic()
        promise = receiver.recorder.record(_incoming(1), started - 3)
        with pytest.raises(Unavailable):
            promise()
        assert time.monotonic() - started < 1.5


def test_an_error_that_nobody_thought_of_while_recording_is_a_503_for_all_of_the_commit(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("webhooks.recorder.inbox.record", lambda *_: int("c4nary"))
    promises = [receiver.recorder.record(_incoming(number)) for number in range(2)]
    for promise in promises:
        with pytest.raises(Unavailable):
            promise()
    monkeypatch.undo()
    assert receiver.post(changed()).status_code == 202
    assert "recording failed" in caplog.messages


def test_a_connection_that_died_while_idle_costs_nobody_a_503(
    receiver: Receiver, connect: Callable[[], Connection]
) -> None:
    kill = (
        "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = 'clerk-sync receiver'"
    )
    operator = connect()
    assert receiver.post(changed("user_0")).status_code == 202
    # Many times: now the server has hung up before the next event comes, now it is still about to.
    for number in range(1, 51):
        assert operator.execute(kill).fetchone() != (0,)
        assert receiver.post(changed(f"user_{number}")).status_code == 202


def test_an_unmigrated_database_is_503_and_not_ready(receiver: Receiver, connect: Callable[[], Connection]) -> None:
    connection = connect()
    assert receiver.client.get("/readyz").status_code == 200
    connection.execute("alter table clerk.schema_version rename to elsewhere")
    try:
        answer = receiver.client.get("/readyz")
    finally:
        connection.execute("alter table clerk.elsewhere rename to schema_version")
    assert answer.status_code == 503
    assert "run clerk-sync migrate" in answer.text


def test_metrics_count_what_postgres_knows(receiver: Receiver, connect: Callable[[], Connection]) -> None:
    receiver.post(changed("user_a"))
    receiver.post(deleted("user_b"))
    sync.drain(connect(), Policy())
    receiver.post(changed("user_c"))
    receiver.post(b"not JSON")
    text = receiver.client.get("/metrics").text
    for line in (
        'clerk_sync_events{state="pending"} 1.0',
        'clerk_sync_events{state="done"} 2.0',
        'clerk_sync_events{state="dead"} 1.0',
        "clerk_sync_users 1.0",
        "clerk_sync_tombstones 1.0",
        "clerk_sync_database_up 1.0",
    ):
        assert line in text
    assert "user_a" not in text
