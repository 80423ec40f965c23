"""The two usual designs, written as well as they can be, and the least that any receiver with an inbox must do.

*inline* is the handler that verifies and upserts inside the request. *task per event* verifies, and sends the payload
to a Celery worker, which upserts. Both keep one table, and a version in it, so that an old event doesn't beat a newer.
Where the servers are comes from the environment, as for the product.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import psycopg
from celery import Celery
from flask import Flask, Response, request
from svix.webhooks import Webhook, WebhookVerificationError

Connection = psycopg.Connection[Any]

_thread = threading.local()


def connection() -> Connection:
    """This thread's own connection: a pool of exactly as many as are used, without the pool's cost."""
    if not hasattr(_thread, "connection"):
        _thread.connection = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
    kept: Connection = _thread.connection
    return kept


# The upsert that both have in common


class Data(msgspec.Struct):
    """What is kept of a user. Raw: the JSON goes to Postgres as it came."""

    id: str
    updated_at: int = 0
    private_metadata: msgspec.Raw = msgspec.Raw(b"{}")
    public_metadata: msgspec.Raw = msgspec.Raw(b"{}")
    unsafe_metadata: msgspec.Raw = msgspec.Raw(b"{}")


class Event(msgspec.Struct):
    """A webhook's body; the rest of it is skipped without being made into objects."""

    type: str
    data: Data


decode = msgspec.json.Decoder(Event).decode

# psycopg prepares it by itself after a few times.
UPSERT = """
insert into app_users (user_id, version, private_metadata, public_metadata, unsafe_metadata)
values (%s, %s, %s, %s, %s)
on conflict (user_id) do update
set version = excluded.version,
    private_metadata = excluded.private_metadata,
    public_metadata = excluded.public_metadata,
    unsafe_metadata = excluded.unsafe_metadata
where excluded.version > app_users.version
"""
DELETE = "delete from app_users where user_id = %s"


def apply(body: bytes | str) -> None:
    """Bring the table up to one event."""
    event = decode(body)
    data = event.data
    if event.type == "user.deleted":
        connection().execute(DELETE, (data.id,))
        return
    kinds = (data.private_metadata, data.public_metadata, data.unsafe_metadata)
    connection().execute(UPSERT, (data.id, data.updated_at, *(bytes(kind).decode() for kind in kinds)))


def _receiver(take: Callable[[bytes], None]) -> Flask:
    app = Flask(__name__, static_folder=None)
    webhook = Webhook(os.environ["CLERK_WEBHOOK_SIGNING_SECRET"])

    @app.post("/webhooks/clerk")
    def deliver() -> tuple[Response, int]:
        body = request.get_data(cache=False)
        try:
            webhook.verify(body, dict(request.headers))
        except WebhookVerificationError:
            return _said("refused"), 400
        take(body)
        return _said("accepted"), 202

    return app


def _said(status: str) -> Response:
    return Response(f'{{"status": "{status}"}}', content_type="application/json")


def inline() -> Flask:
    """The receiver that applies within the request."""
    return _receiver(apply)


def task_per_event() -> Flask:
    """The receiver that sends each event to the worker. As text: cheaper than as the objects that it stands for."""
    task = celery(os.environ["REDIS_URL"]).tasks["apply"]

    def take(body: bytes) -> None:
        task.delay(body.decode())

    return _receiver(take)


def celery(redis_url: str) -> Celery:
    """The worker's app, and the receiver's way to it."""
    app = Celery("rival", broker=redis_url, set_as_current=False)
    app.conf.update(
        task_ignore_result=True,
        task_acks_late=True,  # a killed worker loses no event
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        broker_connection_retry_on_startup=True,
        worker_cancel_long_running_tasks_on_connection_loss=True,
    )
    app.task(name="apply")(apply)
    return app


# The least

INSERT = "insert into clerk.webhook_events (svix_id, sent_at, body) values (%s, now(), %s)"


def insert_alone(
    environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], Any]
) -> Iterable[bytes]:
    """A bare WSGI application: an insert and commit into the product's own inbox for each request, and nothing else."""
    body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"] or 0))
    if body:
        connection().execute(INSERT, (environ["HTTP_SVIX_ID"], body))
    answer = b'{"status":"accepted"}'
    start_response("202 Accepted", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
    return [answer]
