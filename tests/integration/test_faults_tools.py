"""What the faults' tools do wrong is what they say, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clerk import SECRET, sign
from tests.faults.proxy import Proxy
from tests.waiting import until

HOST = "127.0.0.1"
SILENCE_SECONDS = 0.05
"""A hundred times what an echo takes."""
CLOCK = Path(__file__).parents[1] / "faults" / "clock"


class Echo:
    """A server that sends back what it hears, and tells what that was. While `deaf` it reads nothing."""

    def __init__(self) -> None:
        self.heard = b""
        self.open = 0
        self.deaf = False
        self._server = socket.create_server((HOST, 0), backlog=512)
        self.port: int = self._server.getsockname()[1]
        self._here: set[socket.socket] = set()
        self._running = True
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while self._running:
            for each in select.select([self._server, *self._here], [], [], 0.01)[0]:
                if each is self._server:
                    self._here.add(each.accept()[0])
                elif not self.deaf:
                    self._answer(each)
            self.open = len(self._here)

    def _answer(self, each: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = each.recv(1 << 16)
            each.sendall(data)
        self.heard += data
        if not data:
            self._here.remove(each)
            each.close()

    def close(self) -> None:
        """Away. Harmless a second time."""
        self._running = False
        self._thread.join()
        for each in (self._server, *self._here):
            each.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(HOST, 0, HOST, echo.port) as started:
        yield started


@pytest.fixture
def client(proxy: Proxy) -> Iterator[Callable[[], socket.socket]]:
    """Connects."""
    with contextlib.ExitStack() as opened:
        yield lambda: opened.enter_context(socket.create_connection((HOST, proxy.port), timeout=10))


def answers(each: socket.socket, said: bytes = b"hello") -> bool:
    each.sendall(said)
    return receive(each, len(said)) == said


def receive(each: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (data := each.recv(size - len(found))):
        found += data
    return found


def silent(each: socket.socket) -> bool:
    """Neither answer, nor end, nor reset."""
    return not select.select([each], [], [], SILENCE_SECONDS)[0]


def reset(each: socket.socket) -> bool:
    with pytest.raises(ConnectionResetError):
        each.recv(1)
    return True


def test_without_a_fault_all_bytes_pass_unchanged_and_are_counted(
    proxy: Proxy, client: Callable[[], socket.socket]
) -> None:
    one = client()
    assert answers(one)
    for link in proxy._links:  # so that only a part of a chunk can be sent at once
        link.up.source.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
    said = os.urandom(3_000_000)
    sender = threading.Thread(target=one.sendall, args=(said,))
    sender.start()
    assert receive(one, len(said)) == said
    sender.join()
    until(lambda: proxy.bytes == 2 * len(b"hello" + said))  # counted after they were sent
    assert proxy.connections == 1


def test_an_end_is_passed_on_after_what_came_before_it(
    proxy: Proxy, echo: Echo, client: Callable[[], socket.socket]
) -> None:
    one = client()
    with proxy.delay(0.05):
        one.sendall(b"last words")
        one.shutdown(socket.SHUT_WR)
        assert receive(one, 100) == b"last words"
    until(lambda: proxy.connections == 0 and echo.open == 0)


def test_two_hundred_connections_at_once(proxy: Proxy, client: Callable[[], socket.socket]) -> None:
    all_of_them = [client() for _ in range(200)]
    for number, one in enumerate(all_of_them):
        one.sendall(b"%3d" % number)
    assert [int(receive(one, 3)) for one in all_of_them] == list(range(200))
    assert proxy.connections == 200


def test_a_cut_resets_both_ends_of_present_connections_once(
    proxy: Proxy, echo: Echo, client: Callable[[], socket.socket]
) -> None:
    old, unused = client(), client()
    assert answers(old)
    proxy.cut()
    assert reset(old)
    assert reset(unused)
    until(lambda: echo.open == 0)
    assert answers(client())


def test_refusing_resets_connections_and_refuses_new_ones_on_a_port_that_nobody_else_gets(
    proxy: Proxy, client: Callable[[], socket.socket]
) -> None:
    old = client()
    assert answers(old)
    with proxy.refuse():
        assert reset(old)
        with pytest.raises(ConnectionRefusedError):
            client()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((HOST, proxy.port))
    assert answers(client())


def test_what_is_muted_hears_nothing_and_is_silent_for_ever(
    proxy: Proxy, echo: Echo, client: Callable[[], socket.socket]
) -> None:
    old = client()
    assert answers(old)
    with proxy.mute():
        new = client()
        for one in (old, new):
            one.sendall(b"lost")
            assert silent(one)
    assert answers(client())
    for one in (old, new):
        one.sendall(b"lost")
        assert silent(one)
    assert echo.heard == b"hello" * 2


def test_what_is_held_back_flows_on_afterwards(proxy: Proxy, echo: Echo, client: Callable[[], socket.socket]) -> None:
    old = client()
    assert answers(old)
    with proxy.mute(lose=False):
        new = client()
        for one in (old, new):
            one.sendall(b"later")
            assert silent(one)
        assert echo.heard == b"hello"
    assert receive(old, 5) == receive(new, 5) == b"later"
    assert answers(old)
    assert answers(new)


def test_half_open_connections_are_never_closed_and_a_server_is_not_told_that_its_client_left(
    proxy: Proxy, echo: Echo, client: Callable[[], socket.socket]
) -> None:
    stays, leaves = client(), client()
    assert answers(stays)
    assert answers(leaves)
    proxy.half_open()
    stays.sendall(b"lost")
    leaves.close()
    until(lambda: proxy.connections == 1)
    assert answers(client())
    assert silent(stays)
    assert echo.open == 3
    proxy.heal()
    assert silent(stays)
    assert echo.heard == b"hello" * 3
    proxy.cut()
    assert reset(stays)
    until(lambda: echo.open == 0)


def test_a_client_that_the_proxy_has_yet_to_accept_is_a_present_one(
    proxy: Proxy, client: Callable[[], socket.socket]
) -> None:
    opened: list[socket.socket] = []
    # Connects in the proxy's own thread, which has no time to accept before the next order.
    proxy._orders.put((lambda: opened.append(client()), threading.Event()))
    proxy.half_open()
    opened[0].sendall(b"lost")
    assert silent(opened[0])


def test_where_replies_are_lost_the_server_hears_everything_and_the_client_is_reset_in_the_end(
    proxy: Proxy, echo: Echo, client: Callable[[], socket.socket]
) -> None:
    old = client()
    assert answers(old)
    with proxy.lose_replies():
        new = client()
        for one in (old, new):
            one.sendall(b"commit")
        until(lambda: echo.heard == b"hello" + b"commit" * 2)
        assert silent(old)
        assert silent(new)
    assert reset(old)
    assert reset(new)
    assert answers(client())


def test_a_server_that_goes_after_a_lost_reply_does_not_show(
    proxy: Proxy, echo: Echo, client: Callable[[], socket.socket]
) -> None:
    one = client()
    assert answers(one)
    with proxy.lose_replies():
        echo.close()
        one.sendall(b"x" * 10)
        one.sendall(b"x" * 10)
        assert silent(one)
    assert reset(one)


def test_delayed_chunks_arrive_that_much_later_and_in_order(proxy: Proxy, client: Callable[[], socket.socket]) -> None:
    one = client()
    with proxy.delay(0.1):
        began = time.monotonic()
        for number in range(5):
            assert silent(one) or number
            one.sendall(b"%d" % number)
        assert receive(one, 1) == b"0"
        assert time.monotonic() - began >= 0.2  # there and back
    one.sendall(b"5")
    assert receive(one, 5) == b"12345"


def test_a_throttle_bounds_the_rate(proxy: Proxy, client: Callable[[], socket.socket]) -> None:
    one = client()
    with proxy.throttle(100_000):
        began = time.monotonic()
        assert answers(one, b"x" * 20_000)
        assert 0.2 <= time.monotonic() - began < 2
    assert answers(one)


def test_a_sender_is_held_up_where_the_other_side_does_not_read(
    proxy: Proxy, echo: Echo, client: Callable[[], socket.socket]
) -> None:
    one = client()
    assert answers(one)
    echo.deaf = True
    one.settimeout(0.3)
    with pytest.raises(TimeoutError):
        one.sendall(bytes(64_000_000))


def test_where_the_server_is_away_clients_are_reset(client: Callable[[], socket.socket], echo: Echo) -> None:
    echo.close()
    with pytest.raises(ConnectionResetError):
        client().recv(1)


def test_where_a_server_dies_with_a_reset_its_clients_are_reset() -> None:
    with socket.create_server((HOST, 0)) as server, Proxy(HOST, 0, *server.getsockname()) as proxy:
        with socket.create_connection((HOST, proxy.port), timeout=10) as one:
            accepted, _ = server.accept()
            one.sendall(b"unread")
            assert accepted.recv(1) == b"u"
            accepted.close()
            assert reset(one)
        until(lambda: proxy.connections == 0)


def test_abrupt_closes_in_every_state_leave_a_proxy_that_works(
    proxy: Proxy, echo: Echo, client: Callable[[], socket.socket]
) -> None:
    faults = [proxy.mute, lambda: proxy.mute(lose=False), proxy.lose_replies, lambda: proxy.delay(0.01), proxy.refuse]
    for fault in [*faults, proxy.half_open, proxy.cut]:
        crowd = [client() for _ in range(40)]
        for number, one in enumerate(crowd):
            one.sendall(b"x" * 50_000)
            if number % 2:
                one.close()  # with unread answers, which resets
        fault()
        for number, one in enumerate(crowd):
            if number % 4 == 0:
                one.close()
        proxy.heal()
    proxy.cut()
    until(lambda: proxy.connections == 0 and echo.open == 0)
    assert answers(client())


def test_faults_may_come_from_many_threads(proxy: Proxy, client: Callable[[], socket.socket]) -> None:
    def misbehave() -> None:
        for _ in range(50):
            with proxy.mute(), proxy.refuse(), proxy.lose_replies():
                proxy.cut()

    threads = [threading.Thread(target=misbehave) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert answers(client())


def test_after_a_stop_its_port_is_free(echo: Echo) -> None:
    with Proxy(HOST, 0, HOST, echo.port) as proxy, socket.create_connection((HOST, proxy.port), timeout=10) as one:
        assert answers(one)
        proxy.stop()
        assert reset(one)
    with Proxy(HOST, proxy.port, HOST, echo.port) as again, socket.create_connection((HOST, again.port)) as one:
        assert answers(one)


# --- The clock.

READ_ALL = """
import calendar, subprocess, time
import datetime as dt
from datetime import date, datetime
# The system's own program has the right time.
right = float(subprocess.run(["date", "+%s.%N"], capture_output=True, check=True).stdout)
print(*(each - right for each in (
    time.time(), time.time_ns() / 1e9,
    datetime.now().timestamp(), datetime.now(dt.UTC).timestamp(), dt.datetime.today().timestamp(),
    datetime.now(tz=dt.timezone(dt.timedelta(hours=5))).timestamp(), datetime.utcnow().timestamp(),
    time.mktime(time.localtime()), time.mktime(time.localtime(None)), calendar.timegm(time.gmtime()),
    float(time.strftime("%s")), time.mktime(time.strptime(time.ctime())), time.mktime(time.strptime(time.asctime())),
    datetime.combine(date.today(), datetime.now().time()).timestamp(),
)))
"""
STAYS_RIGHT = """
import time, datetime as dt
print(time.monotonic(), time.gmtime(0).tm_year, time.strftime("%Y", time.gmtime(0)), time.ctime(0)[-4:],
    dt.datetime.fromtimestamp(0, dt.UTC).year)
