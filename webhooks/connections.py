"""Reads every request whole, in one thread, before any other thread hears of it.

Whoever sends half a request, or one byte a second, holds a few hundred bytes and no thread. Each request has a
deadline and a size, all together have a share of memory, and where that is full the one that has taken longest goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import io
import json
import logging
import queue
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import httptools

from worker import metrics

log = logging.getLogger(__name__)

LARGEST_BODY: Final = 1024 * 1024
LARGEST_HEAD: Final = 32 * 1024
"""Of the request line and all headers together."""

HELD_OF_HEAD: Final = 512 * 1024
"""Of a head that hasn't ended, with the rest of the piece that it began in: the parser keeps a header until its end."""

LARGEST_REQUEST: Final = 2 * LARGEST_BODY
"""With what frames its chunks."""

MOST_PIPELINED: Final = 10
"""Requests that are read ahead while the first is answered; after them the connection ends."""

REQUEST_COSTS: Final = 4096
"""What a request takes in memory beside its bytes, about."""

SWALLOWED: Final = 8 * LARGEST_BODY
"""How much is read on, and dropped, after a refusal: whoever is still sending would miss the answer."""

TOGETHER: Final = 100
"""The most deliveries that one thread takes at a time."""

TOGETHER_BYTES: Final = 4 * LARGEST_BODY
"""Once it has so much of their bodies it takes no more: they are parsed and committed within one delivery's time."""

NO_MORE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Application = Callable[..., Iterable[bytes]]

SINCE: Final = "clerk_sync.since"
"""In a request's environ: when its last byte came, by time.monotonic()."""

# Threads of their own: whoever asks for metrics, or looks at the status page, must not hold up deliveries, nor the
# question whether we live.
DELIVERY: Final = "delivery"
ALIVE: Final = "alive"
STATUS: Final = "status"
OTHER: Final = "other"

IDLE: Final = "idle"
READING: Final = "reading"
ANSWERING: Final = "answering"
STUCK: Final = "stuck"
OVER: Final = "over"

