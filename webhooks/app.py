"""The Flask application: the webhook route, health and metrics. Everything it uses is passed in."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from flask import Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException, InternalServerError, RequestEntityTooLarge

from webhooks.connections import LARGEST_BODY
from webhooks.signature import Delivery, Verify
from worker import metrics
from worker.errors import SignatureError, Unavailable
from worker.events import Ignored, Unusable, UserChanged, UserDeleted, parse_event
from worker.inbox import Incoming

log = logging.getLogger(__name__)

UNREADABLE: Final = {"error": "the body can't be read"}
LATER: Final = {"error": "the event can't be taken now; deliver it again"}
RETRY: Final = {"Retry-After": "5"}  # seconds

Answer = tuple[Response, int] | tuple[Response, int, Mapping[str, str]]


def create_app(
    *,
    verify: Verify,
    record: Callable[[Incoming], bool],
    ring: Callable[[], None],
    problems: Callable[[], list[str]],
    counts: Callable[[], dict[str, Any] | None],
    instance_id: str | None = None,
) -> Flask:
    """Build the receiver.

    `verify` raises SignatureError; `record` commits a delivery and says whether it was new, or raises Unavailable;
    `ring` says that there is work and never waits; `problems` lists why the service isn't ready; `counts` is what
    the inbox counted, None where Postgres doesn't answer.
    """
    app = Flask("clerk-sync", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = LARGEST_BODY
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.register_error_handler(RequestEntityTooLarge, _too_large)
    app.register_error_handler(InternalServerError, _failed)
    app.register_error_handler(HTTPException, _http_error)

    @app.post("/webhooks/clerk", provide_automatic_options=False)
    def webhook() -> Answer:
        body = _body()
        if body is None:
            return _answer("refused", 400, UNREADABLE, {"reason": UNREADABLE["error"]})
        g.started = time.perf_counter()
        try:
            delivery = verify(request.headers, body)
        except SignatureError as error:
            return _answer("refused", 400, {"error": str(error)}, {"reason": str(error), "size": len(body)})
        return _take(delivery, body, record, ring, instance_id)

    @app.get("/healthz")
    def healthz() -> Answer:
        return jsonify(status="alive"), 200

    @app.get("/readyz")
    def readyz() -> Answer:
        found = problems()
        return jsonify(status="not ready" if found else "ready", problems=found), 503 if found else 200

    @app.get("/metrics")
    def prometheus() -> Response:
        return Response(metrics.render(counts()), content_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def _take(
    delivery: Delivery,
    body: bytes,
    record: Callable[[Incoming], bool],
    ring: Callable[[], None],
    instance_id: str | None,
) -> Answer:
    """Record an authentic delivery, and answer it."""
    known: dict[str, Any] = {"svix_id": delivery.svix_id, "size": len(body)}
    event_type: str | None
    user_id: str | None
    version: int | None
    error: str | None
    match parse_event(body, instance_id=instance_id):
        case event_type, Ignored(reason=reason):
            return _answer("ignored", 200, {"status": "ignored"}, known | {"type": event_type, "reason": reason})
        case Unusable(type=event_type, user_id=user_id, reason=reason):
            version, error = None, reason
            known |= {"type": event_type, "user_id": user_id, "reason": reason}
        case event_type, (UserChanged() | UserDeleted()) as event:
            user_id, version, error = event.user_id, event.version, None
            known |= {"type": event_type, "user_id": user_id}
    incoming = Incoming(delivery.svix_id, delivery.sent_at, body, event_type, user_id, version, error)
    try:
        new = record(incoming)
    except Unavailable as unavailable:
        return _answer("unavailable", 503, LATER, known | {"reason": str(unavailable)}, RETRY)
    if not new:
        return _answer("duplicate", 200, {"status": "duplicate"}, known)
    if error is not None:
        return _answer("dead", 202, {"status": "dead"}, known)
    ring()
    return _answer("accepted", 202, {"status": "accepted"}, known)


_QUIET: Final = frozenset({"accepted", "duplicate", "ignored"})


def _answer(
    answer: str,
    status: int,
    body: Mapping[str, str],
    known: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Answer one delivery: count it, and write its line."""
    seconds = time.perf_counter() - g.started if "started" in g else 0.0
    metrics.DELIVERIES.labels(answer).inc()
    metrics.ACK.observe(seconds)
    quiet = answer in _QUIET and known.get("reason") != "another instance"
    fields = {"answer": answer, "status": status, "ms": round(seconds * 1000, 1), **known}
    log.log(logging.INFO if quiet else logging.WARNING, "delivery", extra=fields)
    return jsonify(body), status, headers or {}


def _too_large(_: RequestEntityTooLarge) -> Answer:
    return _answer("too_large", 413, {"error": "the body is over 1 MiB"}, {})


def _failed(_: InternalServerError) -> Answer:
    """Whatever nobody thought of is ours to mend, not the sender's: Svix delivers the event again."""
    return jsonify(LATER), 503, RETRY


def _http_error(error: HTTPException) -> Answer:
    headers = {name: value for name, value in error.get_headers() if name == "Allow"}
    return jsonify(error=error.name.lower()), error.code or 500, headers


def _body() -> bytes | None:
    """The body as it was sent; None where it broke off. Raises RequestEntityTooLarge."""
    try:
        return request.get_data(cache=False)
    except RequestEntityTooLarge:
        raise
    except Exception:  # noqa: BLE001 - each web server has its own errors for it
        return None
