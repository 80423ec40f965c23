"""One cluster through a row of faults: each injected under load, waited out, and then everything is compared."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg

from tests.acceptance.system import CANARY, READ, Client
from tests.clerk import SECRET
from tests.faults.hosts import Cluster, Host
from tests.faults.kinds import Kind, Scene
from tests.faults.sender import Sender
from tests.faults.truth import Message, Truth
from worker import local

RATE: Final = 25.0
"""Events a second, while they flow."""

BEFORE: Final = 10
"""Acknowledgements before each fault, so that it meets a system at work."""

HEARD: Final = 0.1
"""The share of the broker's faults after which we wait until the doorbell is heard again, which can take 30 s."""

RECOVERY_SECONDS: Final = 90.0
"""Whatever takes longer than this has not recovered: somebody is stuck."""


@dataclass(slots=True)
class Outcome:
    """What came of one fault. `recovery_seconds`: from its end until each receiver took a new event and an
    application saw it."""

    kind: str
    number: int
    acknowledged: int = 0
    lost: int = 0
    wrong: int = 0
    stuck: str | None = None
    recovery_seconds: float = 0.0
    seconds: float = 0.0


class Lane:
    """A cluster of its own in `folder`, and what happens to it; repeatable by its seed."""

    def __init__(
        self, folder: Path, seed: str, *, rate: float = RATE, hosts: int = 2, present: int | None = None
    ) -> None:
        """Where `present` is given, so many users stay for ever; else they come and go. Then the inbox is pruned as
        well, and what is no longer there had its effect long ago."""
        self.seed = seed
        self.cluster = Cluster(folder, hosts)
        self.truth = Truth(seed) if present is None else Truth(seed, present, churn=False)
        self.sender = Sender(self.truth, [host.url for host in self.cluster.hosts], SECRET, rate)
        self._pruned = present is not None
        self._messages: dict[str, Message] = {}
        self._connection: psycopg.Connection[Any] | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start everything, and stop it at the end."""
        try:
            self.cluster.start()
            self.sender.start()
            yield
        finally:
            self.sender.stop()
            if self._connection is not None:
                self._connection.close()
            self.cluster.stop()

    def run(self, numbers: Iterable[int], kinds: Sequence[Kind]) -> Iterator[Outcome]:
        """Inject a fault for each number, chosen by it among these kinds."""
        for number in numbers:
            chance = random.Random(f"{self.seed}/{number}")
            (kind,) = chance.choices(kinds, [kind.weight for kind in kinds])
            # The first ones are one of each.
            yield self.inject(kinds[number] if number < len(kinds) else kind, number, chance)

    def inject(self, kind: Kind, number: int, chance: random.Random) -> Outcome:
        """One fault, from events flowing before it to everything compared after it."""
        outcome = Outcome(kind.name, number)
        started = time.monotonic()
        self.sender.flow()
        try:
            self._expect(lambda: self.sender.await_acknowledged(BEFORE, 0.5), 30, "no event was acknowledged")
            self._note(f"{number} {kind.name}: begins")
            kind.inject(Scene(self.cluster, self.sender, chance))
            self._note(f"{number} {kind.name}: over")
            lifted = time.monotonic()
            for host in self.cluster.hosts:
                host.revive()
            self._recover()
            outcome.recovery_seconds = time.monotonic() - lifted
            self._note(f"{number} {kind.name}: recovered")
            if kind.broker and chance.random() < HEARD:
                self.hear()
        except Stuck as stuck:
            outcome.stuck = str(stuck)
        try:
            self._settle()
        except Stuck as stuck:
            outcome.stuck = outcome.stuck or str(stuck)
        self._compare(outcome)
        outcome.seconds = time.monotonic() - started
        self._note(f"{number} {kind.name}: compared{', ' + outcome.stuck if outcome.stuck else ''}")
        return outcome

    def _note(self, text: str) -> None:
        """Write down when what was done, beside what the processes say."""
        with (self.cluster.folder / "faults.log").open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now(UTC):%H:%M:%S.%f} {text}\n")

    def hear(self) -> None:
        """Wait until the doorbell is heard by each host's worker again."""
        for host in self.cluster.hosts:
            before = wake_ups(host)
            self._expect(partial(hears, host, before), RECOVERY_SECONDS, "a worker doesn't hear the doorbell")

    def final(self) -> Outcome:
        """Compare everything that ever happened, after one more wait for the doorbell."""
        outcome = Outcome("all of it, at the end", -1)
        self.sender.flow()
        try:
            self.hear()
            self._settle()
        except Stuck as stuck:
            outcome.stuck = str(stuck)
        self._messages |= self.sender.harvest()
        outcome.acknowledged = len(self._messages)
        outcome.lost, outcome.wrong = self._differences(self._messages.values(), self.truth.user_ids())
        return outcome

    # Waiting

    def _recover(self) -> None:
        for host in self.cluster.hosts:
            message = self.sender.probe()
            self._expect(partial(taken, host, message), RECOVERY_SECONDS, "a receiver is stuck")
            self._expect(partial(self._seen, message), RECOVERY_SECONDS, "the workers are stuck")

    def _settle(self) -> None:
        """Until everything sent is acknowledged and applied, and every process is seen to be alive."""
        if not self.sender.finish(RECOVERY_SECONDS):
            raise Stuck("some events are never acknowledged")
        self._expect(lambda: self._count(PENDING) == 0, RECOVERY_SECONDS, "the inbox isn't emptied")
        for host in self.cluster.hosts:
            self._expect(partial(alive, host), RECOVERY_SECONDS, "a process is not started again")
            self._expect(host.answers, RECOVERY_SECONDS, "a receiver isn't ready")
        number = len(self.cluster.hosts)
        self._expect(lambda: self._count(SWEEPING) >= number, RECOVERY_SECONDS, "a worker doesn't sweep")

    @staticmethod
    def _expect(condition: Callable[[], bool], limit_seconds: float, otherwise: str) -> None:
        deadline = time.monotonic() + limit_seconds
        while not condition():
            if time.monotonic() > deadline:
                raise Stuck(f"{otherwise} (for {limit_seconds:g} s)")
            time.sleep(0.03)  # between two looks, not instead of one

    def _count(self, statement: str) -> int:
        found = self._ask(statement, {})
        return int(found[0][0]) if found else -1

    def _seen(self, message: Message) -> bool:
        return bool(self._ask(READ, {"user_ids": [message.user_id]}))

    def _ask(self, statement: str, parameters: dict[str, object]) -> list[tuple[Any, ...]]:
        """What Postgres says, past the proxies, over a connection that is kept; nothing while it can't be asked."""
        try:
            if self._connection is None:
                self._connection = self.cluster.connect()
            return self._connection.execute(statement, parameters).fetchall()
        except psycopg.Error:
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            return []

    # Comparing

    def _compare(self, outcome: Outcome) -> None:
        new = self.sender.harvest()
        self._messages |= new
        outcome.acknowledged = len(new)
        users = {message.user_id for message in new.values()}
        outcome.lost, outcome.wrong = self._differences(new.values(), users)

    def _differences(self, messages: Iterable[Message], user_ids: Iterable[str]) -> tuple[int, int]:
        """How many of these acknowledged events had no effect, and how many of these users' rows aren't the truth."""
        ids = {message.svix_id: message.dead for message in messages}
        with self.cluster.connect() as connection:
            states = dict(connection.execute(STATES, {"svix_ids": list(ids)}).fetchall())
            rows = connection.execute(READ, {"user_ids": list(user_ids)}).fetchall()
        # A dead event of a deleted user is done: nothing of it is kept.
        gone = {None} if self._pruned and len(ids) == len(self._messages) else set()
        lost = sum(
            states.get(svix_id) not in ({"dead", "done"} if dead else {"done"}) | gone for svix_id, dead in ids.items()
        )
        expected = self.truth.expected(user_ids)
        found = {row[0]: tuple(row[1:]) for row in rows}
        return lost, sum(found.get(user_id) != expected.get(user_id) for user_id in expected.keys() | found.keys())

    # After it

    def unexpected(self) -> list[str]:
        """Lines of the processes' output that tell of an error nobody thought of, and whether anything leaked."""
        lines = list(itertools.chain.from_iterable(host.system.output.splitlines() for host in self.cluster.hosts))
        found = [line for line in lines if "level=critical" in line or "Traceback" in line]
        if any(CANARY in line for line in lines):
            found.append("metadata or a name stands in the output")
        return found