"""
SAME_TYPES = """
import datetime as dt, pickle
from datetime import date, datetime
import msgspec, psycopg
from psycopg.adapt import PyFormat, Transformer
class Own(datetime): pass
now = datetime.now(dt.UTC)
literal = datetime(2026, 1, 2, tzinfo=dt.UTC)
assert type(now) is type(literal) is datetime and type(date.today()) is date and type(Own.now()) is Own
assert isinstance(now, date) and not isinstance(date.today(), datetime)
assert pickle.loads(pickle.dumps(now)) == now
assert msgspec.convert(now, datetime) == now
assert psycopg.sql.Literal(now).as_string() == f"'{now}'::timestamptz", psycopg.sql.Literal(now).as_string()
assert Transformer().get_dumper(now, PyFormat.TEXT).dump(now) == str(now).encode()
assert Transformer().get_dumper(literal, PyFormat.TEXT).dump(literal) == str(literal).encode()
"""
VERIFY = """
import json, sys
from svix.webhooks import Webhook, WebhookVerificationError
try:
    Webhook(sys.argv[2]).verify(b"{}", json.loads(sys.argv[3]))
    print("taken")
except WebhookVerificationError as problem:
    print(problem)
"""


def run(program: str, *arguments: str, **environment: str) -> str:
    """What a Python program prints whose command line has the word `webhooks` in it."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, "webhooks", *arguments],
        env={"PATH": os.defpath, "PYTHONPATH": str(CLOCK), "TZ": "UTC"} | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize("off", [864_600.5, -864_600.5])
