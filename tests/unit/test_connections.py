"""One process's connections, with limits short enough to watch: an event loop in a thread, and a tiny application."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import pytest

from tests.waiting import until
from webhooks.connections import LARGEST_BODY, MOST_PIPELINED, Application, Connection, Connections, Limits

POST: Final = b"POST / HTTP/1.1\r\nHost: here\r\n"
WHOLE: Final = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 3\r\n\r\nabc"
HALF: Final = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 3\r\n\r\nab"
LONG: Final = Limits(request_seconds=60, idle_seconds=60, answer_seconds=60, linger_seconds=60)


class Door:
    """Connections in an event loop of their own."""

    def __init__(self, limits: Limits, application: Application | None = None, threads: int = 2) -> None:
        self.taken: list[dict[str, Any]] = []
        self.go = threading.Event()
        self.go.set()
        self._limits = limits
        self._application = application or self._answer
        self._number = threads
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self._listener.getsockname()[1]
        self._listening = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._clients: list[socket.socket] = []

    def start(self) -> None:
        self._thread.start()
        assert self._listening.wait(10)

    def stop(self) -> None:
        self._stop.set()

    def held(self) -> int:
        return self.connections._held

    def join(self) -> None:
        for client in self._clients:
            client.close()
        self.go.set()
        self._stop.set()
        self._thread.join(10)
        self._listener.close()
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        connections = self.connections = Connections(self._application, self._number, self._limits)
        connections.listen([self._listener])
        self._listening.set()
        while not self._stop.is_set():
            connections.sweep()
            await asyncio.sleep(0.01)
        connections.stop()
        while not connections.finished:
            connections.sweep()
            await asyncio.sleep(0.01)
        connections.close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        self.taken.append(environ)
        self.go.wait(10)
        if environ["PATH_INFO"] == "/fail":
            raise ValueError("nobody thought of it")
        if environ["PATH_INFO"] == "/exit":
            sys.exit("the thread")
        body = environ["wsgi.input"].read() + b"." * int(environ["QUERY_STRING"] or 0)
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    def connect(self, data: bytes = b"") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        self._clients.append(client)
        client.sendall(data)
        return client


@pytest.fixture
def door() -> Iterator[Callable[..., Door]]:
    made: list[Door] = []

    def make(limits: Limits = LONG) -> Door:
        made.append(Door(limits))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.join()


def rest(client: socket.socket) -> bytes:
    """All that comes until the connection ends."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65536):
            found += piece
    return found


def status(client: socket.socket) -> int:
    """The status of the answer that comes now."""
    return int(client.recv(65536).split(b" ", 2)[1])


SHORT: Final = Limits(request_seconds=0.3, idle_seconds=0.3, answer_seconds=0.3, linger_seconds=0.3)