def bad(outcome: Outcome) -> bool:
    """Whether a promise was broken."""
    return bool(outcome.lost or outcome.wrong or outcome.stuck)


def told(outcome: Outcome) -> str:
    """One line of what went wrong."""
    stuck = f", {outcome.stuck}" if outcome.stuck else ""
    return f"fault {outcome.number} ({outcome.kind}): {outcome.lost} lost, {outcome.wrong} wrong rows{stuck}"


class Stuck(Exception):
    """Something didn't come to pass in time."""


PENDING: Final = "select count(*) from clerk.webhook_events where state = 'pending'"
SWEEPING: Final = """
select count(*) from pg_stat_activity
where datname = current_database() and application_name = 'clerk-sync worker'
  and state_change > now() - interval '5 seconds'
"""
STATES: Final = "select svix_id, state from clerk.webhook_events where svix_id = any(%(svix_ids)s)"


def taken(host: Host, message: Message) -> bool:
    """Whether this host's receiver acknowledges a message now."""
    with contextlib.suppress(OSError, http.client.HTTPException), Client(host.url, SECRET, 6.0) as client:
        return client.deliver(message.body, message.svix_id).status in {200, 202}
    return False


def alive(host: Host) -> bool:
    """Whether all processes of a host are there."""
    if host.system.ended:
        host.revive()
        return False
    with contextlib.suppress(OSError, ValueError):
        return all(local.command_line(pid) for pid in host.system.pids.values())
    return False


def hears(host: Host, before: float) -> bool:
    """Whether this host's worker has heard a wake-up since it had heard so many; it counts anew after a restart."""
    return wake_ups(host) not in {before, -1.0, 0.0}


def wake_ups(host: Host) -> float:
    """How many wake-ups this host's worker has heard, -1 where nobody says."""
    with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
        return host.metrics().get("clerk_sync_wake_ups_total", 0.0)
    return -1.0
