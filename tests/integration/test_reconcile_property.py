"""Whatever is lost, repeated or reordered: after one whole reconcile our users are Clerk's.

A history happens at a stand-in for Clerk before a run and between its calls. Each thing that happens emits a webhook,
which arrives at once, twice, later, after the run, or never.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import EMPTY
from tests.events import deleted, envelope
from tests.pulling import KEY, LIVE, deliver
from worker import reconcile as reconciling
from worker import sweep, users
from worker.clerk_api import ClerkApi
from worker.db import Connection
from worker.events import UserChanged, parse_user
from worker.policy import Copy, Policy
from worker.reconcile import check, reconcile
from worker.standin import METADATA, Call, StandIn, now_ms

EVERYTHING = Policy(public=Copy.ALWAYS, unsafe=Copy.ALWAYS)
POLICIES = (EVERYTHING, Policy())

PAGE = 5
LONG_AGO = 1_700_000_000_000
LATER = 1_000_000
"""The place of what happens only after the run."""

CONTENTS: tuple[dict[str, Any], ...] = (
    {},
    {"v": 1},
    {"v": 2, "of": [1.50, 2**60, "ü"]},
    {"long": "x" * 1300},  # more than a token carries
)

VIEW = """
select user_id, (extract(epoch from updated_at) * 1000)::bigint, private_metadata, public_metadata, unsafe_metadata
from clerk.user_metadata
"""


@dataclass(frozen=True)
class Step:
    """One thing that happens to one user, before the run (`at` 0) or before its call of that number. Its webhook
    arrives after each of `arrivals` more steps; never, where there are none. `lacks` are the kinds that it leaves out.
    """

    at: int
    what: str
    number: int
    kinds: tuple[int, int, int]
    arrivals: tuple[int, ...]
    lacks: frozenset[str]


@st.composite
def steps(draw: st.DrawFn, *, during: bool) -> Step:
    what = draw(st.sampled_from(["put", "put", "put", "same_ms", "sign_in", "delete"]))
    places = st.integers(0, 4) | st.just(LATER)
    return Step(
        at=draw(st.integers(1, 6)) if during else 0,
        # In the same millisecond as an answer nothing changes twice.
        what="put" if during and what == "same_ms" else what,
        number=draw(st.integers(0, 19)),
        kinds=draw(st.tuples(*[st.integers(0, len(CONTENTS) - 1)] * 3)),
        # What happens during a run is after what it has read: only its webhook, or the next run, can tell.
        arrivals=tuple(draw(st.lists(places, min_size=1 if during else 0, max_size=2))),
        lacks=frozenset() if during else draw(st.frozensets(st.sampled_from(METADATA), max_size=2)),
    )


# Else nobody of whom webhooks told may be left, and then every run is refused: the key may be that of another instance.
PROVES_THE_KEY = Step(0, "put", 99, (0, 0, 0), (0,), frozenset())


@dataclass
class World:
    """Clerk, whose users live through the steps, and the webhooks that are under way."""

    clerk: StandIn
    connection: Connection
    policy: Policy
    now: Callable[[], int]
    under_way: list[tuple[int, bytes]] = field(default_factory=list)
    emitted: list[bytes] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    made: int = 0
    happened: int = 0

    def live(self, step: Step) -> None:
        """Let one thing happen, and whatever webhook has come to arrive."""
        body = self._happen(step)
        self.happened += 1
        if body is not None:
            self.emitted.append(body)
            self.under_way += [(LATER if after == LATER else self.happened + after, body) for after in step.arrivals]
        self.arrive(self.happened)

    def arrive(self, until: int) -> None:
        """Deliver what is due, the latest first."""
        due = [body for place, body in self.under_way if place <= until]
        self.under_way = [(place, body) for place, body in self.under_way if place > until]
        if due:
            deliver(self.connection, *reversed(due), policy=self.policy)

    def _happen(self, step: Step) -> bytes | None:
        user_id = self.names.get(step.number)
        at = self.now() + self.happened
        values = dict(zip(METADATA, (CONTENTS[kind] for kind in step.kinds), strict=True))
        if step.what == "delete":
            if user_id is None:
                return None
            self.clerk.delete(self.names.pop(step.number))
            return deleted(user_id, at)
        if user_id is None:
            self.made += 1
            user_id = self.names[step.number] = f"user_{step.number}of{self.made}"  # ids aren't used again
            self.clerk.put({"id": user_id, "created_at": at, "updated_at": at, **values})
        else:
            self._update(user_id, at, step, values)
        user = json.loads(self.clerk.users[user_id])
        told = {name: value for name, value in user.items() if name not in step.lacks}
        # In one millisecond, too, what comes later says so: nothing else tells which of two events is the newer one.
        return envelope("user.updated", told, max(at, user["updated_at"]) + 15)

    def _update(self, user_id: str, at: int, step: Step, values: dict[str, Any]) -> None:
        old = json.loads(self.clerk.users[user_id])
        # In the same millisecond, that is: not in one that a run has compared long ago.
        same = step.what == "same_ms" and old["updated_at"] >= self.now()
        version = old["updated_at"] if same else max(at, old["updated_at"] + 1)
        kept = values if step.what != "sign_in" else {}
        self.clerk.put({**old, **kept, "updated_at": version})

    def expected(self) -> dict[str, tuple[Any, ...]]:
        """The rows that applications are to see, by what is parsed of Clerk's JSON and decided alone."""
        rows: dict[str, tuple[Any, ...]] = {}
        for user_id, raw in self.clerk.users.items():
            parsed = parse_user(raw, None)
            assert isinstance(parsed, UserChanged)
            decision = users.weigh(self.policy, parsed).decision
            user = json.loads(raw)
            rows[user_id] = (
                user["updated_at"],
                user["private_metadata"] if decision.private else None,
                user["public_metadata"] if decision.public else None,
                user["unsafe_metadata"] if decision.unsafe else None,
            )
        return rows

    def heard_of(self) -> set[str]:
        """Everybody whom we have had, the deleted ones among them."""
        return {user_id for (user_id,) in self.connection.execute("select user_id from clerk.users")}

    def rows(self) -> dict[str, tuple[Any, ...]]:
        return {user_id: tuple(rest) for user_id, *rest in self.connection.execute(VIEW)}