@pytest.mark.parametrize("half", [b"P", POST, HALF, POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"])
def test_half_a_request_is_answered_408_when_its_time_is_up_and_takes_no_thread(
    door: Callable[..., Door], half: bytes
) -> None:
    opened = door(SHORT)
    clients = [opened.connect(half) for _ in range(20)]
    assert status(opened.connect(WHOLE)) == 200
    assert all(rest(client).startswith(b"HTTP/1.1 408 ") for client in clients)
    assert len(opened.taken) == 1


def test_bytes_that_trickle_in_do_not_put_the_deadline_off(door: Callable[..., Door]) -> None:
    opened = door(SHORT)
    client = opened.connect(POST + b"Content-Length: 1000\r\n\r\n")
    client.settimeout(0.02)
    started, answer = time.monotonic(), b""
    while not answer and time.monotonic() - started < 10:
        client.send(b"a")
        with contextlib.suppress(TimeoutError):
            answer = client.recv(1000)
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_connection_that_says_nothing_is_ended_before_and_after_a_request(door: Callable[..., Door]) -> None:
    opened = door(SHORT)
    assert rest(opened.connect()) == b""
    assert rest(opened.connect(b"\r\n" * 100)) == b""
    served = opened.connect(WHOLE)
    assert rest(served).endswith(b"abc")


def test_client_that_does_not_take_its_answer_is_cut(door: Callable[..., Door]) -> None:
    opened = door(SHORT)
    client = opened.connect(b"GET /?30000000 HTTP/1.1\r\nHost: here\r\n\r\n")
    until(lambda: opened.taken)
    started = time.monotonic()
    until(lambda: refused(client), what="the cut")
    assert time.monotonic() - started < 5


def refused(client: socket.socket) -> bool:
    """Whether what is sent gets nowhere, since the other side is gone."""
    try:
        client.send(b"x")
    except (ConnectionResetError, BrokenPipeError):
        return True
    return False


def test_when_memory_is_full_the_request_that_has_taken_longest_goes_and_new_ones_are_served(
    door: Callable[..., Door],
) -> None:
    opened = door(Limits(held_bytes=3 * LARGEST_BODY, linger_seconds=60))
    big = POST + b"Content-Length: %d\r\n\r\n" % LARGEST_BODY + b"x" * (LARGEST_BODY - 1)
    clients = []
    for _ in range(8):
        with contextlib.suppress(ConnectionError):
            clients.append(opened.connect(big))
        assert status(opened.connect(WHOLE)) == 200
    newest = clients[-1]
    newest.sendall(b"x")
    assert status(newest) == 200
    gone = [client for client in clients[:-1] if ended(client)]
    assert 5 <= len(gone) <= 6


def ended(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        client.recv(65536)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


def test_when_there_are_too_many_connections_the_one_that_was_silent_longest_goes(door: Callable[..., Door]) -> None:
    opened = door(Limits(connections=10))
    silent = [opened.connect() for _ in range(30)]
    assert status(opened.connect(WHOLE)) == 200
    assert not any(rest(client) for client in silent[:20])


def test_more_whole_requests_than_can_wait_are_answered_503(door: Callable[..., Door]) -> None:
    opened = door(Limits(waiting=2, linger_seconds=60))
    opened.go.clear()
    first = [opened.connect(WHOLE) for _ in range(2)]
    until(lambda: len(opened.connections._by_state["answering"]) == 2)
    third = opened.connect(WHOLE)
    answer = third.recv(65536)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nRetry-After: " in answer
    # Health and metrics don't wait for deliveries.
    other = opened.connect(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    until(lambda: [one for one in opened.taken if one["REQUEST_METHOD"] == "GET"])
    opened.go.set()
    assert [status(client) for client in (*first, other)] == [200, 200, 200]


def test_pipelined_requests_are_answered_in_order_and_only_so_many_are_read_ahead(door: Callable[..., Door]) -> None:
    opened = door()
    several = b"".join(b"GET /%d HTTP/1.1\r\nHost: here\r\n\r\n" % number for number in range(30))
    answers = rest(opened.connect(several))
    assert answers.count(b"HTTP/1.1 200 OK") == MOST_PIPELINED + 1
    assert answers.count(b"Connection: close") == 1
    assert [one["PATH_INFO"] for one in opened.taken] == [f"/{number}" for number in range(MOST_PIPELINED + 1)]


def test_deliveries_that_wait_are_taken_together_and_what_is_known_at_once_waits_for_none_of_them() -> None:
    taken: list[str] = []
    committed, freed = threading.Event(), threading.Event()

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        taken.append(path := environ["PATH_INFO"])
        if path == "/first":
            freed.wait(10)
        if path in {"/first", "/known"}:
            start_response("200 OK", [("Content-Length", "0")])
            return []
        return promised(start_response)

    def promised(start_response: Callable[..., Any]) -> Iterator[bytes]:
        committed.wait(10)
        start_response("202 Accepted", [("Content-Length", "0")])
        yield b""

    opened = Door(LONG, application, threads=1)
    opened.start()
    try:
        post = b"POST /%s HTTP/1.1\r\nHost: here\r\nContent-Length: 0\r\n\r\n"
        first = opened.connect(post % b"first")
        until(lambda: taken)
        later = [opened.connect(post % path) for path in (b"promised", b"known", b"promised")]
        until(lambda: len(opened.connections._by_state["answering"]) == 4)
        freed.set()
        assert status(first) == 200
        assert status(later[1]) == 200
        assert sorted(taken) == ["/first", "/known", "/promised", "/promised"], "each was called before one was read"
        committed.set()
        assert [status(later[0]), status(later[2])] == [202, 202]
    finally:
        freed.set()
        committed.set()
        opened.join()


def test_what_follows_a_whole_request_is_refused_after_its_answer(door: Callable[..., Door]) -> None:
    opened = door()
    client = opened.connect(WHOLE + b"\x16\x03\x01 nonsense\r\n\r\n")
    client.shutdown(socket.SHUT_WR)
    answers = rest(client)
    assert answers.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 400 " in answers


def test_what_comes_while_a_request_is_answered_is_answered_after_it(door: Callable[..., Door]) -> None:
    opened = door()
    opened.go.clear()
    client = opened.connect(WHOLE)
    until(lambda: opened.taken)
    held = opened.held()
    client.sendall(WHOLE.replace(b"abc", b"def") + HALF)
    until(lambda: opened.held() > held)
    client.sendall(b"x" * 1000)  # isn't read until then
    opened.go.set()
    found = b""
    while b"abc" not in found or b"def" not in found:  # what comes after them may come along
        found += client.recv(65536) or pytest.fail("the connection ended")
    assert found.index(b"abc") < found.index(b"def")


def test_request_that_begins_behind_another_one_is_read_on(door: Callable[..., Door]) -> None:
    client = door().connect(WHOLE + HALF)
    assert client.recv(65536).endswith(b"abc")
    client.sendall(b"c")
    assert client.recv(65536).endswith(b"abc")


def test_application_that_fails_is_a_503_and_its_text_stays_inside(
    door: Callable[..., Door], caplog: pytest.LogCaptureFixture
) -> None:
    answer = rest(door().connect(b"POST /fail HTTP/1.0\r\nContent-Length: 0\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"nobody thought" not in answer


def test_application_that_ends_its_thread_is_a_503_for_all_that_it_had_and_the_thread_goes_on(
    door: Callable[..., Door],
) -> None:
    opened = door()
    for _ in range(5):  # more than there are threads
        answer = rest(opened.connect(b"POST /exit HTTP/1.0\r\nContent-Length: 0\r\n\r\n"))
        assert answer.startswith(b"HTTP/1.1 503 ")
    assert opened.connect(WHOLE).recv(65536).endswith(b"abc")


def test_stop_ends_idle_connections_and_half_requests_and_sends_answers_that_are_under_way(
    door: Callable[..., Door],
) -> None:
    opened = door(Limits(linger_seconds=0.3))
    opened.go.clear()
    served, idle, half = opened.connect(WHOLE), opened.connect(), opened.connect(HALF)
    until(lambda: opened.taken)
    opened.stop()
    assert rest(idle) == b""
    assert rest(half).startswith(b"HTTP/1.1 503 ")
    opened.go.set()
    answer = rest(served)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"\r\nConnection: close\r\n" in answer


def test_the_application_sees_the_request_and_not_who_sent_it(door: Callable[..., Door]) -> None:
    opened = door()
    request = b"POST http://there/a%20b?7 HTTP/1.1\r\nHost: here\r\nX-A: 1\r\nx-a: 2\r\nX_A: 3\r\nSvix-Id: m\r\n"
    client = opened.connect(
        request + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\nX-Trailer: 1\r\n\r\n"
    )
    assert client.recv(65536).endswith(b"\r\n\r\nabc.......")
    (seen,) = opened.taken
    assert (seen["PATH_INFO"], seen["QUERY_STRING"], seen["CONTENT_LENGTH"]) == ("/a b", "7", "3")
    assert (seen["HTTP_X_A"], seen["HTTP_SVIX_ID"], seen["HTTP_HOST"]) == ("1,2", "m", "here")
    assert not {"REMOTE_ADDR", "HTTP_TRANSFER_ENCODING", "HTTP_X_TRAILER"} & seen.keys()


def here(_environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Length", "0")])
    return []


def test_client_that_hangs_up_just_when_its_time_is_up_ends_nothing_but_itself() -> None:
    async def serve() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            connections = Connections(here, 1, Limits(request_seconds=0))
            connections.listen([listener])
            client = socket.create_connection(listener.getsockname())
            client.sendall(HALF)
            while not connections._by_state["reading"]:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0)
            # The loop doesn't know yet; the answer to it is a reset, and that at once.
            client.close()
            connections.sweep()
            connections.stop()
            while not connections.finished:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0)
            connections.close()

    asyncio.run(asyncio.wait_for(serve(), 10))


def test_header_without_an_end_is_counted_and_refused_early(door: Callable[..., Door]) -> None:
    opened = door()
    endless = b"GET / HTTP/1.1\r\nX-A: "
    client = opened.connect(endless)
    until(lambda: opened.held() > 0)
    client.sendall(b"b" * 300_000)
    until(lambda: opened.held() > 300_000)
    with contextlib.suppress(ConnectionError):
        client.sendall(b"b" * 300_000)
    assert rest(client).startswith(b"HTTP/1.1 431 ")


def test_what_the_parser_keeps_behind_a_whole_request_is_counted(door: Callable[..., Door]) -> None:
    opened = door()
    client = opened.connect(WHOLE + b"GET / HTTP/1.1\r\nX-A: " + b"b" * 30_000)
    assert client.recv(65536).endswith(b"abc")
    until(lambda: opened.connections._by_state["reading"])
    assert opened.held() > 30_000
    client.sendall(b"\r\n\r\n")
    assert status(client) == 200
    until(lambda: opened.held() == 0)


def test_connection_that_is_over_keeps_nothing_of_what_it_read(door: Callable[..., Door]) -> None:
    opened = door()
    gc.disable()
    try:
        client = opened.connect(b"GET / HTTP/1.1\r\nX-A: " + b"b" * 30_000)
        until(lambda: opened.held() > 30_000)
        parsers = [one for one in gc.get_objects() if type(one) is Connection and one._held > 30_000]
        kept = weakref.ref(parsers.pop())
        client.close()
        until(lambda: kept() is None)
    finally:
        gc.enable()


def answered_by(door: Door, requests: int) -> bool:
    """Whether so many requests are whole, and the two threads have one each."""
    return len(door.connections._by_state["answering"]) == requests and len(door.taken) == min(requests, 2)


def test_request_that_waited_too_long_for_a_thread_is_answered_503_and_not_taken(door: Callable[..., Door]) -> None:
    opened = door(Limits(waiting_seconds=0.2))
    opened.go.clear()
    clients = []
    for number in range(1, 5):
        clients.append(opened.connect(WHOLE))
        until(functools.partial(answered_by, opened, number), what="a thread for each of the first two")
    whole = time.monotonic()
    until(lambda: time.monotonic() - whole > 0.2)
    opened.go.set()
    assert sorted(status(client) for client in clients) == [200, 200, 503, 503]
    assert len(opened.taken) == 2


def test_whoever_connects_after_the_stop_is_told_at_once(door: Callable[..., Door]) -> None:
    opened = door()
    opened.go.clear()
    served = opened.connect(WHOLE)
    until(lambda: opened.taken)
    opened.stop()
    until(lambda: opened.connections.stopping)
    with pytest.raises(ConnectionRefusedError):
        opened.connect()
    opened.go.set()
    assert status(served) == 200


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"foo, chunked", b"gzip\r\nTransfer-Encoding: chunked"])
def test_any_coding_but_chunked_is_refused_before_the_application(door: Callable[..., Door], coding: bytes) -> None:
    opened = door()
    client = opened.connect(POST + b"Transfer-Encoding: " + coding + b"\r\n\r\n0\r\n\r\n")
    assert client.recv(65536).startswith(b"HTTP/1.1 400 ")
    assert not opened.taken


def test_whether_we_live_is_answered_while_readiness_and_metrics_wait(door: Callable[..., Door]) -> None:
    made = door()
    made.go.clear()
    for _ in range(4):
        made.connect(b"GET /readyz HTTP/1.1\r\nHost: here\r\n\r\n")
    until(lambda: len(made.taken) == 2, what="readiness to be asked for")
    made.connect(b"GET /healthz HTTP/1.1\r\nHost: here\r\n\r\n")
    until(lambda: len(made.taken) == 3, what="a thread for it")
    assert made.taken[-1]["PATH_INFO"] == "/healthz"


def test_the_status_page_and_its_form_have_one_thread_of_their_own(door: Callable[..., Door]) -> None:
    made = door()
    made.go.clear()
    made.connect(b"GET /status HTTP/1.1\r\nHost: here\r\n\r\n")
    until(lambda: len(made.taken) == 1, what="the page to be asked for")
    for target in (b"/status/retry", b"/status/retry?all", b"/status"):
        made.connect(b"POST " + target + b" HTTP/1.1\r\nHost: here\r\nContent-Length: 0\r\n\r\n")
    # All that others do, deliveries too, goes on.
    for request in (WHOLE, WHOLE, b"GET /readyz HTTP/1.1\r\nHost: here\r\n\r\n"):
        made.connect(request)
    until(lambda: len(made.taken) == 4, what="threads for the others")
    assert [one["PATH_INFO"] for one in made.taken[:1]] == ["/status"]
    assert sorted(one["PATH_INFO"] for one in made.taken[1:]) == ["/", "/", "/readyz"]


def test_there_are_no_more_connections_than_open_files_and_some_are_spared() -> None:
    asked = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (200, %d)); from webhooks import process; "
    asked += "print(process.make_room(4000), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    made = [
        subprocess.run((sys.executable, "-c", asked % hard), capture_output=True, text=True, check=True).stdout.split()
        for hard in (300, 1024)
    ]
    assert made == [["200", "300"], ["924", "1024"]]
