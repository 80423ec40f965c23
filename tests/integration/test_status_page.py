"""The status page on real Postgres: who may see it, what it shows, and what its form does."""

from __future__ import annotations

import base64
import hashlib
import html
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import psycopg
import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from tests.events import changed, incoming
from webhooks.access import Access
from webhooks.app import create_app
from webhooks.status import LARGEST_FORM, status_page
from worker import db, inbox, minutes, runs, sync
from worker.db import Connection
from worker.policy import Policy

TOKEN: Final = "t0ken-of-the-tests-0123456789"
BEARER: Final = {"Authorization": f"Bearer {TOKEN}"}
FORM: Final = "application/x-www-form-urlencoded"


class Page:
    """The receiver with its status page, as whoever knows the token sees it; rings are counted."""

    def __init__(self, database_url: str) -> None:
        self.rings = 0
        self.access = Access(TOKEN)
        page = status_page(
            connect=lambda: db.connect(database_url, "status page", statement_ms=2000, lock_ms=300),
            ring=self._ring,
            access=self.access,
            budget=1200,
        )
        self.client = receiver(page)

    def _ring(self) -> None:
        self.rings += 1

    def get(self, query: str = "") -> TestResponse:
        return self.client.get(f"/status{query}", headers=BEARER)

    def post(self, fields: dict[str, str] | str, headers: dict[str, str] | None = None, **how: Any) -> TestResponse:
        """Send the form; fields are given as they are, the form's key apart."""
        return self.client.post("/status/retry", data=fields, headers=BEARER | (headers or {}), **how)

    def retry(self, **fields: str) -> TestResponse:
        """Send the form as the page has it."""
        return self.post({"form_key": self.access.form_key(), **fields})


def receiver(page: Any = None) -> FlaskClient:
    """A receiver that takes no deliveries."""

    def nothing(*_: Any) -> Any:
        raise AssertionError("that isn't asked for here")

    app = create_app(verify=nothing, record=nothing, ring=nothing, problems=nothing, counts=nothing, status=page)
    return app.test_client()


@pytest.fixture
def page(database_url: str) -> Page:
    return Page(database_url)


@pytest.fixture
def connection(connect: Callable[[], Connection]) -> Connection:
    return connect()


def text_of(answer: TestResponse) -> str:
    """What a reader sees, without tags and style."""
    shown = re.sub(r"<style>.*?</style>|<[^>]*>", " ", answer.text, flags=re.DOTALL)
    return " ".join(html.unescape(shown).split())


# --- Who may see it


@pytest.mark.parametrize(("method", "path"), [("GET", "/status"), ("HEAD", "/status"), ("POST", "/status/retry")])
def test_where_no_token_is_set_there_is_no_such_page(method: str, path: str) -> None:
    client = receiver()
    there = client.open(path, method=method, headers=BEARER)
    other = client.open("/unknown", method=method, headers=BEARER)
    assert there.status_code == 404
    assert (there.data, list(there.headers)) == (other.data, list(other.headers))


@pytest.mark.parametrize(("method", "path"), [("GET", "/status"), ("HEAD", "/status"), ("POST", "/status/retry")])
@pytest.mark.parametrize("given", [None, "Bearer wrong", "Basic", "Basic %%%", f"Bearer {TOKEN}x"])
def test_whoever_lacks_the_token_is_asked_for_it(page: Page, method: str, path: str, given: str | None) -> None:
    answer = page.client.open(path, method=method, headers={"Authorization": given} if given else {})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == 'Basic realm="clerk-sync", charset="UTF-8"'
    assert answer.headers["Cache-Control"] == "no-store"
    assert TOKEN not in answer.text + str(answer.headers)


def test_a_token_in_the_url_opens_nothing(page: Page) -> None:
    assert page.client.get(f"/status?token={TOKEN}").status_code == 401
    assert page.client.get("/status", headers={"Cookie": f"token={TOKEN}"}).status_code == 401