@pytest.fixture(scope="module")
def clerk() -> Iterator[StandIn]:
    with StandIn(LIVE, limit=10_000_000) as standin:
        yield standin


@pytest.fixture
def connections(connect: Callable[[], Connection]) -> tuple[Connection, Connection]:
    """The run's, and the worker's."""
    return connect(), connect()


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sweep, reconciling):
        monkeypatch.setattr(module, "MOST_USERS", PAGE)
    monkeypatch.setattr(users, "warn", lambda *_: None)  # of so many users, pytest would keep each
    monkeypatch.setattr(reconciling, "OVERLAP", 1)
    monkeypatch.setattr(reconciling, "ENOUGH", PAGE - 1)


def anew(clerk: StandIn, connection: Connection, policy: Policy, now: Callable[[], int]) -> World:
    clerk.before = None
    for user_id in clerk.users:
        clerk.delete(user_id)
    connection.execute(EMPTY)
    return World(clerk, connection, policy, now)


@contextlib.contextmanager
def between_calls(world: World, history: list[Step]) -> Iterator[None]:
    """Let each step happen before its call of the block, or at the end of the block."""
    calls = iter(range(1, 1_000_000))
    waiting = list(history)
    alone = threading.Lock()

    def before(_: Call) -> None:
        with alone:
            number = next(calls)
            for step in [step for step in waiting if step.at == number]:
                waiting.remove(step)
                world.live(step)

    world.clerk.before = before
    yield
    world.clerk.before = None
    for step in waiting:
        world.live(step)
    world.arrive(LATER)


def at_once(_: float) -> None:
    """Wait for nothing."""


