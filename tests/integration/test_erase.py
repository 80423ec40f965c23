"""Erasing a user by hand: what `user.deleted` does, and what it says of it."""

from __future__ import annotations

from tests.events import changed, deleted, incoming
from worker import inbox, sync, users
from worker.db import Connection
from worker.policy import Policy
from worker.users import Erased


def deliver(connection: Connection, *bodies: bytes) -> sync.Batch:
    inbox.record(connection, [incoming(body) for body in bodies])
    return sync.drain_batch(connection, Policy())


def test_everything_kept_of_the_user_is_erased_and_nothing_of_others(db: Connection) -> None:
    deliver(db, changed(private={"v": 1}, public={"bio": "x" * 1500}), changed("user_b", private={"v": 2}))
    inbox.record(db, [incoming(changed(private="not an object"), "msg_dead"), incoming(changed(version=5), "msg_next")])
    kinds = ("private_metadata", "public_metadata", "unsafe_metadata")
    assert users.erase(db, "user_a") == Erased(was_deleted=False, user=True, kinds=kinds, dead_bodies=1, pending=1)
    assert db.execute("select user_id from clerk.user_metadata").fetchall() == [("user_b",)]
    assert db.execute("select user_id from clerk.user_contents").fetchall() == [("user_b",)]
    left = "select profile_bytes, public_fields, unsafe_fields from clerk.users where user_id = 'user_a'"
    assert db.execute(left).fetchone() == (None, None, None)
    dead = inbox.show(db, "msg_dead")
    assert dead is not None
    assert dead.body_bytes is None


def test_nothing_brings_an_erased_user_back(db: Connection) -> None:
    deliver(db, changed(version=1))
    users.erase(db, "user_a")
    assert deliver(db, changed(version=4_000_000_000_000)).outcomes["deleted"] == 1
    assert db.execute("select count(*) from clerk.user_metadata").fetchone() == (0,)


def test_a_user_who_was_deleted_before_stays_so(db: Connection) -> None:
    deliver(db, changed(), deleted(timestamp=1_700_000_000_000))
    when = "select deleted_at from clerk.users where user_id = 'user_a'"
    before = db.execute(when).fetchone()
    assert users.erase(db, "user_a").was_deleted
    assert db.execute(when).fetchone() == before


def test_a_user_nobody_has_heard_of_gets_a_tombstone(db: Connection) -> None:
    assert users.erase(db, "user_new") == Erased(was_deleted=False, user=False, kinds=(), dead_bodies=0, pending=0)
    assert deliver(db, changed("user_new")).outcomes["deleted"] == 1