def test_the_password_of_any_user_opens_it(page: Page) -> None:
    assert page.client.get("/status", auth=("anybody", TOKEN)).status_code == 200


@pytest.mark.parametrize(("method", "path"), [("POST", "/status"), ("GET", "/status/retry"), ("PUT", "/status")])
def test_another_method_is_405(page: Page, method: str, path: str) -> None:
    assert page.client.open(path, method=method, headers=BEARER).status_code == 405


# --- What it shows


def whole(connection: Connection) -> None:
    """Events of every state, runs, minutes, and users over the budget."""
    bodies = [changed(f"user_{number}", private={"k": "c4nary"}, public={"k": "x" * 100 * number})
              for number in range(20)]  # fmt: skip
    inbox.record(connection, [incoming(body) for body in bodies])
    sync.drain(connection, Policy())
    inbox.record(connection, [incoming(changed("user_odd", private="c4nary"), "msg_odd")])
    minutes.count(connection)
    connection.execute("update clerk.minutes set acknowledged = 1234, applied = 1233, fresh_p50 = 0.6, fresh_p99 = 1.3,"
                       " fresh_max = 2")  # fmt: skip
    for kind, error in ((runs.INCREMENTAL, None), (runs.FULL, "Clerk's API refuses the request: 401 (no code)")):
        run = runs.begin(connection, kind, "periodic")
        run.counters.update(missing=3, unchanged=7)
        run.calls, run.state = 41, "done"
        runs.save(connection, run)
        if error:
            connection.execute("update clerk.runs set state = 'running' where id = %s", (run.id,))
            runs.fail(connection, run, error)


def test_it_tells_how_it_stands(page: Page, connection: Connection) -> None:
    whole(connection)
    answer = page.get()
    assert answer.status_code == 200
    assert answer.content_type == "text/html; charset=utf-8"
    said = text_of(answer)
    for told in (
        "Fresh Nothing waits to be applied. Of the last ten minutes' 1,233 events, half were visible within 0.6 s",
        "What to do The last run (full) failed: Clerk's API refuses the request: 401 (no code). To try again:",
        "clerk-sync reconcile 1 event was set aside",
        "Waiting 0",
        "Oldest waiting none a worker is there",
        "Set aside 1",
        "Applied 20",
        "Users 20",
        "Over budget 8 of 1,200 bytes",
        "1,234 acknowledged, 1,233 applied, 0 set aside",
        "half within 0.6 s, 99 % within 1.3 s",
        "msg_odd user.updated, user_odd",
        "incremental done 0 s ago 3 missing 7 41",
        "full failed 0 s ago 3 missing 7",
        "the runs of the last 24 hours took 82 calls of Clerk",
        "budget, 1,200",
        "user_12 1,2",
    ):
        assert told in said, said[-3000:]
    assert "c4nary" not in answer.text
    assert "didn" not in said, "everything was told"


def test_an_empty_database_is_told_too(page: Page) -> None:
    answer = page.get()
    assert answer.status_code == 200
    said = text_of(answer)
    for told in ("No worker has been seen yet. Nothing waits so far.", "None: every event could be applied.",
                 "No run yet.", "No users yet: nothing to weigh."):  # fmt: skip
        assert told in said, said[-3000:]


@pytest.mark.parametrize(
    ("query", "shown"), [("", 6), ("?hours=24", 24), ("?hours=48", 48), ("?hours=7", 6), ("?hours=<b>&hours=", 6)]
)
def test_it_looks_back_as_far_as_is_asked_for(page: Page, query: str, shown: int) -> None:
    answer = page.get(query)
    assert answer.status_code == 200
    assert f"Freshness over the last {shown} hours" in answer.text
    assert "<b>" not in answer.text.replace("<b>clerk-sync</b>", "")


HOSTILE: Final = """<script>alert(1)</script>"'><img src=x onerror=alert(1)>{{9876*5432}}&lt;\u202e\u2028"""
SET_ASIDE: Final = """
insert into clerk.webhook_events (svix_id, type, user_id, state, error, sent_at, processed_at, body)
values (%(id)s, %(text)s, %(text)s, 'dead', %(text)s, now(), now(), '{}')
"""


