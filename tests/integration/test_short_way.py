"""Sign-ins, which bring what is there already: they move the version alone, and end in the same row as the long way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.events import ABSENT, changed, deleted, incoming
from worker import inbox, sync, users
from worker.db import Connection
from worker.policy import Copy, Policy
from worker.template import parse_template

Connect = Callable[[], Connection]

EVERYTHING = Policy(Copy.ALWAYS, Copy.ALWAYS, Copy.ALWAYS)

ROWS = """
select to_jsonb(users) - 'synced_at' - 'content_changed' - 'crossed' - 'sent_hash',
  to_jsonb(user_contents)
from clerk.users left join clerk.user_contents using (user_id)
order by user_id
"""


def deliver(connection: Connection, *bodies: bytes, policy: Policy | None = None, wait: bool = False) -> sync.Batch:
    inbox.record(connection, [incoming(body) for body in bodies])
    return sync.drain_batch(connection, policy or Policy(), wait=wait)


def outcomes(batch: sync.Batch) -> dict[str, int]:
    return {outcome: count for outcome, count in batch.outcomes.items() if count}


def version(connection: Connection) -> Any:
    return connection.execute("select version from clerk.users").fetchall()


@contextmanager
def no_long_way(connection: Connection) -> Iterator[None]:
    """Whoever goes through the whole gate now fails."""
    connection.execute("alter function clerk.gate_users rename to gate_elsewhere")
    try:
        yield
    finally:
        connection.execute("alter function clerk.gate_elsewhere rename to gate_users")


def test_a_sign_in_moves_the_version_and_is_neither_weighed_nor_written(connect: Connect) -> None:
    connection = connect()
    deliver(connection, changed(version=1, private={"a": 1}))
    with no_long_way(connection):
        batch = deliver(connection, changed(version=2, private={"a": 1}))
    assert (outcomes(batch), batch.claimed, len(batch.freshness)) == ({"unchanged": 1}, 1, 1)
    assert version(connection) == [(2,)]


def test_every_event_of_a_user_who_signed_in_several_times_is_counted_once(connect: Connect) -> None:
    connection = connect()
    deliver(connection, changed(version=1))
    batch = deliver(connection, changed(version=2), changed(version=3), changed(version=4))
    assert (outcomes(batch), batch.claimed) == ({"unchanged": 1, "superseded": 2}, 3)
    assert version(connection) == [(4,)]


def test_who_is_held_by_another_is_put_back_as_it_was_and_takes_the_long_way_next(connect: Connect) -> None:
    connection, other, watch = connect(), connect(), connect()
    deliver(connection, changed("user_a", 1), changed("user_b", 1))
    with other.transaction():
        other.execute("select from clerk.users where user_id = 'user_a' for update")
        body = changed("user_a", 2)
        inbox.record(watch, [incoming(body, "msg_held"), incoming(changed("user_b", 2))])
        batch = sync.drain_batch(connection, Policy())
        assert (batch.claimed, batch.left, outcomes(batch)) == (1, 1, {"unchanged": 1})
    shown = inbox.show(watch, "msg_held")
    assert shown is not None
    assert (shown.state, shown.attempts, shown.body_bytes, shown.processed_at) == ("pending", 0, len(body), None)
    assert sync.drain(connection, Policy()) == 1
    assert version(connection) == [(2,), (2,)]


def test_a_drain_that_put_something_back_waits_for_it_instead_of_asking_again_and_again(connect: Connect) -> None:
    connection, other = connect(), connect()
    deliver(connection, changed(version=1))
    batches: list[sync.Batch] = []

    def let_go(batch: sync.Batch) -> None:
        batches.append(batch)
        other.rollback()

    with other.transaction(force_rollback=True):
        other.execute("select from clerk.users for update")
        inbox.record(connect(), [incoming(changed(version=2))])
        done = sync.drain_batch(connection, Policy())
        assert (done.claimed, done.left) == (0, 1)
        connection.execute("set lock_timeout = 50")
        with pytest.raises(Exception, match="lock timeout"):
            sync.drain(connection, Policy(), observe=batches.append)
    assert [(batch.claimed, batch.left) for batch in batches] == [(0, 1)], "once, and then it waited"
    assert sync.drain(connection, Policy()) == 1


ROLE = Policy(template=parse_template('{"name": "{{user.first_name}}", "role": "{{user.public_metadata.role}}"}'))


@pytest.mark.parametrize(
    ("second", "policy"),
    [
        pytest.param(changed(version=2).replace(b"Ada", b"Augusta"), ROLE, id="another name weighs otherwise"),
        pytest.param(changed(version=2), EVERYTHING, id="other settings decide anew"),
        pytest.param(changed(version=2, unsafe=ABSENT), ROLE, id="a kind is absent"),
        pytest.param(changed(version=1, timestamp=99), ROLE, id="the same version"),
        pytest.param(changed(version=0), ROLE, id="an older version"),
    ],
)
def test_what_may_change_the_row_takes_the_long_way(connect: Connect, second: bytes, policy: Policy) -> None:
    connection = connect()
    deliver(connection, changed(version=1), policy=ROLE)
    with no_long_way(connection), pytest.raises(Exception, match="gate_users"):
        deliver(connection, second, policy=policy)


def test_after_a_deletion_nothing_tells_what_was_sent_before(connect: Connect) -> None:
    connection = connect()
    deliver(connection, changed(version=1))
    deliver(connection, deleted(timestamp=2))
    assert connection.execute("select sent_hash from clerk.users").fetchone() == (None,)
    assert outcomes(deliver(connection, changed(version=3))) == {"deleted": 1}


def test_a_copy_that_is_not_wanted_any_more_goes_with_the_next_sign_in(connect: Connect) -> None:
    connection = connect()
    deliver(connection, changed(version=1, public={"a": 1}), policy=EVERYTHING)
    users.reweigh_all(connection, Policy())
    deliver(connection, changed(version=2, public={"a": 1}))
    assert connection.execute("select public_metadata from clerk.user_contents").fetchone() == (None,)


kinds = st.sampled_from([ABSENT, {}, {"role": "a"}, {"role": "b" * 600}])
histories = st.lists(
    st.one_of(
        st.builds(
            changed,
            st.sampled_from(["user_a", "user_b"]),
            st.integers(1, 6),
            timestamp=st.one_of(st.none(), st.integers(1, 6)),
            private=kinds,
            public=kinds,
            unsafe=kinds,
        ),
        st.builds(deleted, st.just("user_b"), st.integers(1, 6)),
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(histories, st.lists(st.sampled_from([Policy(), ROLE, EVERYTHING]), min_size=8, max_size=8))
def test_any_history_ends_in_the_same_rows_by_the_short_way_as_by_the_long_one(
    connection: Connection, history: list[bytes], policies: list[Policy]
) -> None:
    ends = []
    for wait in (False, True):
        with connection.transaction(force_rollback=True):
            for body, policy in zip(history, policies, strict=False):
                deliver(connection, body, policy=policy, wait=wait)
            ends.append(connection.execute(ROWS).fetchall())
    assert ends[0] == ends[1]
