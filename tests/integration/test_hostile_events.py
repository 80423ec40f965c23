"""Hostile events from the door to the view: each is applied or set aside, nobody else notices, and what is read is what
was sent up to the documented replacement, by Python's json and Decimal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

import pytest

from tests.events import changed, incoming
from tests.hostile import BROKEN, DEEP_ELSEWHERE, NOT_UTF8, event, metadata
from tests.integration.test_webhooks import Receiver
from tests.unit.test_jsontext import MARK, Cleaner, Number, Pairs, read
from worker import inbox, sync, users
from worker.db import Connection
from worker.jsontext import DEPTH
from worker.policy import Copy, Policy

HONEST: Final = 100
LEVELS_ABOVE: Final = 2
"""The envelope and `data`: so many levels fewer may stand in metadata."""

METADATA: Final = metadata(64 * 1024)
NESTED: Final = {name for name in METADATA if name.startswith("nested")}  # Python's json is recursive


def body_of(user_id: str, unsafe: bytes) -> bytes:
    return event(unsafe).replace(b"user_p", user_id.encode())


def plain(value: object) -> object:
    """As jsonb holds it: of equal keys the last, and numbers by their value."""
    match value:
        case Pairs():
            return {key: plain(item) for key, item in value}
        case list():
            return [plain(item) for item in value]
        case Number():
            return ("number", Decimal(value))
    return value


def only_the_first(value: Any) -> object:
    """Without the numbers that would be written out when 100,000 digits already are. All are of one length."""
    ((key, numbers),) = value
    longest = len(f"{Decimal(numbers[0]):f}".lstrip("-").replace(".", "")) - len(numbers[0])
    held = 100_000 // longest
    return Pairs([(key, [*numbers[:held], *([MARK] * (len(numbers) - held - 1)), numbers[-1]])])


def states(connection: Connection) -> dict[str, int]:
    query = "select state, count(*)::int from clerk.webhook_events group by state"
    return dict(connection.execute(query).fetchall())


def record_honest(connection: Connection, number: int = HONEST) -> None:
    inbox.record(connection, [incoming(changed(f"user_{n}", private={"n": n})) for n in range(number)])


def assert_honest(connection: Connection, number: int = HONEST) -> None:
    rows = connection.execute(
        "select user_id, private_metadata->>'n' from clerk.user_metadata where private_metadata ? 'n'"
    ).fetchall()
    assert dict(rows) == {f"user_{n}": str(n) for n in range(number)}


def test_every_hostile_metadata_is_accepted_applied_and_read_as_it_was_sent(
    database_url: str, connect: Callable[[], Connection]
) -> None:
    connection = connect()
    policy = Policy(unsafe=Copy.ALWAYS)
    names = {f"user_hostile_{n}": name for n, name in enumerate(METADATA)}
    with Receiver(database_url) as receiver:
        for user_id, name in names.items():
            assert receiver.post(body_of(user_id, METADATA[name])).status_code == 202, name
        record_honest(connection)
        sync.drain(connection, policy)
    assert states(connection) == {"done": len(METADATA) + HONEST}
    assert_honest(connection)
    for user_id, name in names.items():
        if name in NESTED:
            continue
        (held,) = connection.execute(
            "select unsafe_metadata::text from clerk.user_metadata where user_id = %s", (user_id,)
        ).fetchone() or ("",)
        expected = Cleaner(DEPTH - LEVELS_ABOVE).value(read(METADATA[name].decode()))
        if name.startswith("exponents that write out"):
            expected = only_the_first(expected)
        assert plain(read(held)) == plain(expected), name


def test_what_is_no_event_is_set_aside_at_the_door_or_refused(
    database_url: str, connect: Callable[[], Connection]
) -> None:
    with Receiver(database_url) as receiver:
        for name, body in BROKEN.items():
            answer = receiver.post(body)
            assert (answer.status_code, answer.json) == (202, {"status": "dead"}), name
        for name, body in NOT_UTF8.items():
            answer = receiver.post(body)
            assert answer.status_code == 400, name
        for body in DEEP_ELSEWHERE:
            assert receiver.post(body).status_code == 202
    assert states(connect())["dead"] >= len(BROKEN)


def test_what_got_into_the_inbox_all_the_same_is_set_aside_by_the_worker(connect: Callable[[], Connection]) -> None:
    connection = connect()
    bodies = [*BROKEN.values(), *NOT_UTF8.values()]
    inbox.record(
        connection,
        [
            inbox.Incoming(f"msg_poison_{n}", datetime.now(UTC), body, "user.updated", "user_p", 5)
            for n, body in enumerate(bodies)
        ],
    )
    record_honest(connection)
    done = sync.drain_batch(connection, Policy())
    assert (done.claimed, len(done.dead)) == (len(bodies) + HONEST, len(bodies))
    assert_honest(connection)


REFUSED: Final = "alter table clerk.users add constraint refused check (user_id not like 'user_poison%%')"


@pytest.fixture
def refusing(connect: Callable[[], Connection]) -> Iterator[None]:
    """A Postgres that refuses some users for a reason that nobody thought of."""
    connect().execute(REFUSED)
    yield
    connect().execute("alter table clerk.users drop constraint refused")


def record_poison(connection: Connection, number: int) -> None:
    inbox.record(connection, [incoming(changed(f"user_poison_{n}")) for n in range(number)])


@pytest.mark.usefixtures("refusing")
def test_poison_in_every_row_of_a_batch_delays_the_honest_ones_by_seconds(connect: Callable[[], Connection]) -> None:
    connection = connect()
    record_poison(connection, sync.BATCH - 1)
    record_honest(connection)
    started = time.monotonic()
    assert sync.drain(connection, Policy()) == sync.BATCH - 1 + HONEST
    assert time.monotonic() - started < 10
    assert states(connection) == {"dead": sync.BATCH - 1, "done": HONEST}
    assert_honest(connection)


def test_an_event_that_fails_in_our_own_code_is_set_aside_alone(
    connect: Callable[[], Connection], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    connection = connect()
    record_poison(connection, 1)
    record_honest(connection)
    honest = users.weigh

    def weigh(policy: Policy, user: Any) -> users.Change:
        if user.user_id == "user_poison_0":
            raise OverflowError("c4nary")
        return honest(policy, user)

    monkeypatch.setattr(users, "weigh", weigh)
    done = sync.drain_batch(connection, Policy())
    assert list(done.dead.values()) == ["clerk-sync fails on it: OverflowError"]
    assert_honest(connection)
    # What was raised is in the record for its place alone: the formatter leaves its text out.
    assert "c4nary" not in str([record.getMessage() for record in caplog.records])
