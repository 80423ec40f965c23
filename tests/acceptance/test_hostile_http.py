"""What anybody may send to the web process: it never stops acknowledgements, and never gets a 5xx but 503."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest

from tests.acceptance.system import PROGRAMS, System, children, new_user, now_ms, user_event
from tests.clerk import SECRET, sign
from tests.waiting import until

MIB: Final = 1024 * 1024
POST: Final = b"POST /webhooks/clerk HTTP/1.1\r\nHost: here\r\n"
CHUNKED: Final = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def connect(system: System, data: bytes = b"") -> socket.socket:
    url = urlsplit(system.url)
    client = socket.create_connection((str(url.hostname), url.port or 80), timeout=15)
    # Whoever is refused while still sending may find the connection cut.
    with contextlib.suppress(ConnectionError):
        client.sendall(data)
    return client


def answer_to(system: System, data: bytes, *, hang_up: bool = True) -> bytes:
    """All that comes back."""
    found = b""
    with connect(system, data) as client, contextlib.suppress(ConnectionError):
        if hang_up:
            client.shutdown(socket.SHUT_WR)
        while piece := client.recv(65536):
            found += piece
    return found


ATTACKS: Final = {
    "idle": b"",
    "half of the headers": POST + b"X-A: b",
    "half of a body": POST + b"Content-Length: 5000\r\n\r\nabc",
    "half of a chunk": CHUNKED + b"5\r\nab",
}


@pytest.mark.parametrize("attack", [*ATTACKS, "all"])
def test_two_hundred_half_requests_hold_up_no_delivery(system: System, attack: str) -> None:
    kinds = list(ATTACKS.values()) if attack == "all" else [ATTACKS[attack]]
    with contextlib.ExitStack() as stack:
        attackers = [stack.enter_context(connect(system, kind)) for kind in kinds for _ in range(200)]
        taken = []
        for _ in range(20):
            for attacker in attackers[::10]:
                attacker.send(b"a")
            with system.client() as client:
                started = time.monotonic()
                assert client.deliver(user_event(new_user(), now_ms())).status == 202
                taken.append(time.monotonic() - started)
    # One slow answer may be a busy machine's; were connections in the way, all would be slow.
    assert statistics.median(taken) < 1, taken


# Half of a request counts as refused only where the rest can't come: those that hang up.
HOSTILE: Final[dict[str, tuple[bytes, set[int]]]] = {
    "many headers": (POST + b"X-A: b\r\n" * 10_000 + b"\r\n", {431}),
    "a giant header": (POST + b"X-A: " + b"b" * MIB + b"\r\n\r\n", {431}),
    "a giant request line": (b"GET /" + b"a" * MIB + b" HTTP/1.1\r\nHost: here\r\n\r\n", {431}),
    "giant trailers": (CHUNKED + b"0\r\nX-A: " + b"b" * MIB + b"\r\n\r\n", {431}),
    "an endless extension of a chunk": (CHUNKED + b"5;" + b"a" * 3 * MIB, {400, 413}),
    "chunks over a mebibyte": (CHUNKED + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 17 + b"0\r\n\r\n", {413}),
    "a chunk without a size": (CHUNKED + b"\r\nabc\r\n0\r\n\r\n", {400}),
    "a chunk with a negative size": (CHUNKED + b"-5\r\nabc\r\n0\r\n\r\n", {400}),
    "a chunk with a huge size": (CHUNKED + b"f" * 40 + b"\r\nabc", {400}),
    "a negative length": (POST + b"Content-Length: -1\r\n\r\n", {400}),
    "a huge length": (POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", {400, 413}),
    "a length over a mebibyte": (POST + b"Content-Length: 1048577\r\n\r\n", {413}),
    "a length that isn't one": (POST + b"Content-Length: 5a\r\n\r\nabcde", {400}),
    "two lengths": (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", {400}),
    "a length and chunks": (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", {400}),
    "an unknown transfer encoding": (POST + b"Transfer-Encoding: gzip\r\n\r\n", {400}),
    "an unknown one before chunks": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", {400}),
    "an unheard-of one before chunks": (POST + b"Transfer-Encoding: foo, chunked\r\n\r\n0\r\n\r\n", {400}),
    "chunks before an unknown one": (POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", {400}),
    "HTTP/0.9": (b"GET /\r\n\r\n", {400}),
    "HTTP/3.0": (b"GET / HTTP/3.0\r\n\r\n", {400}),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", {400}),
    "a hello in TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), {400}),
    "null bytes": (bytes(1000), {400}),
    "a null byte in the path": (b"GET /\x00 HTTP/1.1\r\nHost: here\r\n\r\n", {400}),
    "a null byte in a header": (POST + b"X-A: \x00\r\n\r\n", {400}),
    "a folded header": (POST + b"X-A: b\r\n  c\r\nContent-Length: 0\r\n\r\n", {400}),
    "a header without a name": (POST + b": b\r\n\r\n", {400}),
    "an upgrade": (b"GET / HTTP/1.1\r\nHost: here\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", {400}),
    "a tunnel": (b"CONNECT here:443 HTTP/1.1\r\nHost: here\r\n\r\n", {400}),
    "another method": (b"BREW / HTTP/1.1\r\nHost: here\r\n\r\n", {400}),
    "an asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: here\r\n\r\n", {404}),
    "an odd host": (b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", {400, 404}),
    "another server's address": (b"GET http://[::1/%ff%00 HTTP/1.1\r\nHost: here\r\n\r\n", {400, 404}),
    "a body that is cut short": (POST + b"Content-Length: 10\r\n\r\nabc", {400}),
    "bytes that are no text": (POST + b"Svix-Id: \xff\xfe\r\nContent-Length: 0\r\n\r\n", {400}),
}


@pytest.fixture(autouse=True)
def web_processes_live(system: System) -> Iterator[None]:
    """No test here ends a process."""
    before = children(system.pids["web"])
    yield
    assert set(before) <= set(children(system.pids["web"]))
    with system.client() as client:
        assert client.deliver(user_event(new_user(), now_ms())).status == 202


@pytest.mark.parametrize("name", HOSTILE)
def test_odd_request_is_refused_and_its_connection_ended(system: System, name: str) -> None:
    data, expected = HOSTILE[name]
    answer = answer_to(system, data)
    statuses = {int(line.split()[1]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")}
    assert statuses <= expected
    assert statuses, "no answer"


def signed(body: bytes, extra: bytes = b"") -> bytes:
    headers = b"".join(f"{name}: {value}\r\n".encode() for name, value in sign(SECRET, body).items())
    return POST + headers + extra + b"Content-Length: %d\r\n\r\n" % len(body)


def test_sender_that_waits_for_100_is_told_to_continue_unless_the_body_is_too_large(system: System) -> None:
    body = user_event(new_user(), now_ms())
    with connect(system, signed(body, b"Expect: 100-continue\r\n")) as client:
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert client.recv(1000).startswith(b"HTTP/1.1 202 ")
    with connect(system, POST + b"Expect: 100-continue\r\nContent-Length: 1048577\r\n\r\n") as client:
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_pipelined_deliveries_are_each_answered(system: System) -> None:
    bodies = [user_event(new_user(), now_ms()) for _ in range(5)]
    answers = answer_to(system, b"".join(signed(body) + body for body in bodies))
    assert answers.count(b"HTTP/1.1 202 ") == 5


def test_client_that_hangs_up_early_loses_nothing_that_was_sent_whole(system: System) -> None:
    user_id = new_user()
    body = user_event(user_id, now_ms())
    for half in (signed(body)[:100], signed(body), signed(body) + body[:-1]):
        connect(system, half).close()
    connect(system, signed(body) + body).close()
    until(lambda: system.rows(user_id))


SETTINGS: Final = """
import os, sys, webhooks.server
print(os.environ["PROMETHEUS_MULTIPROC_DIR"], flush=True)
sys.stdin.read()
"""


def test_folder_for_metrics_of_a_start_that_was_killed_is_cleared_away_by_the_next_one(
    system: System, tmp_path: Path
) -> None:
    env = {**os.environ, "DATABASE_URL": system.database_url, "REDIS_URL": system.redis_url, "TMPDIR": str(tmp_path)}
    env |= {"CLERK_WEBHOOK_SIGNING_SECRET": SECRET, "WEB_CONCURRENCY": "1", "PROMETHEUS_MULTIPROC_DIR": ""}

    def start() -> tuple[subprocess.Popen[str], Path]:
        pipe = subprocess.PIPE
        process = subprocess.Popen((sys.executable, "-c", SETTINGS), env=env, stdin=pipe, stdout=pipe, text=True)
        assert process.stdout
        return process, Path(process.stdout.readline().strip())

    def folders() -> set[Path]:
        return set(tmp_path.glob("clerk-sync-metrics-*"))

    (killed, left), (running, kept) = start(), start()
    command = (str(PROGRAMS / "gunicorn"), "--config", "python:webhooks.server", "webhooks.main:app")
    with killed, running:
        assert folders() == {left, kept}, "the first one runs"
        killed.kill()
        killed.wait()
        with subprocess.Popen((*command, "--bind", "127.0.0.1:0"), env=env, cwd=tmp_path) as third:
            until(lambda: children(third.pid), 30, "its child")
            assert list(tmp_path.glob("*/counter_*.db")), "the processes count together"
            assert not left.exists()
            assert kept.exists()
            third.terminate()
        assert third.returncode == 0
        assert folders() == {kept}
        running.kill()
