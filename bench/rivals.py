"""The two usual designs, written as well as they can be, and the least that any receiver with an inbox must do.

*inline* is the handler that verifies and upserts inside the request. *task per event* verifies, and sends the payload
to a Celery worker, which upserts: see `bench.rival_upsert`. Where the servers are comes from the environment, as for
the product.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from flask import Flask, Response, request
from svix.webhooks import Webhook, WebhookVerificationError

from bench.rival_upsert import apply, celery, connection


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
