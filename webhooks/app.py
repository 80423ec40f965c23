"""The Flask application: the webhook route, health, metrics and the status page. Everything it uses is passed in."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from flask import Blueprint, Flask, Response, jsonify, request
from werkzeug.exceptions import HTTPException, InternalServerError, RequestEntityTooLarge

from webhooks.connections import LARGEST_BODY, SINCE
from webhooks.signature import NAMES, Delivery, Verify
from worker import metrics, tracing
from worker.errors import SignatureError, Unavailable
from worker.events import Ignored, Unusable, UserChanged, UserDeleted, read_event
from worker.inbox import Incoming

log = logging.getLogger(__name__)

JSON: Final = "application/json"
UNREADABLE: Final = "the body can't be read"
LATER: Final = {"error": "the event can't be taken now; deliver it again"}
RETRY: Final = {"Retry-After": "5"}  # seconds

_SIGNATURE_HEADERS: Final = tuple((f"HTTP_{name.upper().replace('-', '_')}", name) for name in sorted(NAMES))

Answer = tuple[Response, int] | tuple[Response, int, Mapping[str, str]]
Record = Callable[[Incoming, float], Callable[[], bool]]


class Promised(Response):
    """An answer that is known once its delivery is committed. Whoever asks for its first byte waits for that: WSGI
    lets an application say its status as late as then, so that a server may call it for others in between."""

    def __init__(self, promise: Callable[[], Response]) -> None:
        super().__init__(content_type=JSON)
        self._promise = promise

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        yield from self._promise()(environ, start_response)


def create_app(
    *,
    verify: Verify,
    record: Record,
    ring: Callable[[], None],
    problems: Callable[[], list[str]],
    counts: Callable[[], dict[str, Any] | None],
    instance_id: str | None = None,
    status: Blueprint | None = None,
) -> Flask:
    """Build the receiver.

    `verify` raises SignatureError; `record` takes a delivery and since when it was whole, and gives what commits it and
    says whether it was new, and both may raise Unavailable; `ring` says that there is work and never waits; `problems`
    lists why the service isn't ready; `counts` is what the inbox counted, None where Postgres doesn't answer; `status`
    is the status page, where there is to be one.
    """
    app = Flask("clerk-sync", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = LARGEST_BODY
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.register_error_handler(RequestEntityTooLarge, _too_large)
    app.register_error_handler(InternalServerError, _failed)
    app.register_error_handler(HTTPException, _http_error)

    @app.post("/webhooks/clerk", provide_automatic_options=False)
    def webhook() -> Response:
        environ = request.environ
        since = _since()
        body = _body()
        if body is None:
            return _answer("refused", since, {"reason": UNREADABLE}, {"error": UNREADABLE})
        try:
            delivery = verify({name: environ[key] for key, name in _SIGNATURE_HEADERS if key in environ}, body)
        except SignatureError as error:
            return _answer("refused", since, {"reason": str(error), "size": len(body)}, {"error": str(error)})
        return _take(delivery, body, since, record=record, ring=ring, instance_id=instance_id)

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

    if status is not None:
        app.register_blueprint(status)
    return app


def _take(
    delivery: Delivery,
    body: bytes,
    since: float,
    *,
    record: Record,
    ring: Callable[[], None],
    instance_id: str | None,
) -> Response:
    """Take an authentic delivery: an answer, or the promise of one where it is to be recorded."""
    known: dict[str, Any] = {"svix_id": delivery.svix_id, "size": len(body)}
    event_type: str | None
    user_id: str | None
    version: int | None
    error: str | None
    match read_event(body, instance_id=instance_id):
        case event_type, Ignored(reason=reason):
            return _answer("ignored", since, known | {"type": event_type, "reason": reason})
        case Unusable(type=event_type, user_id=user_id, reason=reason):
            version, error = None, reason
            known |= {"type": event_type, "user_id": user_id, "reason": reason}
        case event_type, (UserChanged() | UserDeleted()) as event:
            user_id, version, error = event.user_id, event.version, None
            known |= {"type": event_type, "user_id": user_id}
    incoming = Incoming(delivery.svix_id, delivery.sent_at, body, event_type, user_id, version, error)
    try:
        committed = record(incoming, since)
    except Unavailable as unavailable:
        return _answer("unavailable", since, known | {"reason": str(unavailable)})

    def promise() -> Response:
        try:
            new = committed()
        except Unavailable as unavailable:
            return _answer("unavailable", since, known | {"reason": str(unavailable)})
        if new and error is not None:
            return _answer("dead", since, known)
        ring()  # for a duplicate too: the one before it may have been committed when its connection died
        return _answer("accepted" if new else "duplicate", since, known)

    return Promised(promise)


_ANSWERS: Final[Mapping[str, tuple[int, Mapping[str, str]]]] = {
    "accepted": (202, {"status": "accepted"}),
    "duplicate": (200, {"status": "duplicate"}),
    "ignored": (200, {"status": "ignored"}),
    "dead": (202, {"status": "dead"}),
    "refused": (400, {}),
    "too_large": (413, {"error": "the body is over 1 MiB"}),
    "unavailable": (503, LATER),
}
_QUIET: Final = frozenset({"accepted", "duplicate", "ignored"})

_counter: Final = functools.cache(metrics.DELIVERIES.labels)
for each in _ANSWERS:
    _counter(each)  # at 0 from the start: a counter that begins at 1 has not risen, as Prometheus sees it


def _answer(answer: str, since: float, known: Mapping[str, Any], said: Mapping[str, str] | None = None) -> Response:
    """Answer one delivery: count it, and write its line. It may be called when its request is over for Flask."""
    status, _ = _ANSWERS[answer]
    seconds = time.monotonic() - since
    _counter(answer).inc()
    metrics.ACK.observe(seconds)
    quiet = answer in _QUIET and known.get("reason") != "another instance"
    fields = {"answer": answer, "status": status, "ms": round(seconds * 1000, 1), **known}
    log.log(logging.INFO if quiet else logging.WARNING, "delivery", extra=fields)
    tracing.span("delivery", seconds, fields)
    return _said(status, said) if said else _usual(answer)


@functools.cache
def _usual(answer: str) -> Response:
    """Whole, and the same one each time: nobody changes it."""
    return _said(*_ANSWERS[answer])


def _said(status: int, said: Mapping[str, str]) -> Response:
    body = json.dumps(said, separators=(",", ":")) + "\n"
    return Response(body, status, RETRY if status == 503 else None, content_type=JSON)


def _since() -> float:
    """When the last byte of this request came, or now, where the server doesn't say."""
    return float(request.environ.get(SINCE) or time.monotonic())


def _too_large(_: RequestEntityTooLarge) -> Response:
    return _answer("too_large", _since(), {})


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
