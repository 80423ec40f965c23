"""What is kept of each user's weight, who crosses the budget, and deciding again after the template changed."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from psycopg import sql

from tests.events import ABSENT, changed, deleted, incoming
from tests.waiting import until
from worker import inbox, sync, users
from worker.claims import render
from worker.db import Connection
from worker.events import PROFILE, UserChanged, parse_event
from worker.policy import Copy, Policy
from worker.template import parse_template

ROLE_ONLY = Policy(template=parse_template('{"role": "{{user.public_metadata.role}}"}'))
BIG = {"bio": "x" * 1500, "role": "admin"}


def deliver(connection: Connection, *bodies: bytes, policy: Policy | None = None) -> sync.Batch:
    inbox.record(connection, [incoming(body) for body in bodies])
    return sync.drain_batch(connection, policy or Policy())


def kept(connection: Connection, columns: str, user_id: str = "user_a") -> Any:
    query = "select {} from clerk.users left join clerk.user_contents using (user_id) where user_id = %s"
    return connection.execute(sql.SQL(query).format(sql.SQL(columns)), (user_id,)).fetchone()


def user(body: bytes) -> UserChanged:
    parsed = parse_event(body)
    assert isinstance(parsed, tuple)
    assert isinstance(parsed[1], UserChanged)
    return parsed[1]


def test_names_and_sizes_of_fields_are_kept_and_no_values(db: Connection) -> None:
    deliver(db, changed(public={"role": "ädmin", "n": [1, 2]}, unsafe={"theme": None}))
    assert kept(db, "public_fields, unsafe_fields, public_bytes, unsafe_bytes") == (
        {"role": 8, "n": 5},
        {"theme": 4},
        len('{"role":"ädmin","n":[1,2]}'.encode()),
        len('{"theme":null}'),
    )
    (profile,) = kept(db, "profile_bytes")
    assert dict(zip(PROFILE, profile, strict=True))["first_name"] == len('"Ada"')


def test_a_new_name_moves_the_weights_and_touches_no_metadata(db: Connection) -> None:
    deliver(db, changed(version=1, private={"v": 1}))
    where = "select ctid, xmin from clerk.user_contents"
    before = db.execute(where).fetchall()
    batch = deliver(db, changed(version=2, private={"v": 1}).replace(b'"Ada"', b'"Ada Augusta"'))
    assert batch.outcomes["unchanged"] == 1
    assert kept(db, "profile_bytes")[0][0] == len('"Ada Augusta"')
    assert db.execute(where).fetchall() == before


def test_crossing_the_budget_is_told_once_for_each_crossing(db: Connection) -> None:
    def crossings(version: int, public: Any) -> list[str]:
        batch = deliver(db, changed(version=version, public=public))
        return [crossing.user_id for crossing in batch.crossings]

    assert crossings(1, {"role": "admin"}) == []
    assert crossings(2, BIG) == ["user_a"]
    assert crossings(3, BIG) == []
    assert crossings(4, {**BIG, "more": 1}) == []
    assert crossings(5, {}) == []
    assert crossings(6, BIG) == ["user_a"]
    assert crossings(1, {**BIG, "older": 1}) == []


def test_a_user_who_begins_over_the_budget_has_crossed_it(db: Connection) -> None:
    (crossing,) = deliver(db, changed(public=BIG)).crossings
    assert crossing.claims_bytes == len(render(Policy().template, user(changed(public=BIG)), {}))
    assert crossing.heaviest == ("public_metadata.bio", "public_metadata.role")


def test_the_warning_names_fields_but_only_plain_ones(db: Connection, caplog: pytest.LogCaptureFixture) -> None:
    unsafe = {"ada@example.com": "x" * 900, "theme": "y" * 500, "line\nbreak": "z" * 700, "sk_live_51H8abc": "w" * 400}
    inbox.record(db, [incoming(changed(unsafe=unsafe))])
    with caplog.at_level(logging.WARNING, "worker.users"):
        sync.drain(db, Policy())
    (record,) = [record for record in caplog.records if "budget" in record.getMessage()]
    said = record.__dict__
    assert (said["user_id"], said["budget"]) == ("user_a", 1200)
    assert said["claims_bytes"] == kept(db, "claims_bytes")[0]
    assert said["heaviest"] == "(odd name) (odd name) unsafe_metadata.theme"


def test_users_over_the_budget_are_counted(db: Connection) -> None:
    deliver(db, changed("user_a", public=BIG), changed("user_b", public=BIG), changed("user_c"))
    assert inbox.counts(db)["users_over_budget"] == 2
    deliver(db, deleted("user_a"), changed("user_b", version=1_800_000_000_000))
    assert inbox.counts(db)["users_over_budget"] == 0


def test_a_deletion_erases_the_names_of_fields_too(db: Connection) -> None:
    deliver(db, changed(public=BIG))
    deliver(db, deleted())
    assert kept(db, "profile_bytes, public_fields, unsafe_fields, public_bytes, claims_bytes, over_budget") == (
        None, None, None, 0, 0, False,
    )  # fmt: skip


def test_an_event_without_a_kind_is_weighed_with_what_is_known_of_it(db: Connection) -> None:
    deliver(db, changed(version=1, public=BIG, unsafe={"a": 1}))
    batch = deliver(db, changed(version=2, public=ABSENT, unsafe={"a": 22}))
    assert kept(db, "claims_bytes, over_budget, weighed_by") == (
        len(render(Policy().template, user(changed(public=BIG, unsafe={"a": 22})), {})),
        True,
        Policy().fingerprint,
    )
    assert batch.crossings == []
    assert deliver(db, changed("user_b", version=2, public={"a": 1}, unsafe=ABSENT)).crossings == []
    (crossing,) = deliver(db, changed("user_b", version=1, public={}, unsafe=BIG)).crossings
    assert crossing.user_id == "user_b"


def test_a_kind_that_is_wanted_but_was_never_brought_is_marked_as_missing(db: Connection) -> None:
    deliver(db, changed(version=1, public={"a": 1}))
    deliver(db, changed(version=2, public=ABSENT, unsafe=BIG))
    assert kept(db, "content_missing, public_metadata, unsafe_metadata is not null") == (True, None, True)
    deliver(db, changed(version=3, public={"a": 1}, unsafe=BIG))
    assert kept(db, "content_missing, public_metadata") == (False, {"a": 1})


def test_private_metadata_that_no_event_has_brought_since_it_is_wanted_is_missing(db: Connection) -> None:
    never = Policy(private=Copy.NEVER)
    deliver(db, changed(version=1, private={"plan": "pro"}), policy=never)
    deliver(db, changed(version=2, private=ABSENT), policy=Policy())
    assert kept(db, "content_missing, private_metadata") == (True, None)
    deliver(db, changed(version=3, private={"plan": "pro"}), policy=Policy())
    assert kept(db, "content_missing, private_metadata") == (False, {"plan": "pro"})


def test_a_sign_in_that_lacks_a_kind_changes_nothing(db: Connection) -> None:
    deliver(db, changed(version=1, public={"a": 1}))
    deliver(db, changed(version=2, public=ABSENT, unsafe={"b": 1}))
    assert deliver(db, changed(version=3, public=ABSENT, unsafe={"b": 1})).outcomes["unchanged"] == 1


def test_after_the_template_changed_users_are_weighed_and_decided_again(db: Connection) -> None:
    small, big = changed("user_small", public={"role": "admin"}), changed("user_big", public=BIG)
    deliver(db, small, big, changed("user_gone"), deleted("user_gone"))
    seen: list[int] = []
    done = users.reweigh_all(db, ROLE_ONLY, lambda batch: seen.append(batch.users))
    assert (done.users, done.over, done.dropped, done.missing) == (2, 0, 0, 1)
    assert sum(seen) == 2
    # The token carries the role alone now: what it no longer carries of user_small only Clerk has.
    columns = "claims_bytes, weighed_by, content_missing, public_metadata is not null, unsafe_metadata is not null"
    mine = ROLE_ONLY.fingerprint
    assert kept(db, columns, "user_small") == (len('{"role":"admin"}'), mine, True, False, False)
    assert kept(db, columns, "user_big") == (len('{"role":"admin"}'), mine, False, True, True)
    assert users.reweigh_all(db, ROLE_ONLY).users == 0


def test_copies_that_the_token_carries_now_are_dropped(db: Connection) -> None:
    deliver(db, changed(public={"a": 1}, unsafe={"b": 1}), policy=ROLE_ONLY)
    assert kept(db, "public_metadata, unsafe_metadata") == ({"a": 1}, {"b": 1})
    done = users.reweigh_all(db, Policy())
    assert (done.droppable, done.dropped) == (1, 0)
    assert kept(db, "public_metadata, unsafe_metadata") == ({"a": 1}, {"b": 1})
    assert users.reweigh_all(db, Policy(), drop=True).dropped == 1
    assert kept(db, "public_metadata, unsafe_metadata, private_metadata") == (None, None, {})
    assert users.reweigh_all(db, Policy(private=Copy.NEVER), drop=True).dropped == 1
    assert kept(db, "private_metadata") == (None,)


@pytest.mark.parametrize("pulled", [False, True])
def test_the_same_user_again_brings_what_is_missing(db: Connection, pulled: bool) -> None:
    body = changed(public={"role": "admin", "a": 1}, unsafe={"b": 1})
    deliver(db, body)
    assert users.reweigh_all(db, ROLE_ONLY).missing == 1
    if pulled:
        # The Backend API gives the user without an envelope's timestamp.
        again = replace(user(body), event_at=user(body).version)
        assert users.gate_users(db, ROLE_ONLY, [users.weigh(ROLE_ONLY, again)]).outcomes == ["applied"]
        assert users.gate_users(db, ROLE_ONLY, [users.weigh(ROLE_ONLY, again)]).outcomes == ["unchanged"]
    else:
        deliver(db, body, policy=ROLE_ONLY)
    assert kept(db, "content_missing, public_metadata, unsafe_metadata") == (
        False, {"role": "admin", "a": 1}, {"b": 1},
    )  # fmt: skip


def test_a_run_that_is_cut_short_leaves_the_rest_to_the_next_one(
    db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver(db, *(changed(f"user_{number}") for number in range(5)))
    monkeypatch.setattr(users, "REWEIGH_BATCH", 2)

    def cut_short(_: users.Reweighed) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        users.reweigh_all(db, ROLE_ONLY, cut_short)
    assert users.count(db, ROLE_ONLY.fingerprint).stale == 3
    assert users.reweigh_all(db, ROLE_ONLY).users == 3
    assert users.count(db, ROLE_ONLY.fingerprint) == (5, 0, 5)


def test_a_nested_path_is_weighed_exactly_where_its_json_is_kept(db: Connection) -> None:
    nested = replace(ROLE_ONLY, template=parse_template('{"c": "{{user.public_metadata.home.city}}"}'))
    body = changed(public={"home": {"city": "Zürich", "rest": "x" * 2000}})
    deliver(db, body, changed("user_b", public={"home": {"city": "Bern", "zip": 3000}}))
    assert users.reweigh_all(db, nested).over == 0
    assert kept(db, "claims_bytes, claims_exact") == (len('{"c":"Zürich"}'.encode()), True)
    # Of user_b only sizes are kept: an upper bound, until the next event.
    assert kept(db, "claims_bytes, claims_exact", "user_b") == (len('{"c":"Bern"}') + len(',"zip":3000'), False)
    deliver(db, changed("user_b", public={"home": {"city": "Bern", "zip": 3000}}), policy=nested)
    assert kept(db, "claims_bytes, claims_exact", "user_b") == (len('{"c":"Bern"}'), True)
    # What an event has weighed exactly stays exact.
    assert users.reweigh_all(db, nested, drop=True).users == 2
    assert kept(db, "claims_bytes, claims_exact", "user_b") == (len('{"c":"Bern"}'), True)


def test_the_same_event_brings_the_sizes_that_were_not_kept_before(db: Connection) -> None:
    body = changed(public={"role": "admin"})
    deliver(db, body)
    db.execute("update clerk.users set (profile_bytes, public_fields, unsafe_fields) = (null, null, null)")
    assert deliver(db, body).outcomes["unchanged"] == 1
    assert kept(db, "public_fields, profile_bytes is null") == ({"role": 7}, False)


def test_users_from_before_weights_were_kept_are_weighed_by_what_is_known(db: Connection) -> None:
    deliver(db, changed(public=BIG), changed("user_b", public={"role": "admin"}))
    before = kept(db, "claims_bytes"), kept(db, "claims_bytes", "user_b")
    db.execute(
        "update clerk.users set (profile_bytes, public_fields, unsafe_fields, weighed_by) = (null, null, null, null)"
    )
    db.execute("update clerk.users set over_budget = false, claims_bytes = 0")
    assert users.count(db, Policy().fingerprint) == (2, 2, 0)
    assert users.reweigh_all(db, Policy()).over == 1
    assert (kept(db, "claims_bytes"), kept(db, "claims_bytes", "user_b")) == before
    assert users.count(db, Policy().fingerprint) == (2, 0, 0)


def test_the_population_is_every_live_user(connect: Callable[[], Connection]) -> None:
    connection = connect()
    deliver(connection, changed("user_a", public=BIG), changed("user_b"), changed("user_c"), deleted("user_c"))
    found = {weighed.weights.user_id: weighed for weighed in users.population(connection, Policy().fingerprint)}
    assert sorted(found) == ["user_a", "user_b"]
    assert found["user_a"].current
    assert found["user_a"].weights.public.by_name == {"bio": 1502, "role": 7}
    assert found["user_a"].weights.public.unexplained == 0
    other = {weighed.weights.user_id: weighed for weighed in users.population(connection, ROLE_ONLY.fingerprint)}
    assert not other["user_a"].current


def test_deciding_again_waits_for_an_event_and_sees_what_it_brought(connect: Callable[[], Connection]) -> None:
    worker, operator = connect(), connect()
    deliver(worker, changed(version=1, public={"role": "admin"}), policy=ROLE_ONLY)
    inbox.record(worker, [incoming(changed(version=2, public={"role": "owner", "a": 1}))])
    with worker.transaction():
        sync.drain_batch(worker, ROLE_ONLY)
        thread = threading.Thread(target=users.reweigh_all, args=(operator, Policy()))
        thread.start()
        waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%no key update%'"
        watcher = connect()
        until(lambda: watcher.execute(waits).fetchone() == (1,), what="the second one to wait for the lock")
    thread.join(10)
    public = json.loads('{"role": "owner", "a": 1}')
    body = changed(version=2, public=public)
    assert kept(worker, "claims_bytes, public_metadata, weighed_by") == (
        len(render(Policy().template, user(body), {})), public, Policy().fingerprint,
    )  # fmt: skip


def test_a_population_that_is_not_read_to_its_end_leaves_the_connection_usable(
    connect: Callable[[], Connection],
) -> None:
    connection = connect()
    connection.execute(
        """
        insert into clerk.users (user_id, version, event_at, content_hash, content_changed, private_copied,
          public_copied, unsafe_copied, public_bytes, unsafe_bytes, claims_bytes)
        select 'user_' || n, 1, 1, n, true, true, false, false, 2, 2, 43 from generate_series(1, 20000) as n
        """
    )
    people = users.population(connection, Policy().fingerprint)
    assert not next(people).current
    people.close()
    assert users.count(connection, Policy().fingerprint) == (20_000, 20_000, 0)
    assert connection.execute("show statement_timeout").fetchone() != ("0",)
