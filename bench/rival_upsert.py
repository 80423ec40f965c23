"""What the two usual designs do with an event: an upsert, in the request or in a Celery task.

One table, and a version in it, so that an old event doesn't beat a newer. The worker loads no more than it needs.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import msgspec
import psycopg
from celery import Celery

Connection = psycopg.Connection[Any]

_thread = threading.local()


def connection() -> Connection:
    """This thread's own connection: a pool of exactly as many as are used, without the pool's cost."""
    if not hasattr(_thread, "connection"):
        _thread.connection = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
    kept: Connection = _thread.connection
    return kept


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
