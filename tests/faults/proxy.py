"""A TCP proxy that misbehaves on demand: it stands between a client and a real server, on a port that stays the same.

What it can't imitate: the kernel acknowledges what the proxy swallows, so TCP's own timers and keep-alives never fire.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import queue
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Final, Self

READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE
CHUNK: Final = 256 * 1024
WAITING_LIMIT: Final = 1024 * 1024
"""So much may wait for one slow side before the other is no longer read."""
RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


@dataclass(eq=False, slots=True)
class _Flow:
    """Bytes on their way in one direction. An empty chunk is the end."""

    source: socket.socket
    sink: socket.socket
    chunks: deque[tuple[float, memoryview]] = field(default_factory=deque)  # each with the time it is due
    waiting: int = 0
    free_at: float = 0.0
    ended: bool = False  # there is no more to read
    swallowed: bool = False  # what is read goes nowhere

    def swallow(self) -> None:
        self.swallowed = True
        self.chunks.clear()
        self.waiting = 0


@dataclass(eq=False, slots=True)
class _Link:
    """A client's connection and the one to the server made for it."""

    up: _Flow
    down: _Flow
    connected: bool = False
    doomed: bool = False  # heal() resets it

    @property
    def directions(self) -> tuple[tuple[_Flow, _Flow], tuple[_Flow, _Flow]]:
        """Each flow with the one the other way."""
        return (self.up, self.down), (self.down, self.up)