def test_whatever_an_event_is_called_is_text(page: Page, connection: Connection) -> None:
    connection.execute(SET_ASIDE, {"id": "msg_" + HOSTILE, "text": HOSTILE})
    connection.execute("insert into clerk.runs (kind, cause, state, error) values ('full', 'asked', 'failed', %s)",
                       (HOSTILE,))  # fmt: skip
    sync_over = "update clerk.users set over_budget = true, user_id = %s"
    inbox.record(connection, [incoming(changed("user_a"))])
    sync.drain(connection, Policy())
    connection.execute(sync_over, (HOSTILE,))
    answer = page.get()
    assert answer.status_code == 200
    assert HOSTILE[:8] not in answer.text.replace("<style>", "")
    assert "<img" not in answer.text
    assert str(9876 * 5432) not in answer.text
    # The characters that turn or break lines are shown, and stand raw only in the form, where nobody reads them.
    assert "\u202e" not in re.sub(r'value="[^"]*"', "", answer.text)
    assert text_of(answer).count("<script>alert(1)</script>") == 6


TAG: Final = re.compile(r"<([a-z0-9]+)((?:\s+[a-z-]+(?:=\"[^\"]*\")?)*)\s*/?>")


def test_the_page_is_all_that_its_policy_allows(page: Page, connection: Connection) -> None:
    whole(connection)
    answer = page.get()
    (style,) = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert answer.headers["Content-Security-Policy"] == (
        f"default-src 'none'; style-src 'sha256-{digest}'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    )
    for name, value in (("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"),
                        ("X-Frame-Options", "DENY"), ("Referrer-Policy", "same-origin"),
                        ("Cross-Origin-Resource-Policy", "same-origin")):  # fmt: skip
        assert answer.headers[name] == value
    tags = TAG.findall(answer.text.replace(style, ""))
    assert {"svg", "rect", "form", "button", "table"} <= {tag for tag, _ in tags}
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "image", "use"}
    attributes = {
        name for _, given in tags for name in re.findall(r"([a-z-]+)(?==|\s|$)", re.sub(r'"[^"]*"', '""', given))
    }
    assert not {name for name in attributes if name.startswith("on")} | (attributes & {"style", "src", "srcset"})
    assert not re.search(r"https?://|url\(|@import", answer.text)
    assert TOKEN not in answer.text + str(answer.headers)


def test_what_takes_too_long_is_left_out_and_said(
    page: Page, connection: Connection, connect: Callable[[], Connection], caplog: pytest.LogCaptureFixture
) -> None:
    whole(connection)
    with connect() as other, other.transaction():
        other.execute("lock table clerk.runs in access exclusive mode")
        answer = page.get()
    assert answer.status_code == 200
    said = text_of(answer)
    assert "Postgres didn't tell everything in time" in said
    assert said.count("Not known just now") == 2, "of runs, and what comes after them"
    assert "msg_odd" in said
    ours = [record for record in caplog.records if record.name == "webhooks.overview"]
    assert [record.levelno for record in ours] == [logging.WARNING]


def test_an_older_schema_is_told_with_what_to_do(page: Page, connection: Connection) -> None:
    connection.execute("alter table clerk.minutes rename to elsewhere")
    connection.execute("update clerk.schema_version set version_num = '0007'")
    try:
        answer = page.get()
    finally:
        connection.execute("alter table clerk.elsewhere rename to minutes")
        connection.execute("update clerk.schema_version set version_num = %s", (db.SCHEMA_VERSION,))
    assert "Not ready" in text_of(answer)
    assert "run clerk-sync migrate" in text_of(answer)


# --- What its form does


