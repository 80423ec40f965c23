"""The contract's table of `POST /webhooks/clerk`, from the wire to the row."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.acceptance.conftest import OLD_SECRET
from tests.acceptance.system import CANARY, Answer, Client, System, new_user, now_ms, user_event
from tests.clerk import SECRET, sign
from tests.events import deleted
from tests.waiting import until

MIB: Final = 1024 * 1024

ACCEPTED: Final = (202, "accepted")
IGNORED: Final = (200, "ignored")
DEAD: Final = (202, "dead")

BODIES: Final = {
    "backend_api__get_user.json": DEAD,  # a user without the envelope of an event
    "capture_2025-04__user.created.json": ACCEPTED,
    "capture_2025-10__user.deleted.json": ACCEPTED,
    "catalog_example__user.updated.json": ACCEPTED,
    "official_docs__user.created.json": ACCEPTED,
    "official_sdk_test__user.created_minimal.json": DEAD,  # nothing tells its version
    "official_spec__email.created.json": IGNORED,
    "official_spec__session.created.json": IGNORED,
    "official_spec__user.created.json": ACCEPTED,
    "official_spec__user.deleted.json": ACCEPTED,
    "official_spec__user.updated.json": ACCEPTED,
}

# What the bodies tell in the end, in any order: of the four users that they are about, one was deleted as its only
# event and one after its creation and update; of one there are a creation and a later update.
LIVE: Final[dict[str, tuple[Any, Any, Any, int]]] = {
    "user_2vX11zP5ojq7cTRY58xT6TESTRG": ({}, None, None, 1744276393626),
    "user_29w83sxmDNGwOuEthce5gg56FcC": ({}, None, None, 1654012824306),
}
GONE: Final = ("user_34OkVaTESTaaaaaaaaaaaaaaaaa", "user_2g7np7Hrk0SN6kj5EDMLDaKNL0S")
NEVER: Final = ("user_123", "user_2yE06IFCFf4o90ue0Z6PYTESTGv")


def test_all_recorded_bodies_are_covered(data: Path) -> None:
    assert {path.name for path in data.iterdir()} == set(BODIES)


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_every_recorded_body_gets_the_contracts_status_and_ends_in_the_right_rows(
    system: System, client: Client, data: Path, backwards: bool
) -> None:
    answers = {name: client.deliver((data / name).read_bytes()) for name in sorted(BODIES, reverse=backwards)}
    assert {name: answer.outcome for name, answer in answers.items()} == BODIES
    system.settle()
    assert system.rows(*LIVE, *GONE, *NEVER) == LIVE
    for name, answer in answers.items():
        event = system.event(answer.svix_id)
        if BODIES[name] == IGNORED:
            assert event is None
        elif BODIES[name] == DEAD:
            assert event is not None
            assert (event[0], event[3]) == ("dead", True)
            assert event[2]
        else:
            assert event == ("done", 1, None, False)


CHANGES: Final = [name for name, outcome in BODIES.items() if outcome == ACCEPTED and "deleted" not in name]


@pytest.mark.parametrize("name", CHANGES)
def test_each_recorded_change_alone_makes_the_users_row(system: System, client: Client, data: Path, name: str) -> None:
    event = json.loads((data / name).read_bytes())
    user_id = event["data"]["id"] = new_user()
    assert client.deliver(json.dumps(event).encode()).outcome == ACCEPTED
    (row,) = until(lambda: system.rows(user_id)).values()
    # All of these are small, so the session token carries what is public and unsafe.
    assert row == (event["data"]["private_metadata"] or {}, None, None, event["data"]["updated_at"])


def test_oversize_metadata_is_copied_as_it_was_sent_and_null_again_once_it_fits(system: System, client: Client) -> None:
    user_id = new_user()
    private = {"n": 2**53 + 1, "decimal": 0.1, "name": "Zoë 🦊", "": None}
    public = {"biography": "y" * 1200}
    assert client.deliver(user_event(user_id, now_ms(), private, public=public)).outcome == ACCEPTED
    (row,) = until(lambda: system.rows(user_id)).values()
    canary = {"canary": CANARY}
    assert row[:3] == (canary | private, canary | public, canary)
    version = now_ms()
    assert client.deliver(user_event(user_id, version)).outcome == ACCEPTED
    until(lambda: system.rows(user_id)[user_id] == (canary, None, None, version))


def test_late_and_repeated_deliveries_change_nothing_and_a_deletion_is_terminal(system: System, client: Client) -> None:
    user_id, version = new_user(), now_ms()
    newest = client.deliver(user_event(user_id, version, {"n": 2}))
    assert newest.outcome == ACCEPTED
    client.deliver(user_event(user_id, version - 1000, {"n": 1}))
    system.settle()
    assert system.rows(user_id)[user_id][0]["n"] == 2
    client.deliver(deleted(user_id, version + 1000))
    until(lambda: not system.rows(user_id))
    for body in (user_event(user_id, version, {"n": 2}), user_event(user_id, version + 5000, {"n": 3})):
        assert client.deliver(body).outcome == ACCEPTED
    system.settle()
    assert not system.rows(user_id)


def test_either_secret_and_either_header_family_will_do(system: System, client: Client) -> None:
    assert client.deliver(user_event(new_user(), now_ms()), secret=OLD_SECRET).outcome == ACCEPTED
    body = user_event(new_user(), now_ms())
    signed = sign(SECRET, body)
    assert client.post(body, {name.replace("svix", "webhook"): value for name, value in signed.items()}).outcome == (
        202,
        "accepted",
    )
    body = user_event(new_user(), now_ms())
    signed = sign(SECRET, body)
    signed["svix-signature"] = f"v1a,AAAA v1,{base64.b64encode(bytes(32)).decode()} {signed['svix-signature']}"
    assert client.post(body, signed).outcome == ACCEPTED


# What a forger or a slip may send: each is one thing wrong with a good delivery of this body.
SPOILT: Final[dict[str, Callable[[bytes], Mapping[str, str]]]] = {
    "unsigned": lambda _: {},
    "another secret": lambda body: sign("whsec_" + base64.b64encode(b"x" * 24).decode(), body),
    "another body": lambda body: sign(SECRET, body + b" "),
    "another id": lambda body: sign(SECRET, body) | {"svix-id": "msg_another"},
    "stale": lambda body: sign(SECRET, body, timestamp=int(time.time()) - 301),
    "early": lambda body: sign(SECRET, body, timestamp=int(time.time()) + 330),
    "no signature": lambda body: {k: v for k, v in sign(SECRET, body).items() if k != "svix-signature"},
    "not base64": lambda body: sign(SECRET, body) | {"svix-signature": "v1,%%%"},
    "no comma": lambda body: sign(SECRET, body) | {"svix-signature": "v1"},
    "not a time": lambda body: sign(SECRET, body, timestamp="nan"),
}


def inbox_ids(system: System) -> set[str]:
    with system.connect() as connection:
        return {svix_id for (svix_id,) in connection.execute("select svix_id from clerk.webhook_events")}


def test_what_is_not_authentic_is_refused_and_leaves_nothing(system: System, client: Client) -> None:
    before = inbox_ids(system)
    body = user_event(new_user(), now_ms())
    answers = {name: client.post(body, spoil(body)) for name, spoil in SPOILT.items()}
    not_text = b'{"type": "user.updated", "data": "\xff"}'
    answers["not UTF-8"] = client.post(not_text, sign(SECRET, not_text))
    answers["empty"] = client.post(b"", {})
    assert {name: answer.status for name, answer in answers.items()} == dict.fromkeys(answers, 400)
    for answer in answers.values():
        assert answer.said.keys() == {"error"}
        assert CANARY.encode() not in answer.body
    assert inbox_ids(system) == before


def test_authentic_but_unusable_bodies_are_kept_as_dead(system: System, client: Client) -> None:
    for body in (b"", b"null", b"[]", b"{}", b'{"type": "user.updated"}', b"not JSON", b"\x00", b"[" * 100_000):
        answer = client.deliver(body)
        assert answer.outcome == DEAD, body[:20]
        event = system.event(answer.svix_id)
        assert event is not None
        assert event[0] == "dead"
        assert event[2]


def filled(size: int) -> bytes:
    """An event of exactly this many bytes."""
    user_id, version = new_user(), now_ms()
    short = len(user_event(user_id, version, {"fill": ""}))
    body = user_event(user_id, version, {"fill": "x" * (size - short)})
    assert len(body) == size
    return body


def test_body_of_a_mebibyte_is_taken_and_one_byte_more_is_too_large(system: System, client: Client) -> None:
    body = filled(MIB)
    assert client.deliver(body).outcome == ACCEPTED
    user_id = json.loads(body)["data"]["id"]
    until(lambda: system.rows(user_id))
    larger = client.deliver(filled(MIB + 1))
    assert larger.status == 413
    assert larger.said.keys() == {"error"}
    assert client.post(filled(MIB + 1), {}).status == 413
    assert client.deliver(user_event(new_user(), now_ms())).outcome == ACCEPTED, "the connection still serves"


def test_body_in_chunks_is_measured_too(system: System) -> None:
    def chunks(body: bytes) -> Iterator[bytes]:
        return (body[start : start + 100_000] for start in range(0, len(body), 100_000))

    for size, status in ((MIB, 202), (MIB + 1, 413), (3 * MIB, 413)):
        body = filled(size)
        with system.client() as client:
            assert client.post(chunks(body), sign(SECRET, body) | {"transfer-encoding": "chunked"}).status == status


def test_other_methods_and_paths_are_405_and_404(client: Client) -> None:
    for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = client.ask(method)
        assert (answer.status, answer.headers["allow"]) == (405, "POST"), method
    assert client.ask("POST", "/healthz").status == 405
    body = user_event(new_user(), now_ms())
    for path in ("/", "/webhooks", "/webhooks/clerk/more", "/webhooks//clerk", "/static/x", "/%00", "/%ff"):
        assert client.ask("POST", path, body, sign(SECRET, body)).status == 404, path


WAITS: Final = """
select exists (
  select from pg_stat_activity
  where datname = current_database() and application_name = 'clerk-sync worker' and wait_event_type = 'Lock'
)
"""


@contextlib.contextmanager
def batch_waiting_for(system: System, client: Client, user_id: str, body: bytes) -> Iterator[Answer]:
    """Deliver an event of a user whose row is held, so that the worker waits inside its transaction until the end."""
    client.deliver(user_event(user_id, now_ms(), {"n": 0}))
    until(lambda: system.rows(user_id))
    with psycopg.connect(system.database_url) as holder, system.connect() as watcher:
        holder.execute("select from clerk.users where user_id = %s for update", (user_id,))
        answer = client.deliver(body)
        until(lambda: (watcher.execute(WAITS).fetchone() or (False,))[0], what="the worker's wait")
        yield answer


def test_same_delivery_is_a_duplicate_while_it_waits_and_applied_again_afterwards(
    system: System, client: Client
) -> None:
    user_id = new_user()
    body = user_event(user_id, now_ms() + 1000, {"n": 1})
    with batch_waiting_for(system, client, user_id, body) as first:
        assert first.outcome == ACCEPTED
        assert client.deliver(body, first.svix_id).outcome == (200, "duplicate")
        with system.client() as another:
            assert another.deliver(body, first.svix_id).outcome == (200, "duplicate")
    until(lambda: system.event(first.svix_id) == ("done", 1, None, False))
    row = system.rows(user_id)
    assert client.deliver(body, first.svix_id).outcome == ACCEPTED
    until(lambda: system.event(first.svix_id) == ("done", 1, None, False))
    assert system.rows(user_id) == row
    dead = client.deliver(b"{}")
    assert client.deliver(b"{}", dead.svix_id).outcome == DEAD


def test_two_hundred_connections_that_say_nothing_hold_up_no_delivery(system: System) -> None:
    url = urlsplit(system.url)
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection((str(url.hostname), url.port or 80), timeout=10))
        for _ in range(5):
            with system.client() as client:
                started = time.monotonic()
                assert client.deliver(user_event(new_user(), now_ms())).status == 202
                assert time.monotonic() - started < 3


POST: Final = b"POST /webhooks/clerk HTTP/1.1\r\nHost: here\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (CANARY.encode() + b"\r\n\r\n", 400),
        (POST + CANARY.encode() + b"\r\n\r\n", 400),
        (POST + b"X-Odd: \x00" + CANARY.encode() + b"\r\n\r\n", 400),
        (POST + b"Content-Length: " + CANARY.encode() + b"\r\n\r\n", 400),
        (POST + b"Content-Length: 1000\r\n\r\n" + CANARY.encode(), 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n" + CANARY.encode() + b"\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab", 400),
        (POST + b"X-Long: " + CANARY.encode() * 3000 + b"\r\n\r\n", 431),
    ],
    ids=["no HTTP", "no header", "NUL", "length", "cut short", "no chunk", "cut chunk", "long header"],
)
def test_what_is_not_http_is_refused_without_a_trace_of_it_or_its_sender(
    system: System, request_bytes: bytes, status: int
) -> None:
    url = urlsplit(system.url)
    before = len(system.output)
    with socket.create_connection((str(url.hostname), url.port or 80), timeout=10) as connection:
        connection.sendall(request_bytes)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(4096)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    until(lambda: "refused" in system.output[before:], what="a line about it")
    assert CANARY not in system.output[before:]
    assert "127.0.0.1" not in system.output[before:]
