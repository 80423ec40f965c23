"""Svix's side: delivers each message until it is acknowledged, late, repeatedly and in any order.

https://docs.svix.com/retries
"""

from __future__ import annotations

import contextlib
import heapq
import http.client
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from tests.acceptance.system import Client
from tests.faults.truth import Message, Truth

TIMEOUT_SECONDS: Final = 15.0
"""How long Svix waits for an answer."""

RETRY_SECONDS: Final = (0.1, 0.3, 0.6, 1.0, 2.0, 3.0)
"""Svix's own schedule (5 s, 5 min, 30 min, …) in quick motion; the last one is repeated."""

ATTEMPTS: Final = 60
LATE, REPEATED = 0.05, 0.05
"""The shares of messages that are first delivered late, and delivered again although they were acknowledged."""

LATE_SECONDS: Final = 3.0
MOST_UNDER_WAY: Final = 1000
"""When so many wait for an acknowledgement, no more are made, or a long outage would end in a long queue."""


class Sender:
    """Delivers what happens to the users of a `truth`, `rate` events a second, to endpoints taken in turn.

    `endpoints` gives their addresses, which stay what they are. Each attempt is signed anew, as Svix does.
    """

    def __init__(self, truth: Truth, endpoints: Sequence[str], secret: str, rate: float, *, threads: int = 12) -> None:
        self._truth = truth
        self._endpoints = list(endpoints)
        self._secret = secret
        self._rate = rate
        self._random = random.Random()  # of moments only: what happens is the truth's
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Message]] = []
        self._order = itertools.count()
        self._flowing = False
        self._stopping = False
        self._next_at = 0.0
        self._sending = 0
        self._under_way = 0
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        self.answers: Counter[int | None] = Counter()
        self.acknowledged: dict[str, Message] = {}
        """Since the last `harvest`."""
        self.given_up = 0
        self.total = 0

    def start(self) -> None:
        """Start the threads; nothing flows before `flow`."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(TIMEOUT_SECONDS + 5)

    def flow(self) -> None:
        """Let things happen."""
        with self._changed:
            self._flowing = True
            self._next_at = time.monotonic()
            self._changed.notify_all()

    def finish(self, limit_seconds: float) -> bool:
        """Let nothing more happen, and wait until all that has was acknowledged; whether that came to pass."""
        with self._changed:
            self._flowing = False
            # Whatever was to come late or again comes now.
            now = time.monotonic()
            self._due = [(min(due, now + RETRY_SECONDS[0]), order, message) for due, order, message in self._due]
            heapq.heapify(self._due)
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._due and not self._sending, limit_seconds)

    def await_acknowledged(self, more: int, limit_seconds: float) -> bool:
        """Wait until so many more messages were acknowledged; whether they were."""
        with self._changed:
            wanted = self.total + more
            return self._changed.wait_for(lambda: self.total >= wanted, limit_seconds)

    def probe(self) -> Message:
        """An event that somebody else delivers."""
        with self._changed:
            return self._truth.probe()

    def harvest(self) -> dict[str, Message]:
        """What was acknowledged since the last call."""
        with self._changed:
            found, self.acknowledged = self.acknowledged, {}
            return found

    def _put(self, after: float, message: Message) -> None:
        heapq.heappush(self._due, (time.monotonic() + after, next(self._order), message))

    def _run(self) -> None:
        clients: dict[str, Client] = {}
        with contextlib.ExitStack() as connections:
            for endpoint in self._endpoints:
                clients[endpoint] = connections.enter_context(Client(endpoint, self._secret, TIMEOUT_SECONDS))
            while message := self._take():
                status = self._attempt(clients, message)
                with self._changed:
                    self._sending -= 1
                    self._conclude(message, status)
                    self._changed.notify_all()

    def _take(self) -> Message | None:
        """The next message that is due, or that happens; None when it is over."""
        with self._changed:
            while not self._stopping:
                now = time.monotonic()
                makes = self._flowing and self._under_way < MOST_UNDER_WAY
                if self._due and self._due[0][0] <= now:
                    self._sending += 1
                    return heapq.heappop(self._due)[2]
                if makes and self._next_at <= now:
                    # What couldn't be sent during an outage isn't made up for.
                    self._next_at = max(self._next_at + 1 / self._rate, now - 0.5)
                    message = self._truth.next()
                    self._under_way += 1
                    late = self._random.random() < LATE
                    self._put(self._random.uniform(0, LATE_SECONDS) if late else self._random.uniform(0, 0.03), message)
                    continue
                moments = [due for due, _, _ in self._due[:1]] + ([self._next_at] if makes else [])
                self._changed.wait(max(0.0, min(moments) - now) if moments else None)
            return None

    def _attempt(self, clients: Mapping[str, Client], message: Message) -> int | None:
        message.attempts += 1
        try:
            return clients[self._random.choice(self._endpoints)].deliver(message.body, message.svix_id).status
        except (OSError, http.client.HTTPException):
            return None

    def _conclude(self, message: Message, status: int | None) -> None:
        self.answers[status] += 1
        if status in {200, 202}:
            if not message.acknowledged:
                message.acknowledged = True
                self.acknowledged[message.svix_id] = message
                self.total += 1
                self._under_way -= 1
            if self._flowing and self._random.random() < REPEATED:
                self._put(self._random.uniform(0, LATE_SECONDS), message)
        elif message.attempts < ATTEMPTS:
            step = min(message.attempts, len(RETRY_SECONDS)) - 1
            self._put(RETRY_SECONDS[step] * self._random.uniform(0.8, 1.2), message)
        elif not message.acknowledged:
            self.given_up += 1
            self._under_way -= 1