@pytest.fixture
def dead(connection: Connection) -> list[str]:
    """Two events that were set aside, and one that wasn't."""
    inbox.record(connection, [incoming(changed("user_a", private=[]), "msg_1"), incoming(changed("user_b"), "msg_3")])
    sync.drain(connection, Policy())
    connection.execute(SET_ASIDE, {"id": "msg_" + HOSTILE, "text": "refused"})
    return ["msg_1", "msg_" + HOSTILE]


def states(connection: Connection) -> dict[str, str]:
    return dict(connection.execute("select svix_id, state from clerk.webhook_events").fetchall())


def test_a_button_makes_its_event_pending_again_and_rings(page: Page, connection: Connection, dead: list[str]) -> None:
    answer = page.retry(svix_id="msg_1")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/status#dead")
    assert states(connection) == {"msg_1": "pending", dead[1]: "dead", "msg_3": "done"}
    assert page.rings == 1
    assert page.retry(svix_id="msg_1").status_code == 303, "it was done before"


def test_one_button_retries_all(page: Page, connection: Connection, dead: list[str]) -> None:
    assert page.retry(all="yes").status_code == 303
    assert states(connection) == {"msg_1": "pending", dead[1]: "pending", "msg_3": "done"}


@pytest.mark.parametrize("svix_id", ["msg_3", "msg_of_nobody", ""])
def test_what_was_not_set_aside_stays_as_it_is(
    page: Page, connection: Connection, dead: list[str], svix_id: str
) -> None:
    before = states(connection)
    assert page.retry(svix_id=svix_id).status_code == 303
    assert states(connection) == before


def test_every_form_of_the_page_is_one_that_it_takes(page: Page, connection: Connection) -> None:
    """As a browser sends them; ids are as receivers take them."""
    odd = "msg_\"'><&=+%2B;{{7}}"
    for svix_id in (odd, "msg_2"):
        connection.execute(SET_ASIDE, {"id": svix_id, "text": "refused"})
    forms = re.findall(r'<form method="post" action="/status/retry">(.*?)</form>', page.get().text)
    sent = [
        {
            html.unescape(name): html.unescape(value)
            for name, value in re.findall(r'name="([^"]*)" value="([^"]*)"', form)
        }
        for form in forms
    ]
    assert [fields.get("svix_id") for fields in sent] == [None, "msg_2", odd]
    for fields in sent[1:]:
        assert page.post(fields).status_code == 303
    assert set(states(connection).values()) == {"pending"}


def test_a_deleted_user_s_event_is_not_made_pending_again(page: Page, connection: Connection) -> None:
    """Its body is gone, or will be within seconds."""
    inbox.record(connection, [incoming(changed("user_a"))])
    sync.drain(connection, Policy())
    connection.execute("update clerk.users set deleted_at = now()")
    connection.execute(SET_ASIDE, {"id": "msg_1", "text": "user_a"})
    page.retry(all="yes")
    assert states(connection)["msg_1"] == "dead"


REFUSED: Final[list[tuple[int, dict[str, str] | str, dict[str, str]]]] = [
    (403, {"svix_id": "msg_1"}, {}),
    (403, {"svix_id": "msg_1", "form_key": ""}, {}),
    (403, {"svix_id": "msg_1", "form_key": "0" * 64}, {}),
    (403, {"svix_id": "msg_1", "form_key": TOKEN}, {}),
    (403, {"svix_id": "msg_1", "form_key": "KEY"}, {"Sec-Fetch-Site": "cross-site"}),
    (403, {"svix_id": "msg_1", "form_key": "KEY"}, {"Sec-Fetch-Site": "same-site"}),
    (403, {"svix_id": "msg_1", "form_key": "KEY"}, {"Origin": "https://evil.example"}),
    (403, {"svix_id": "msg_1", "form_key": "KEY"}, {"Origin": "null"}),
    (400, {"form_key": "KEY"}, {}),
    (400, {"form_key": "KEY", "all": ""}, {}),
    (400, {"form_key": "KEY", "all": "no"}, {}),
    (400, {"form_key": "KEY", "all": "yes", "svix_id": "msg_1"}, {}),
    (400, {"form_key": "KEY", "all": "yes", "x": "y"}, {}),
    (400, {"form_key": "KEY", "svix_id": "msg_\0"}, {}),
    (400, {"form_key": "KEY", "svix_id": "msg_\u202e"}, {}),
    (400, "form_key=KEY&svix_id=msg_1&svix_id=msg_2", {}),
    (400, "form_key=KEY&all=yes&a=1&b=2", {}),
    (400, "form_key=KEY&svix_id=%FF", {}),
    (400, "form_key=KEY&svix_id=\u00ff", {}),
    (400, "form_key=KEY&&all", {}),
    (403, "", {}),
    (413, "form_key=KEY&all=yes" + "x" * LARGEST_FORM, {}),
    (415, '{"form_key": "KEY", "all": "yes"}', {"Content-Type": "application/json"}),
    (415, "form_key=KEY&all=yes", {"Content-Type": "text/plain"}),
    (415, "form_key=KEY&all=yes", {"Content-Type": ""}),
]