class Proxy:
    """Every method may be called from any thread, and has taken effect when it returns.

    A fault lasts until heal(); used in a `with`, until its end.
    """

    def __init__(self, host: str, port: int, upstream_host: str, upstream_port: int) -> None:
        # Bound and never listening: holds the port while connections are refused.
        self._keeper = _bound(host, port)
        self._host = host
        self.port: int = self._keeper.getsockname()[1]
        self._upstream = (upstream_host, upstream_port)
        self.bytes = 0
        """How many went through, both directions together."""
        self._listener: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._orders: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, READ, lambda _: self._woken.recv(CHUNK))
        self._thread: threading.Thread | None = None
        self._running = False
        self._links: set[_Link] = set()
        self._late: dict[_Link, float] = {}  # those with something to forward later, and when
        self._held = self._muted = self._replies_lost = False
        self._delay = 0.0
        self._rate: int | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def connections(self) -> int:
        """How many clients are connected now."""
        return sum(link.up.source.fileno() != -1 for link in list(self._links))

    def start(self) -> None:
        """Begin to listen. Once in a proxy's life."""
        self._listen()
        self._running = True
        self._thread = threading.Thread(target=self._run, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Reset every connection and give the port up."""
        if self._thread is not None:
            self._order(self._end)
            self._thread.join()
            self._thread = None
        for each in (self._keeper, self._waker, self._woken, self._selector):
            each.close()

    # --- The faults.

    def cut(self) -> None:
        """Reset every present connection, the silent ones too. New ones are as ever."""
        self._order(self._reset_all)

    def half_open(self) -> None:
        """Make every present connection silent for ever, both ways, without closing it. New ones are as ever.

        Where one end goes away, the other is never told.
        """
        self._order(self._silence_all)

    def refuse(self) -> AbstractContextManager[object]:
        """Reset every connection, and refuse new ones."""

        def begin() -> None:
            self._close_listener()
            self._reset_all()

        return self._until_healed(begin)

    def mute(self, *, lose: bool = True) -> AbstractContextManager[object]:
        """Accept, and forward nothing either way. What was muted stays silent for ever, or without `lose` flows on."""

        def begin() -> None:
            if lose:
                self._muted = True
                self._silence_all()
            else:
                self._held = True

        return self._until_healed(begin)

    def lose_replies(self) -> AbstractContextManager[object]:
        """Let the server hear everything and the client nothing. heal() resets these connections."""

        def begin() -> None:
            self._replies_lost = True
            for link in self._links:
                link.doomed = True
                link.down.swallow()

        return self._until_healed(begin)

    def delay(self, seconds: float) -> AbstractContextManager[object]:
        """Forward each chunk that much later, in order. What was taken in before heal() keeps its delay."""

        def begin() -> None:
            self._delay = seconds

        return self._until_healed(begin)

    def throttle(self, bytes_per_second: int) -> AbstractContextManager[object]:
        """Forward no faster than this, in each direction of each connection."""

        def begin() -> None:
            self._rate = bytes_per_second

        return self._until_healed(begin)

    def heal(self) -> None:
        """Back to normal, for new connections at least. Harmless where nothing is wrong."""
        self._order(self._heal)

    def _until_healed(self, begin: Callable[[], None]) -> AbstractContextManager[object]:
        self._order(begin)
        stack = ExitStack()
        stack.callback(self.heal)
        return stack

    # --- Orders from other threads, carried out when no event is left that came before them.

    def _order(self, order: Callable[[], None]) -> None:
        if self._thread is None:
            raise RuntimeError(f"the proxy on port {self.port} isn't running: call start() first")
        done = threading.Event()
        self._orders.put((order, done))
        self._waker.send(b"!")
        if not done.wait(10):
            raise RuntimeError(f"the proxy on port {self.port} has died: see its thread's exception")

    def _obey(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                order, done = self._orders.get_nowait()
                self._accept()  # a client that has connected already is a present connection
                order()
                for link in list(self._links):
                    self._settle(link)
                done.set()

    def _end(self) -> None:
        self._close_listener()
        self._reset_all()
        self._running = False

    def _heal(self) -> None:
        self._held = self._muted = self._replies_lost = False
        self._delay, self._rate = 0.0, None
        for link in [each for each in self._links if each.doomed]:
            self._reset(link)
        if self._listener is None:
            self._listen()

    def _reset_all(self) -> None:
        for link in list(self._links):
            self._reset(link)

    def _silence_all(self) -> None:
        for link in self._links:
            link.up.swallow()
            link.down.swallow()

    # --- What the one thread does.

    def _run(self) -> None:
        while self._running:
            timeout = max(0.0, min(self._late.values()) - time.monotonic()) if self._late else None
            for key, mask in self._selector.select(timeout):
                # An event before this one may have closed it.
                if isinstance(key.fileobj, socket.socket) and key.fileobj.fileno() != -1:
                    key.data(mask)
            self._obey()
            for link in [each for each, due in self._late.items() if due <= time.monotonic()]:
                self._settle(link)

    def _listen(self) -> None:
        self._listener = _bound(self._host, self.port)
        self._listener.setblocking(False)
        self._listener.listen(1024)
        self._selector.register(self._listener, READ, lambda _: self._accept())

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        while self._listener is not None:
            try:
                client, _ = self._listener.accept()
            except OSError:  # nobody more; or one who is gone already
                return
            server = socket.socket()
            for each in (client, server):
                each.setblocking(False)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(_Flow(client, server), _Flow(server, client), doomed=self._replies_lost)
            self._links.add(link)
            if self._muted:  # the server never hears of it
                server.close()
                link.connected = link.down.ended = True
                link.up.swallow()
            elif server.connect_ex(self._upstream) not in {0, errno.EINPROGRESS}:
                self._failed(link, link.down)
            if self._muted or self._replies_lost:
                link.down.swallow()
            self._settle(link)

    def _ready(self, link: _Link, there: _Flow, back: _Flow, mask: int) -> None:
        """The source of one flow, which is the sink of the other, can be read or written."""
        if not link.connected:
            link.connected = True  # or it failed, as the first read will tell
        else:
            if mask & WRITE:
                self._write(link, back)
            if mask & READ:
                self._read(link, there)
        self._settle(link)

    def _read(self, link: _Link, flow: _Flow) -> None:
        try:
            data = flow.source.recv(CHUNK if self._rate is None else min(CHUNK, max(1, self._rate // 20)))
        except BlockingIOError:
            return
        except OSError:
            self._failed(link, flow)
            return
        flow.ended = not data
        if not flow.swallowed:
            flow.free_at = max(flow.free_at, time.monotonic()) + (len(data) / self._rate if self._rate else 0.0)
            flow.chunks.append((flow.free_at + self._delay, memoryview(data)))
            flow.waiting += len(data)
            self._write(link, flow)

    def _write(self, link: _Link, flow: _Flow) -> None:
        while flow.chunks and flow.chunks[0][0] <= time.monotonic():
            due, chunk = flow.chunks.popleft()
            sent = 0
            try:
                if chunk:
                    sent = flow.sink.send(chunk)
                else:
                    flow.sink.shutdown(socket.SHUT_WR)
            except BlockingIOError:
                pass
            except OSError:
                self._failed(link, link.down if flow is link.up else link.up)
                return
            self.bytes += sent
            flow.waiting -= sent
            if sent < len(chunk):
                flow.chunks.appendleft((due, chunk[sent:]))
                return

    def _failed(self, link: _Link, flow: _Flow) -> None:
        """A flow's source is broken. The other end is reset too, unless it hears nothing of this one."""
        if flow.swallowed:
            flow.ended = True
            (link.down if flow is link.up else link.up).swallow()
        else:
            self._reset(link)

    def _reset(self, link: _Link) -> None:
        for flow in (link.up, link.down):
            if flow.source.fileno() != -1:
                flow.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._drop(link)

    def _drop(self, link: _Link) -> None:
        self._close(link.up.source)
        self._close(link.down.source)
        self._links.discard(link)
        self._late.pop(link, None)

    def _close(self, each: socket.socket) -> None:
        if each.fileno() != -1:
            self._watch(each, 0)
            each.close()

    def _settle(self, link: _Link) -> None:
        """After anything that happened to a connection: close what is finished, and watch for what may happen next."""
        if link not in self._links:
            return
        if all(flow.ended and not flow.chunks for flow in (link.up, link.down)):
            self._drop(link)
            return
        now = time.monotonic()
        self._late.pop(link, None)
        for there, back in link.directions:
            if there.ended and there.swallowed and back.swallowed:
                self._close(there.source)
            if there.source.fileno() == -1:
                continue
            events = 0
            if not link.connected:
                events = WRITE if there is link.down else 0
            elif not self._held:
                if not there.ended and there.waiting < WAITING_LIMIT:
                    events |= READ
                if back.chunks and back.chunks[0][0] <= now:
                    events |= WRITE
                elif back.chunks:
                    self._late[link] = min(back.chunks[0][0], self._late.get(link, back.chunks[0][0]))
            self._watch(there.source, events, functools.partial(self._ready, link, there, back))

    def _watch(self, each: socket.socket, events: int, ready: Callable[[int], None] | None = None) -> None:
        key = self._selector.get_map().get(each)
        if key is None:
            if events:
                self._selector.register(each, events, ready)
        elif not events:
            self._selector.unregister(each)
        elif key.events != events:
            self._selector.modify(each, events, ready)


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has the port, which others of this proxy may have too."""
    each = socket.socket()
    each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    each.bind((host, port))
    return each
