"""The status page: `GET /status`, and the form on it that retries events. Behind the token, and without any state."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Callable
from datetime import UTC, timedelta
from importlib.metadata import version
from typing import Final, NoReturn
from urllib.parse import parse_qsl

import psycopg
from flask import Blueprint, Response, abort, request
from markupsafe import Markup

from webhooks import charts
from webhooks.access import Access, is_from_here
from webhooks.overview import BEHIND_SECONDS, LIMIT_SECONDS, STALE_SECONDS, Overview, look, verdict, worker_seen
from worker import inbox
from worker.budget import histogram
from worker.db import Connection, deadline, describe
from worker.pages import templates

log = logging.getLogger(__name__)

LARGEST_FORM: Final = 2048
FORM: Final = "application/x-www-form-urlencoded"

ASK: Final = {"WWW-Authenticate": 'Basic realm="clerk-sync", charset="UTF-8"'}
UNKNOWN: Final = "The password is the STATUS_TOKEN of clerk-sync; any user name will do.\n"
ELSEWHERE: Final = "This form was not sent from the status page. Nothing was retried.\n"
TOO_OLD: Final = "This form is too old, or not from the status page: open the page anew. Nothing was retried.\n"
UNREADABLE: Final = "This form can't be read: it takes form_key, and either svix_id or all=yes. Nothing was retried.\n"
NOT_A_FORM: Final = f"This takes {FORM}. Nothing was retried.\n"
TOO_LARGE: Final = "This form is too large. Nothing was retried.\n"
AWAY: Final = "Postgres didn't take it in time: try again. The receiver's log says more.\n"

RELOAD_SECONDS: Final = 60


def status_page(
    *, connect: Callable[[], Connection], ring: Callable[[], None], access: Access, budget: int
) -> Blueprint:
    """The page's routes. `connect` opens a connection for each request, `ring` says that there is work, and `budget` is
    that of the session token, in bytes."""
    page = Blueprint("status", __name__)
    render = _Page(access, budget)

    @page.before_request
    def ask() -> Response | None:
        if access.allows(request.headers.get("Authorization")):
            return None
        return _plain(UNKNOWN, 401, ASK)

    @page.after_request
    def protect(response: Response) -> Response:
        response.headers.update(render.headers)
        return response

    @page.get("/status", provide_automatic_options=False)
    def status() -> Response:
        length = _length(request.args.get("hours", ""))
        found = look(connect, budget, length)
        return Response(render(found, length), 503 if found.counts is None else 200, content_type=HTML)

    @page.post("/status/retry", provide_automatic_options=False)
    def retry() -> Response:
        asked = _asked(access)
        try:
            with connect() as connection, deadline(connection, LIMIT_SECONDS):
                retried = inbox.retry(connection, asked)
        except psycopg.Error as error:
            log.warning("events could not be retried from the status page", extra={"error": describe(error)})
            return _plain(AWAY, 503)
        ring()
        log.info(
            "events retried from the status page",
            extra={"asked": "all" if asked is None else 1, "retried": len(retried)},
        )
        return Response("", 303, {"Location": "/status#dead"})

    return page


HTML: Final = "text/html; charset=utf-8"


def _plain(text: str, status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(text, status, headers, content_type="text/plain; charset=utf-8")


def _length(hours: str) -> timedelta:
    """How far back to look."""
    return timedelta(hours=next((one for one in charts.HOURS if str(one) == hours), charts.HOURS[0]))


def _asked(access: Access) -> list[str] | None:
    """The events that a form asks to retry; None: all. What isn't a form of ours is answered at once."""
    headers = request.headers
    if not is_from_here(headers.get("Sec-Fetch-Site"), headers.get("Origin"), headers.get("Host", "")):
        _refuse(ELSEWHERE, 403)
    if request.mimetype != FORM:
        _refuse(NOT_A_FORM, 415)
    if (request.content_length or 0) > LARGEST_FORM:
        _refuse(TOO_LARGE, 413)
    fields = _fields(request.get_data(cache=False))
    if fields is None:
        _refuse(UNREADABLE, 400)
    if not access.knows(fields.pop("form_key", "")):
        _refuse(TOO_OLD, 403)
    if fields.keys() == {"svix_id"}:
        return [fields["svix_id"]]
    if fields != {"all": "yes"}:
        _refuse(UNREADABLE, 400)
    return None


def _refuse(text: str, status: int) -> NoReturn:
    abort(_plain(text, status))


def _fields(body: bytes) -> dict[str, str] | None:
    """A form's fields; None where it isn't one, has one of them twice, or one with what no id has."""
    try:
        pairs = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=3
        )
    except ValueError:
        return None
    fields = dict(pairs)
    fit = len(fields) == len(pairs) and all(value.isascii() and value.isprintable() for value in fields.values())
    return fields if fit else None


class _Page:
    """Renders what was found. The style is allowed by its hash, so that nothing else is."""

    def __init__(self, access: Access, budget: int) -> None:
        pages = templates()
        style = pages.get_template("status.css").render()
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
        self.headers: Final = {
            "Content-Security-Policy": (
                f"default-src 'none'; style-src 'sha256-{digest}'; form-action 'self'; frame-ancestors 'none'; "
                "base-uri 'none'"
            ),
            "Cache-Control": "no-store",
            # With `no-referrer` a browser sends the form with the origin `null`.
            "Referrer-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        self._access = access
        self._budget = budget
        self._template = pages.get_template("status.html")
        self._style = Markup(style)  # noqa: S704 - ours
        self._version = version("clerk-sync")

    def __call__(self, found: Overview, length: timedelta) -> str:
        at = found.at.astimezone(UTC) if found.at else None
        slots = charts.slots(found.minutes, at, length) if at and found.minutes is not None else None
        columns, most = charts.events(slots) if slots else ([], 0.0)
        spans, marks = charts.freshness(slots, BEHIND_SECONDS, STALE_SECONDS) if slots else ([], [])
        return self._template.render(
            found=found,
            at=at,
            utc=UTC,
            verdict=verdict(found),
            worker_seen=worker_seen(found),
            slots=slots,
            columns=columns,
            most=most,
            spans=spans,
            marks=marks,
            gaps=list(charts.gaps(slots)) if slots else [],
            hours=list(charts.hours(at, length)) if at else [],
            height=charts.HEIGHT,
            length=int(length.total_seconds() // 3600),
            lengths=charts.HOURS,
            bars=histogram(found.spread.users, self._budget) if found.spread else (),
            budget=self._budget,
            form_key=self._access.form_key(),
            style=self._style,
            reload=RELOAD_SECONDS,
            version=self._version,
        )