@pytest.mark.parametrize("refused", REFUSED)
def test_a_form_that_is_not_the_page_s_or_cannot_be_read_does_nothing(
    page: Page, connection: Connection, dead: list[str], refused: tuple[int, dict[str, str] | str, dict[str, str]]
) -> None:
    status, fields, headers = refused
    key = page.access.form_key()
    before = states(connection)
    if isinstance(fields, str):
        answer = page.post(fields.replace("KEY", key), {"Content-Type": FORM} | headers)
    else:
        answer = page.post({name: value.replace("KEY", key) for name, value in fields.items()}, headers)
    assert answer.status_code == status
    assert answer.text.endswith("Nothing was retried.\n")
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert states(connection) == before
    assert page.rings == 0


def test_a_form_that_a_browser_sends_from_the_page_is_taken(page: Page, dead: list[str]) -> None:
    fields = {"form_key": page.access.form_key(), "svix_id": "msg_1"}
    for headers in ({"Sec-Fetch-Site": "same-origin", "Origin": "https://elsewhere"}, {"Origin": "http://localhost"}):
        assert page.post(fields, headers).status_code == 303


# --- Without Postgres


@pytest.fixture
def silent_server() -> Iterator[int]:
    """Accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_where_postgres_is_away_the_page_says_so(caplog: pytest.LogCaptureFixture) -> None:
    page = Page("postgresql://secretive:c4nary@127.0.0.1:1/hidden")
    answer = page.get()
    assert answer.status_code == 503
    assert "Postgres doesn't answer Nothing can be told." in text_of(answer)
    assert "127.0.0.1" not in answer.text
    assert "c4nary" not in answer.text + caplog.text
    answer = page.retry(all="yes")
    assert answer.status_code == 503
    assert "try again" in answer.text
    assert page.rings == 0


def test_where_postgres_is_silent_the_page_says_so_in_time(silent_server: int) -> None:
    page = Page(f"postgresql://nobody@127.0.0.1:{silent_server}/none")
    started = time.monotonic()
    assert page.get().status_code == 503
    assert time.monotonic() - started < 5


def test_a_connection_that_falls_silent_in_the_middle_is_given_up(
    page: Page, connect: Callable[[], Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webhooks.overview.LIMIT_SECONDS", 0.3)
    with connect() as other, other.transaction():
        other.execute("lock table clerk.webhook_events in access exclusive mode")
        started = time.monotonic()
        answer = page.get()
        assert time.monotonic() - started < 1.5
    assert answer.status_code == 503
    assert "The tables can't be read." in text_of(answer)


def test_nothing_of_it_needs_more_than_the_receiver_s_role(page: Page, db: psycopg.Connection[Any]) -> None:
    """Its every statement, as that role: see test_roles for a login of its own."""
    db.execute("set role clerk_receiver")
    assert inbox.set_aside_last(db, 20) == []
    assert inbox.retry(db, None) == []
    assert runs.calls(db, minutes.KEPT) == 0