def test_every_wall_clock_is_off_in_a_process_that_is_meant(off: float) -> None:
    found = run(READ_ALL, CLOCK_OFF_SECONDS=str(off), CLOCK_OFF_IN="webhooks")
    assert [float(each) for each in found.split()] == pytest.approx([off] * 14, abs=3)


@pytest.mark.parametrize("environment", [{"CLOCK_OFF_SECONDS": "600", "CLOCK_OFF_IN": "celery"}, {}])
def test_the_clock_is_right_in_any_other_process(environment: dict[str, str]) -> None:
    found = run(READ_ALL, **environment)
    assert [float(each) for each in found.split()] == pytest.approx([0] * 14, abs=3)


def test_monotonic_time_and_times_that_are_given_stay_right() -> None:
    before = time.monotonic()
    monotonic, *years = run(STAYS_RIGHT, CLOCK_OFF_SECONDS="864000000").split()
    assert before < float(monotonic) < time.monotonic()
    assert years == ["1970"] * 4


def test_a_time_that_is_off_is_of_the_same_type_as_any_other() -> None:
    run(SAME_TYPES, CLOCK_OFF_SECONDS="600")


@pytest.mark.parametrize(("off", "said"), [("240", "taken"), ("600", "Message timestamp too old")])
def test_a_receiver_whose_clock_is_off_takes_what_was_signed_now_up_to_five_minutes(off: str, said: str) -> None:
    assert run(VERIFY, SECRET, json.dumps(sign(SECRET, b"{}")), CLOCK_OFF_SECONDS=off) == said


def test_another_sitecustomize_runs_too_with_the_clock_off_already(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time; print(time.time())")
    path = os.pathsep.join((str(CLOCK), str(tmp_path)))
    assert float(run("", CLOCK_OFF_SECONDS="600", PYTHONPATH=path)) == pytest.approx(time.time() + 600, abs=3)
