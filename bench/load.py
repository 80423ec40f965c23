"""The load generator, a process of its own: sends signed deliveries over kept connections, and notes every answer.

All requests are made and signed before the clock starts, so that hardly anything is left to do for each.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import hashlib
import hmac
import pickle
import select
import socket
import subprocess
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, cast

from bench.population import body, chosen, user_id

LARGEST_ANSWER: Final = 65_536
PATIENCE: Final = 2.0


@dataclass(frozen=True, slots=True)
class Order:
    """What to send: `count` events about as many of `users` users. Where there are fewer, nobody comes twice before all
    have had their turn."""

    port: int
    path: str
    secret: str = field(repr=False)
    users: int
    changing: float
    seed: int
    version: int
    count: int
    rate: float | None
    """Requests a second, whether or not the ones before were answered; None: as many as `connections` hold."""
    seconds: float
    """When to stop sending where there is no rate."""
    connections: int = 32
    patience: float = PATIENCE
    """With a rate, sending ends once a request waits for an answer or a connection for so long."""


@dataclass(slots=True)
class Sent:
    """What came of it: one place in the arrays for each request that was sent, in the order of sending."""

    numbers: array[int]
    versions: array[int]
    due: array[float]
    """Wall clock: when it was to be sent. Waiting for a connection counts as waiting for the answer."""
    answered: array[float]
    """Wall clock; 0 where no answer came."""
    status: array[int]
    gave_up: bool
    unsent: int
    """Requests that were due before the generator gave up, and weren't sent."""
    reconnects: int
    cpu_seconds: float
    """The generator's own, while it sent."""

    @property
    def accepted(self) -> list[int]:
        """The places of those that were answered with 202."""
        return [place for place, status in enumerate(self.status) if status == 202]


class Generator:
    """A running generator, for one order after another."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from bench.load import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        self._in = cast("BinaryIO", self._process.stdin)
        self._out = cast("BinaryIO", self._process.stdout)

    def send(self, order: Order, before: Callable[[], None] = lambda: None) -> Sent:
        """Prepare the requests, call `before`, and send; returns after the last answer."""
        pickle.dump(order, self._in)
        self._in.flush()
        self._read()
        before()
        self._in.write(GO)
        self._in.flush()
        return cast("Sent", self._read())

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._in.close()
        self._out.close()

    def _read(self) -> object:
        try:
            return pickle.load(self._out)  # noqa: S301 - from our own child
        except EOFError:
            raise RuntimeError("the load generator ended; what it said stands above") from None


GO: Final = b"go\n"


def main() -> None:
    """For each Order that comes: say that its requests are ready, wait for a line, send, and write what came of it."""
    gc.disable()  # nothing here makes circles
    with contextlib.suppress(EOFError):
        while True:
            order = pickle.load(sys.stdin.buffer)  # noqa: S301 - from our own parent
            prepared = prepare(order)
            _reply("ready")
            if sys.stdin.buffer.readline() == GO:
                _reply(Sender(order, prepared).run())


def _reply(found: object) -> None:
    pickle.dump(found, sys.stdout.buffer)
    sys.stdout.buffer.flush()


@dataclass(slots=True)
class Prepared:
    """Requests, whole, and the users and versions that they are about."""

    requests: list[bytes]
    numbers: array[int]
    versions: array[int]


def prepare(order: Order) -> Prepared:
    """Make and sign an order's requests."""
    key = base64.b64decode(order.secret.removeprefix("whsec_"))
    now = int(time.time())
    made = Prepared([], array("q"), array("q"))
    picked = chosen(order.seed, order.users, order.count, order.changing)
    for place, (number, turn) in enumerate(picked):
        # A user who comes again has a newer version.
        version = order.version + place // order.users
        made.requests.append(request(order.path, key, f"msg_{version}_{number}", now, body(number, version, turn)))
        made.numbers.append(number)
        made.versions.append(version)
    return made