REFUSED: Final = {
    400: "this is not a request in HTTP/1.1",
    408: "the request took too long",
    413: "the body is over 1 MiB",
    431: "the headers are over 32 KiB",
    503: "the request can't be taken now; send it again",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """How long things may take, and how much there may be of them in one process."""

    request_seconds: float = 20.0
    """From a request's first byte, or from a new connection, until the last byte."""
    idle_seconds: float = 75.0
    """From an answer to the next request: Svix keeps its connections."""
    answer_seconds: float = 10.0
    """Until the client has taken an answer."""
    linger_seconds: float = 2.0
    """How long whoever was refused may go on sending before the connection is cut."""
    connections: int = 4000
    waiting: int = 1000
    """Whole requests at a time; more would wait for a thread longer than is any use."""
    waiting_seconds: float = 3.0
    """For a thread. A delivery is to be answered within 5 s, whatever Postgres does."""
    held_bytes: int = 64 * 1024 * 1024
    """Of all requests that are being read or answered."""


@dataclass(slots=True)
class Request:
    """One request as it comes in."""

    method: str = ""
    target: bytes = b""
    protocol: str = ""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    keep_alive: bool = False
    head_size: int = 0
    answered: bool = False


Waiting = tuple["Connection", Request, float]
Answered = tuple["Connection", Request, bytes]


class Connections:
    """All connections of one process. Everything but the application runs in the event loop's thread."""

    def __init__(self, application: Application, threads: int, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.stopping = False
        self._application = application
        self._loop = asyncio.get_running_loop()
        self._threads = {lane: ThreadPoolExecutor(most, lane) for lane, most in ((ALIVE, 1), (STATUS, 1), (OTHER, 2))}
        self._deliveries: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._delivering = [threading.Thread(target=self._deliver, name=DELIVERY, daemon=True) for _ in range(threads)]
        for thread in self._delivering:
            thread.start()
        self._listeners: Sequence[socket.socket] = ()
        # Each in the order of since when.
        self._by_state: dict[str, dict[Connection, None]] = {
            state: {} for state in (IDLE, READING, ANSWERING, STUCK, OVER)
        }
        self._opening: set[asyncio.Task[Any]] = set()
        self._answering = dict.fromkeys((DELIVERY, ALIVE, STATUS, OTHER), 0)
        self._held = 0

    # Coming and going

    def listen(self, listeners: Sequence[socket.socket]) -> None:
        """Accept from these from now on."""
        self._listeners = listeners
        for listener in listeners:
            listener.setblocking(False)
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Accept one connection only, so that the other processes get their share."""
        if len(self._opening) + sum(map(len, self._by_state.values())) >= self.limits.connections:
            self._end_oldest()
        try:
            accepted, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in NO_MORE:
                raise
            self._end_oldest()
            return
        accepted.setblocking(False)
        opening = self._loop.create_task(self._loop.connect_accepted_socket(lambda: Connection(self), accepted))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    def _end_oldest(self) -> None:
        for state in (OVER, IDLE, READING, STUCK):
            for oldest in self._by_state[state]:
                oldest.give_way()
                return

    def moved(self, connection: Connection, before: str | None, now: str | None) -> None:
        """Note that a connection is in another state; None: not yet, or no more."""
        if before is not None:
            self._by_state[before].pop(connection, None)
        if now is not None:
            self._by_state[now][connection] = None

    def sweep(self) -> None:
        """End what has taken too long. To be called every second or so."""
        now = time.monotonic()
        for those in self._by_state.values():
            for connection in [one for one in those if one.deadline < now]:
                connection.expire()

    # Memory

    def hold(self, size: int, connection: Connection) -> bool:
        """Make room for more bytes of a connection; False where it is itself the one that has to go."""
        while self._held + size > self.limits.held_bytes:
            oldest = next(iter(self._by_state[READING]), connection)
            if oldest is connection:
                return False
            oldest.give_way()
        self._held += size
        return True

    def release(self, size: int) -> None:
        """Give back what was held."""
        self._held -= size

    # Answering

    def answer(self, connection: Connection, request: Request) -> bool:
        """Let a thread answer a whole request; False where too many wait for one already."""
        lane = lane_of(request)
        if self._answering[lane] >= self.limits.waiting:
            return False
        self._answering[lane] += 1
        waiting = connection, request, time.monotonic()
        if lane == DELIVERY:
            self._deliveries.put(waiting)
        else:
            self._threads[lane].submit(self._answer, [waiting])
        return True

    def _deliver(self) -> None:
        """Answer deliveries, one thread all that wait at a time: what they have in common is then done once."""
        while waiting := self._deliveries.get():
            together = [waiting]
            size = len(waiting[1].body)
            with contextlib.suppress(queue.Empty):
                while len(together) < TOGETHER and size < TOGETHER_BYTES:
                    if (waiting := self._deliveries.get_nowait()) is None:
                        self._deliveries.put(None)
                        break
                    together.append(waiting)
                    size += len(waiting[1].body)
            try:
                self._answer(together)
            except BaseException:  # the thread goes on, whatever it was
                self._send([(connection, request, refusal(503)) for connection, request, _ in together])
                log.critical("answering failed", exc_info=True)

    def _answer(self, together: Sequence[Waiting]) -> None:
        """Call the application for each, and only then read the answers that it doesn't know yet."""
        known: list[Answered] = []
        unknown: list[tuple[Connection, Request, Answer]] = []
        for connection, request, since in together:
            try:
                if time.monotonic() - since > self.limits.waiting_seconds:
                    reason = "it waited too long for a thread"
                    log.warning("a request was refused", extra={"status": 503, "reason": reason})
                    known.append((connection, request, refusal(503)))
                    continue
                answer = Answer(self._application, environ(request, connection.address, since))
                if answer.begun:
                    known.append((connection, request, answer.whole()))
                else:
                    unknown.append((connection, request, answer))
            except Exception:
                log.critical("answering failed", exc_info=True)
                known.append((connection, request, refusal(503)))
        if known:
            self._send(known)
        if unknown:
            self._send([(connection, request, whole(answer)) for connection, request, answer in unknown])

    def _send(self, answers: list[Answered]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._answered, answers)

    def _answered(self, answers: list[Answered]) -> None:
        for connection, request, answer in answers:
            if request.answered:
                continue
            request.answered = True
            self._answering[lane_of(request)] -= 1
            try:
                connection.answered(request, answer)
            except Exception:
                log.critical("sending an answer failed", exc_info=True)
                connection.cut()

    # Stopping

    def stop(self) -> None:
        """Accept no more and end what is idle; the others may finish, soon."""
        self.stopping = True
        for listener in self._listeners:
            self._loop.remove_reader(listener.fileno())
            listener.close()  # whoever connects now is another process's, or told that there is none
        soon = time.monotonic() + self.limits.linger_seconds
        for connection in self._by_state[READING]:
            connection.deadline = min(connection.deadline, soon)
        for connection in list(self._by_state[IDLE]):
            connection.expire()

    @property
    def finished(self) -> bool:
        """Whether every answer is out."""
        return not (any(self._answering.values()) or self._opening or any(self._by_state.values()))

    def close(self) -> None:
        """Cut what is left."""
        for those in self._by_state.values():
            for connection in list(those):
                connection.cut()
        for _ in self._delivering:
            self._deliveries.put(None)
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)


class Connection(asyncio.Protocol):
    """One connection: reads a request, has it answered, reads the next."""

    def __init__(self, connections: Connections) -> None:
        self.address: tuple[str, int] = ("", 0)
        self.deadline = float("inf")
        self._connections = connections
        self._limits = connections.limits
        self._state: str | None = None
        self._transport: asyncio.Transport
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._request: Request | None = None  # that is being read
        self._whole: deque[Request] = deque()  # that wait for the one before them
        self._refusal: int | None = None  # how to answer what follows
        self._last = False  # whether nothing follows
        self._unsent = False  # whether the client doesn't take its answer
        self._ended = False  # whether the client sends no more
        self._in_hand = False  # whether a thread answers
        self._held = 0
        self._piece = 0  # the size of what was read last
        self._swallowed = 0

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 (for mypy)
        self._transport = transport
        transport.set_write_buffer_limits(high=0)  # whatever doesn't go out at once is unsent
        self.address = transport.get_extra_info("sockname")[:2]
        self._become(IDLE, self._limits.request_seconds)
        if self._connections.stopping:
            self._close()

    def data_received(self, data: bytes) -> None:
        """Read on."""
        if self._state == OVER or self._parser is None:
            self._swallowed += len(data)
            if self._swallowed > SWALLOWED:
                self.cut()
            return
        if self._hold(len(data)):
            self._piece = len(data)
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                self._refuse_rest(400)
            if self._held > LARGEST_REQUEST:
                self._refuse_rest(413)
            if self._request and not self._request.method and not self._whole and self._held > HELD_OF_HEAD:
                self._refuse_rest(431)
        if self._state == ANSWERING and not self._transport.is_closing():
            self._transport.pause_reading()  # what follows can wait; most send nothing until they are answered
        self._go_on()

    def eof_received(self) -> bool:
        """Answer what was sent whole, and refuse a half."""
        if self._state == OVER:
            return False
        if self._request is not None:
            self._refuse_rest(400)
        self._last = self._ended = True
        self._go_on()
        return self._state != OVER

    def pause_writing(self) -> None:
        """Wait for the client to take its answer."""
        self._unsent = True

    def resume_writing(self) -> None:
        """Go on, since it has."""
        self._unsent = False
        self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """End."""
        self._finish()
        self._connections.moved(self, OVER, None)

    # What the parser calls, while it is fed

    def on_message_begin(self) -> None:
        """A request begins."""
        if not self._refusal and not self._last and self._hold(REQUEST_COSTS):
            self._request = Request()

    def on_url(self, url: bytes) -> None:
        """A piece of the target."""
        if self._request and self._head_grows(len(url)):
            self._request.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        if not self._request or not self._head_grows(len(name) + len(value) + len(b": \r\n")):
            return
        if not self._request.method:  # what comes after the body counts for nothing
            self._request.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The body follows."""
        if not self._request or self._parser is None:
            return
        version = self._parser.get_http_version()
        if version not in {"1.0", "1.1"} or self._parser.should_upgrade():
            self._refuse_rest(400)
        self._request.method = self._parser.get_method().decode("ascii")
        self._request.protocol = f"HTTP/{version}"
        self._request.keep_alive = self._parser.should_keep_alive()
        headers = dict(self._request.headers)
        # Whoever is before us may read another coding's end elsewhere.
        if any(name == b"transfer-encoding" and value.lower() != b"chunked" for name, value in self._request.headers):
            self._refuse_rest(400)
        if int(headers.get(b"content-length", 0)) > LARGEST_BODY:
            self._refuse_rest(413)
        waits = headers.get(b"expect", b"").lower() == b"100-continue" and version == "1.1"
        if waits and not self._refusal and not self._whole:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self._request and not self._refusal:
            self._request.body += body
            if len(self._request.body) > LARGEST_BODY:
                self._refuse_rest(413)

    def on_message_complete(self) -> None:
        """A request is whole."""
        request, self._request = self._request, None
        if request and not self._refusal:
            request.keep_alive = request.keep_alive and len(self._whole) < MOST_PIPELINED
            self._last = not request.keep_alive
            self._whole.append(request)

    def _head_grows(self, size: int) -> bool:
        assert self._request  # noqa: S101 (for mypy)
        self._request.head_size += size
        if self._request.head_size > LARGEST_HEAD:
            self._refuse_rest(431)
        return not self._refusal

    def _hold(self, size: int) -> bool:
        if not self._connections.hold(size, self):
            self._refuse_rest(503)
            return False
        self._held += size
        return True

    def _refuse_rest(self, status: int) -> None:
        """Refuse what is being read; what was read whole before it is answered."""
        if not self._last:
            self._refusal = self._refusal or status

    # What follows

    def _go_on(self) -> None:
        """Do what is next: send, answer, refuse, end, or read."""
        if self._in_hand or self._state == OVER:
            return
        if self._unsent:
            self._become(STUCK, self._limits.answer_seconds)
        elif self._whole:
            request = self._whole.popleft()
            if self._connections.answer(self, request):
                self._in_hand = True
                self._become(ANSWERING, float("inf"))  # the application limits itself
            else:
                self._refuse(503)
        elif self._refusal:
            self._refuse(self._refusal)
        elif self._last:
            self._close()
        elif self._request is None:
            self._hold_only(0)
            self._become(IDLE, self._limits.idle_seconds)
        else:
            if self._state != READING:
                # The parser may keep as much as was read last, of a header that hasn't ended.
                known = REQUEST_COSTS + self._request.head_size + len(self._request.body)
                self._hold_only(min(self._held, known + self._piece))
            self._become(READING, self._limits.request_seconds)

    def answered(self, request: Request, answer: bytes) -> None:
        """Send what the application answered."""
        self._in_hand = False
        if self._state == OVER:
            self._hold_only(0)
            return
        if not request.keep_alive or self._connections.stopping:
            self._whole.clear()
            self._refusal, self._last = None, True
            answer = closing(answer)
        self._transport.write(answer)
        self._go_on()

    def _become(self, state: str, seconds: float) -> None:
        """Change the state, and start its clock. Reading stops while something is to be answered or sent."""
        if state == self._state:
            return
        self._connections.moved(self, self._state, state)
        # While it is answered it goes on reading until something comes: to stop each time costs calls of the kernel.
        if self._transport.is_reading() != (state != STUCK) and not self._transport.is_closing():
            if state == STUCK:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()
        self._state = state
        self.deadline = time.monotonic() + seconds

    def _hold_only(self, size: int) -> None:
        self._connections.release(self._held - size)
        self._held = size

    # How it ends

    def expire(self) -> None:
        """Its time is up."""
        if self._state == READING:
            self._refuse(503 if self._connections.stopping else 408)
        elif self._state == IDLE:
            self._close()
        else:
            self.cut()

    def give_way(self) -> None:
        """Make room for others."""
        if self._state == READING:
            self._refuse(503)
        self.cut()

    def cut(self) -> None:
        """End now, whatever isn't sent yet."""
        self._finish()
        self._transport.abort()

    def _close(self) -> None:
        """End once everything is sent."""
        self._finish()
        self._transport.close()

    def _refuse(self, status: int) -> None:
        """Refuse, and read on for a moment: whoever is still sending would miss the answer."""
        log.warning("a request was refused", extra={"status": status, "reason": REFUSED[status]})
        if status == 413:
            metrics.DELIVERIES.labels("too_large").inc()
        self._transport.write(closing(refusal(status)))
        with contextlib.suppress(OSError):  # the client is gone since; the loop hears of it by itself
            self._transport.write_eof()
        if self._ended:
            self._close()  # there is nobody to linger for
        else:
            self._finish(self._limits.linger_seconds)

    def _finish(self, seconds: float | None = None) -> None:
        self._become(OVER, seconds or self._limits.answer_seconds)
        self._whole.clear()
        self._request = None
        # It keeps what it was reading, and they point at each other: only the garbage collector would end that.
        self._parser = None
        if not self._in_hand:
            self._hold_only(0)


def lane_of(request: Request) -> str:
    """Whose threads answer a request."""
    if request.target.startswith(b"/status"):
        return STATUS
    if request.method == "POST":
        return DELIVERY
    return ALIVE if request.target == b"/healthz" else OTHER


class Answer:
    """What a WSGI application answers: it may say so at once, or only once it is asked for the body."""

    def __init__(self, application: Application, environ: dict[str, Any]) -> None:
        self._said: tuple[str, list[tuple[str, str]]] | None = None
        self._parts: list[bytes] = []
        self._found = application(environ, self._start)

    def _start(self, status: str, headers: list[tuple[str, str]], _error: object = None) -> Callable[[bytes], object]:
        self._said = status, headers
        return self._parts.append

    @property
    def begun(self) -> bool:
        """Whether the application has said how it answers."""
        return self._said is not None

    def whole(self) -> bytes:
        """All of it, as it goes over the wire."""
        try:
            self._parts.extend(self._found)
        finally:
            if close := getattr(self._found, "close", None):
                close()
        if self._said is None:
            raise RuntimeError("the application gave no status")
        return written(*self._said, b"".join(self._parts))


def whole(answer: Answer) -> bytes:
    """All of an answer, or a refusal where the application fails."""
    try:
        return answer.whole()
    except Exception:
        log.critical("answering failed", exc_info=True)
        return refusal(503)


def environ(request: Request, address: tuple[str, int], since: float) -> dict[str, Any]:
    """A request as WSGI wants it, and since when it was whole. Nothing in it tells who sent it."""
    target = request.target
    if not target.startswith(b"/"):  # the form that proxies send: http://host/path
        target = b"/" + target.partition(b"://")[2].partition(b"/")[2]
    path, _, query = target.partition(b"?")
    found: dict[str, Any] = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "QUERY_STRING": query.decode("latin-1"),
        "SERVER_NAME": address[0],
        "SERVER_PORT": str(address[1]),
        "SERVER_PROTOCOL": request.protocol,
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(request.body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        SINCE: since,
    }
    for name, value in request.headers:
        if key := _environ_key(name):
            text = value.decode("latin-1")
            found[key] = f"{found[key]},{text}" if key in found else text
    found["CONTENT_LENGTH"] = str(len(request.body))
    return found


# As many names as senders use; whoever makes up others pushes out each other's.
@functools.lru_cache(maxsize=256)
def _environ_key(name: bytes) -> str:
    """What WSGI calls a header; nothing for what no application may see."""
    # An underscore would pass for a hyphen; and the body is whole already, however it was sent.
    if b"_" in name or len(name) > 100 or name in {b"content-length", b"transfer-encoding"}:
        return ""
    return "CONTENT_TYPE" if name == b"content-type" else f"HTTP_{name.decode('latin-1').upper().replace('-', '_')}"


def written(status: str, headers: list[tuple[str, str]], body: bytes) -> bytes:
    """An answer as it goes over the wire."""
    lines = [f"HTTP/1.1 {status}", _date(int(time.time())), *[f"{name}: {value}" for name, value in headers], "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


@functools.lru_cache(maxsize=1)
def _date(seconds: int) -> str:
    return f"Date: {formatdate(seconds, usegmt=True)}"


def refusal(status: int) -> bytes:
    """The answer to what no application sees."""
    body = json.dumps({"error": REFUSED[status]}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    if status == 503:
        headers.append(("Retry-After", "5"))
    return written(f"{status} {HTTPStatus(status).phrase}", headers, body)


def closing(answer: bytes) -> bytes:
    """The same answer, as the last one of its connection."""
    return answer.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