def confirm(world: World, api: ClerkApi, heard_of: set[str]) -> None:
    """Our users are those of Clerk, but for who was there and gone before we heard of them at all: of those a late
    webhook may still tell, and another run finds out."""
    rows, expected = world.rows(), world.expected()
    unheard = rows.keys() - expected.keys()
    assert not unheard & heard_of
    assert {user_id: row for user_id, row in rows.items() if user_id not in unheard} == expected
    drift = check(world.connection, world.policy, api, key=KEY, sleep=at_once)
    assert {name for name in drift.counts if drift.counts[name]} <= {"same", "gone"}
    assert set(drift.named["gone"]) == unheard
    if unheard:
        reconcile(world.connection, world.policy, api, key=KEY, sleep=at_once)
        assert world.rows() == expected


@given(
    before=st.lists(steps(during=False), min_size=1, max_size=25),
    during=st.lists(steps(during=True), max_size=5),
    policy=st.sampled_from(POLICIES),
    data=st.data(),
)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_after_one_whole_full_run_our_users_are_those_of_clerk_and_nothing_late_changes_them(
    *,
    clerk: StandIn,
    api: ClerkApi,
    connections: tuple[Connection, Connection],
    before: list[Step],
    during: list[Step],
    policy: Policy,
    data: st.DataObject,
) -> None:
    ours, workers = connections
    world = anew(clerk, workers, policy, lambda: LONG_AGO)
    world.live(PROVES_THE_KEY)
    for step in before:
        world.live(step)
    world.now = now_ms
    with between_calls(world, during):
        run = reconcile(ours, policy, api, key=KEY, full=True, sleep=at_once)
        heard_of = world.heard_of()
    assert (run.kind, run.state) == ("full", "done")
    confirm(world, api, heard_of)
    heard_of = world.heard_of()
    deliver(workers, *data.draw(st.permutations(world.emitted)), policy=policy)
    confirm(world, api, heard_of)


@given(
    first=st.integers(PAGE, 4 * PAGE),
    before=st.lists(steps(during=False), max_size=15),
    during=st.lists(steps(during=True), max_size=5),
    policy=st.sampled_from(POLICIES),
)
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_after_an_incremental_run_too(
    *,
    clerk: StandIn,
    api: ClerkApi,
    connections: tuple[Connection, Connection],
    first: int,
    before: list[Step],
    during: list[Step],
    policy: Policy,
) -> None:
    ours, workers = connections
    world = anew(clerk, workers, policy, lambda: LONG_AGO)
    world.live(PROVES_THE_KEY)
    for number in range(first):
        world.live(Step(0, "put", number, (1, 1, 1), (), frozenset()))
    reconcile(ours, policy, api, key=KEY, full=True, sleep=at_once)
    assert world.rows() == world.expected()
    began = now_ms() - 5_000
    world.now = lambda: began
    for step in before:
        world.live(step)
    world.now = now_ms
    with between_calls(world, during):
        run = reconcile(ours, policy, api, key=KEY, sleep=at_once)
        heard_of = world.heard_of()
    assert run.state == "done"
    confirm(world, api, heard_of)


def test_whom_clerk_counted_and_a_webhook_erased_makes_up_for_nobody(
    clerk: StandIn, api: ClerkApi, connections: tuple[Connection, Connection]
) -> None:
    """A user's deletion was lost; another signs up before Clerk counts, and is gone before we do."""
    ours, workers = connections
    policy = Policy(Copy.ALWAYS, Copy.ALWAYS, Copy.ALWAYS)

    def step(at: int, what: str, arrivals: tuple[int, ...]) -> Step:
        return Step(at, what, 0, (0, 0, 0), arrivals, frozenset())

    world = anew(clerk, workers, policy, lambda: LONG_AGO)
    world.live(PROVES_THE_KEY)
    for number in range(2 * PAGE):
        world.live(Step(0, "put", number, (1, 1, 1), (), frozenset()))
    reconcile(ours, policy, api, key=KEY, full=True, sleep=at_once)
    began = now_ms() - 5_000
    world.now = lambda: began
    world.live(step(0, "delete", ()))
    world.now = now_ms
    with between_calls(world, [step(1, "put", (0,)), step(2, "delete", (0,))]):
        run = reconcile(ours, policy, api, key=KEY, sleep=at_once)
    assert (run.kind, run.cause) == ("full", "counts")
    assert world.rows() == world.expected()