def request(path: str, key: bytes, svix_id: str, timestamp: int, content: bytes) -> bytes:
    """One delivery as Svix sends it. https://docs.svix.com/receiving/verifying-payloads/how-manual"""
    signed = hmac.new(key, b"%s.%d.%s" % (svix_id.encode(), timestamp, content), hashlib.sha256)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: Svix-Webhooks/1.62.0\r\nAccept: */*\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nsvix-id: {svix_id}\r\n"
        f"svix-timestamp: {timestamp}\r\nsvix-signature: v1,{base64.b64encode(signed.digest()).decode()}\r\n\r\n"
    )
    return head.encode() + content


class Sender:
    """Sends what is due over whichever connection is free, and reads answers as they come.

    One request is under way on each connection. So a send of a few KB never blocks, and neither does a read of what
    select() announced. select() because it waits to the microsecond, where epoll knows milliseconds.
    """

    def __init__(self, order: Order, prepared: Prepared) -> None:
        self._order = order
        self._prepared = prepared
        self._requests = prepared.requests
        self._free: deque[socket.socket] = deque(self._connect() for _ in range(order.connections))
        self._busy: dict[socket.socket, int] = {}
        self._parts: dict[socket.socket, bytes] = {}
        self._sent = Sent(prepared.numbers, prepared.versions, array("d"), array("d"), array("H"), False, 0, 0, 0.0)

    def run(self) -> Sent:
        """Send all there is, or until the time or the patience is over."""
        cpu = time.process_time()
        if self._order.rate is None:
            self._flat_out(self._order.seconds)
        else:
            self._at_rate(self._order.rate)
        self._finish(time.monotonic() + 5)
        sent = self._sent
        sent.cpu_seconds = time.process_time() - cpu
        del sent.numbers[len(sent.status) :]
        del sent.versions[len(sent.status) :]
        for connection in (*self._free, *self._busy):
            connection.close()
        return sent

    def _flat_out(self, seconds: float) -> None:
        end = time.time() + seconds
        total = len(self._requests)
        while (now := time.time()) < end and len(self._sent.due) < total:
            while self._free and len(self._sent.due) < total:
                self._send(now)
            self._read(end - now)

    def _at_rate(self, rate: float) -> None:
        start = time.time() + 0.01
        total = len(self._requests)
        due = start
        while (place := len(self._sent.due)) < total:
            now = time.time()
            due = start + place / rate
            oldest = min((self._sent.due[one] for one in self._busy.values()), default=now) if not self._free else due
            if now - min(due, oldest) > self._order.patience:
                self._sent.gave_up = True
                self._sent.unsent = min(total, int((now - start) * rate) + 1) - place
                return
            if due <= now and self._free:
                self._send(due)
            else:
                self._read(min(due - now, 0.1) if self._free else 0.1)

    def _finish(self, deadline: float) -> None:
        while self._busy and (left := deadline - time.monotonic()) > 0:
            self._read(left)

    def _send(self, due: float) -> None:
        connection = self._free.popleft()
        place = len(self._sent.due)
        self._sent.due.append(due)
        self._sent.answered.append(0.0)
        self._sent.status.append(0)
        self._busy[connection] = place
        try:
            connection.sendall(self._requests[place])
        except OSError:
            self._again(connection)

    def _read(self, seconds: float) -> None:
        readable, _, _ = select.select(self._busy, (), (), max(seconds, 0))
        for connection in readable:
            try:
                got = connection.recv(LARGEST_ANSWER)
            except OSError:
                got = b""
            if not got:
                self._again(connection)
                continue
            answer = self._parts.pop(connection, b"") + got
            if not whole(answer):
                self._parts[connection] = answer
                continue
            place = self._busy.pop(connection)
            self._sent.answered[place] = time.time()
            self._sent.status[place] = int(answer[9:12])
            self._free.append(connection)

    def _again(self, closed: socket.socket) -> None:
        """Send over a new connection what went over one that the server had closed. Those on hold are often closed."""
        closed.close()
        self._parts.pop(closed, None)
        self._sent.reconnects += 1
        place = self._busy.pop(closed)
        connection = self._connect()
        self._busy[connection] = place
        connection.sendall(self._requests[place])

    def _connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self._order.port), timeout=5)
        connection.settimeout(None)  # with one, Python asks poll() before each call
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


def whole(answer: bytes) -> bool:
    """Whether an answer has come to its end, by its Content-Length."""
    head, separator, rest = answer.partition(b"\r\n\r\n")
    if not separator:
        return False
    _, found, value = head.lower().partition(b"\r\ncontent-length:")
    return bool(found) and len(rest) >= int(value.partition(b"\r\n")[0])


def quantile(values: Sequence[float], part: float) -> float:
    """The value that so large a part of them doesn't exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def users_of(sent: Sent) -> list[str]:
    """The users' ids, in the order of sending."""
    return [user_id(number) for number in sent.numbers]
