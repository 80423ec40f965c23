"""clerk.put_user: an application puts a User that it holds, through the same gate, and reads its own write at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.events import ABSENT, changed, deleted
from tests.integration.test_gate import deliver
from worker import db as database
from worker import users
from worker.claims import render, weigh_kind
from worker.db import Connection
from worker.events import UserChanged, parse_user
from worker.policy import Copy, Policy
from worker.sweeper import Drainer
from worker.template import parse_template

Connect = Callable[[], Connection]

EVERYTHING: Final = Policy(Copy.ALWAYS, Copy.ALWAYS, Copy.ALWAYS)
VERSION: Final = 1_700_000_000_000


@pytest.fixture
def db(db: Connection) -> Connection:
    """One transaction, where a worker has said that it copies by the defaults."""
    users.record_policy(db, Policy())
    return db


def clerk_user(user_id: str = "user_a", version: int = VERSION, **fields: Any) -> dict[str, Any]:
    """A User of Clerk's Backend API."""
    kinds: dict[str, Any] = {"private_metadata": {}, "public_metadata": {}, "unsafe_metadata": {}}
    return {"object": "user", "id": user_id, "first_name": "Ada", "updated_at": version} | kinds | fields


def put(connection: Connection, user: object) -> Any:
    text = user if isinstance(user, str) else json.dumps(user)
    ((outcome,),) = connection.execute("select clerk.put_user(%s::jsonb)", (text,)).fetchall()
    return outcome


ROW = """
select private_metadata, public_metadata, unsafe_metadata, (extract(epoch from updated_at) * 1000)::bigint
from clerk.user_metadata where user_id = %s
"""


def row(connection: Connection, user_id: str = "user_a") -> Any:
    return connection.execute(ROW, (user_id,)).fetchone()


def all_of(connection: Connection) -> Any:
    """Everything but what came last and when."""
    rows = "select to_jsonb(users) - '{synced_at,content_changed,crossed}'::text[] from clerk.users order by user_id"
    contents = "select to_jsonb(user_contents) from clerk.user_contents order by user_id"
    return connection.execute(rows).fetchall(), connection.execute(contents).fetchall()


# --- What it does


def test_a_new_user_is_there_at_once(db: Connection) -> None:
    user = clerk_user(private_metadata={"plan": "pro"}, public_metadata={"role": "admin"})
    assert put(db, user) == "applied"
    assert row(db) == ({"plan": "pro"}, {"role": "admin"}, {}, VERSION)
    assert put(db, user) == "unchanged"
    assert put(db, clerk_user(version=VERSION - 1, private_metadata={"plan": "old"})) == "older"
    assert put(db, clerk_user(version=VERSION + 1, private_metadata={"plan": "new"})) == "applied"
    assert row(db) == ({"plan": "new"}, {}, {}, VERSION + 1)


def test_nobody_is_revived(db: Connection) -> None:
    put(db, clerk_user())
    deliver(db, deleted())
    assert put(db, clerk_user(version=VERSION * 2)) == "deleted"
    assert row(db) is None


def test_an_absent_kind_leaves_ours_and_null_empties_it(db: Connection) -> None:
    put(db, clerk_user(private_metadata={"plan": "pro"}))
    user = clerk_user(version=VERSION + 1)
    del user["private_metadata"]
    assert put(db, user) == "applied"
    assert row(db)[0] == {"plan": "pro"}
    put(db, clerk_user(version=VERSION + 2, private_metadata=None))
    assert row(db)[0] == {}


def test_json_comes_back_as_it_was_sent(db: Connection) -> None:
    text = '{"big": 9007199254740993, "d": 1.10, "Ключ ": "\U0001f600"}'
    user = json.dumps(clerk_user(private_metadata="?")).replace('"?"', text)
    put(db, user)
    assert db.execute("select private_metadata::text from clerk.user_metadata").fetchone() == (
        '{"d": 1.10, "big": 9007199254740993, "Ключ ": "\U0001f600"}',
    )


def test_a_recorded_answer_of_clerks_api_is_taken(db: Connection, data: Path) -> None:
    text = (data / "backend_api__get_user.json").read_text(encoding="utf-8")
    assert put(db, text) == "applied"
    user = json.loads(text)
    assert row(db, user["id"])[0] == user["private_metadata"]


def camel(value: Any) -> Any:
    """The keys as Clerk's JavaScript SDK has them, but for those of metadata."""

    def name(key: str) -> str:
        first, *rest = key.split("_")
        return first + "".join(word.capitalize() for word in rest)

    if isinstance(value, list):
        return [camel(item) for item in value]
    if isinstance(value, dict):
        return {name(key): item if key.endswith("_metadata") else camel(item) for key, item in value.items()}
    return value


def test_what_the_javascript_sdk_serialises_to_is_the_same_user(db: Connection, data: Path) -> None:
    user = json.loads((data / "backend_api__get_user.json").read_text(encoding="utf-8"))
    user["private_metadata"] = {"camelCase": {"snake_case": 1}}
    put(db, user)
    snake = all_of(db)
    db.rollback()
    users.record_policy(db, Policy())
    objects = {key: value for key, value in camel(user).items() if key != "object"}
    assert put(db, objects) == "applied"
    assert all_of(db) == snake
    # Its instances carry what was read as well, and that is what counts.
    assert put(db, objects | {"_raw": user | {"updated_at": user["updated_at"] + 1}}) == "unchanged"
    assert row(db, user["id"])[3] == user["updated_at"] + 1


@pytest.mark.parametrize("timestamp", [VERSION, VERSION // 1000, VERSION + 15])
@pytest.mark.parametrize("put_first", [True, False])
def test_a_webhook_of_the_same_version_has_the_last_word(db: Connection, timestamp: int, put_first: bool) -> None:
    """As where JavaScript lost digits of a number; whatever the webhook's envelope says, in which examples differ."""
    event = changed(version=VERSION, timestamp=timestamp, private={"n": 0}).replace(b'"n": 0', b'"n": 9007199254740993')
    lossy = clerk_user(private_metadata={"n": 9007199254740992})
    for is_put in (put_first, not put_first):
        if is_put:
            put(db, lossy)
        else:
            deliver(db, event)
    assert row(db)[0] == {"n": 9007199254740993}


@pytest.mark.parametrize("contacts", ["absent", None, {}, "?", [None, 1, {}, {"id": "idn_a"}]])
def test_what_a_profile_is_made_of_never_stands_in_the_way(db: Connection, contacts: Any) -> None:
    profile: dict[str, Any] = {}
    if contacts != "absent":
        profile = {"email_addresses": contacts, "phone_numbers": contacts}
    ids: dict[str, Any] = {"primary_email_address_id": "idn_a", "primary_phone_number_id": "idn_a"}
    for mode in ("force_custom_plan", "force_generic_plan"):
        db.execute("select set_config('plan_cache_mode', %s, true)", (mode,))
        assert put(db, clerk_user(f"user_{mode}", **profile, **ids)) == "applied"
        assert put(db, {"id": f"user_2_{mode}", "updated_at": 1, "private_metadata": {}} | profile | ids) == "applied"


def test_a_user_put_without_a_profile_is_known_to_be_weighed_without(db: Connection) -> None:
    policy = Policy(template=parse_template('{"name": "{{user.full_name}}"}'))
    user = clerk_user(last_name="Lovelace" * 30)
    bare = {key: value for key, value in user.items() if not key.endswith("_name")}
    put(db, bare)
    users.weigh_put(db, policy)
    whole = parse_user(json.dumps(user).encode(), None)
    assert isinstance(whole, UserChanged)
    assert users.compare(db, policy, [whole]) == {"user_a": "unweighed"}
    users.gate_users(db, policy, [users.weigh(policy, whole)])
    weight = (len(render(policy.template, whole, {})),)
    assert db.execute("select claims_bytes from clerk.users").fetchone() == weight
    # What is known of it stays.
    put(db, bare | {"updated_at": VERSION + 1})
    users.weigh_put(db, policy)
    assert db.execute("select claims_bytes from clerk.users").fetchone() == weight


def test_a_session_of_old_habits_may_put(db: Connection) -> None:
    db.execute("set local standard_conforming_strings = off")
    db.execute("set local escape_string_warning = off")
    metadata = {'a "quoted" \\ name': ["\\", '"', "a, b"]}
    assert put(db, clerk_user(public_metadata=metadata)) == "applied"
    users.weigh_put(db, Policy())
    weight = 39 + len(json.dumps(metadata, separators=(",", ":"))) + 2
    assert db.execute("select claims_bytes from clerk.users").fetchone() == (weight,)


# --- What it refuses

WHOLE: Final = clerk_user(private_metadata={"secret": "s3cr3t"})
NONSENSE: Final[dict[str, tuple[object, str]]] = {
    "null": (None, "not a JSON object"),
    "an array": ([WHOLE], "not a JSON object"),
    "a string": ('"s3cr3t"', "not a JSON object"),
    "an event": ({"object": "event", "type": "user.updated", "data": WHOLE}, "an event, not a user"),
    "another object": (WHOLE | {"object": "session"}, 'its object is not "user"'),
    "a deletion": ({"object": "user", "id": "user_a", "deleted": True}, "a user was deleted"),
    "no id": (WHOLE | {"id": None}, "id is missing"),
    "an empty id": (WHOLE | {"id": ""}, "id is missing, or no user id"),
    "an id with a space": (WHOLE | {"id": "user a"}, "no user id"),
    "an id that is too long": (WHOLE | {"id": "u" * 256}, "no user id"),
    "an id of other letters": (WHOLE | {"id": "ädä"}, "no user id"),
    "a number as id": (WHOLE | {"id": 7}, "no user id"),
    "no version": ({key: WHOLE[key] for key in WHOLE if key != "updated_at"}, "updated_at is missing"),
    "a date": (WHOLE | {"updated_at": "2026-11-28T10:00:00Z"}, "no whole number of milliseconds"),
    "half a millisecond": (WHOLE | {"updated_at": 1.5}, "no whole number of milliseconds"),
    "a version before time": (WHOLE | {"updated_at": -1}, "no whole number of milliseconds"),
    "a version after the year 9999": (WHOLE | {"updated_at": 253_402_300_800_000}, "no whole number of milliseconds"),
    "a version out of any range": (WHOLE | {"updated_at": 10**30}, "no whole number of milliseconds"),
    "private metadata of another type": (WHOLE | {"private_metadata": ["s3cr3t"]}, "private_metadata is not an object"),
    "public metadata of another type": (WHOLE | {"public_metadata": "s3cr3t"}, "public_metadata is not an object"),
    "unsafe metadata of another type": (WHOLE | {"unsafe_metadata": 7}, "unsafe_metadata is not an object"),
    "no metadata at all": ({"object": "user", "id": "user_a", "updated_at": 1}, "it has no metadata"),
    "a huge number": (json.dumps(WHOLE).replace('"s3cr3t"', "1e1000"), "over a thousand digits"),
    "a huge fraction": (json.dumps(WHOLE).replace('"s3cr3t"', "[[-1e-1001]]"), "over a thousand digits"),
    "a huge number in place of a word": (json.dumps(WHOLE).replace('"user"', "[1e131071]"), "over a thousand digits"),
    "containers that are too deep": (
        json.dumps(WHOLE).replace('"s3cr3t"', "[" * 498 + "]" * 498),
        "over 500 levels deep",
    ),
    "too much of it": (WHOLE | {"unsafe_metadata": {"s3cr3t": "x" * 1_048_576}}, "over 1 MiB"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_refused_with_what_is_wrong_and_none_of_its_values(db: Connection, what: str) -> None:
    user, problem = NONSENSE[what]
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught, db.transaction():
        put(db, user)
    assert problem in str(caught.value)
    diagnosis = caught.value.diag
    assert diagnosis.message_hint
    said = " ".join(map(str, (diagnosis.message_primary, diagnosis.message_detail, diagnosis.message_hint)))
    assert "s3cr3t" not in said + str(diagnosis.context)
    assert all_of(db) == ([], [])


def test_sql_null_is_refused(db: Connection) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="not a JSON object"):
        db.execute("select clerk.put_user(null)")


def test_a_thousand_digits_and_a_mebibyte_are_taken(db: Connection) -> None:
    text = json.dumps(clerk_user(private_metadata={"n": 0, "tiny": 1, "deep": None}))
    text = text.replace("null", "[" * 497 + "]" * 497)
    assert put(db, text.replace('"n": 0', '"n": 9e999').replace('"tiny": 1', '"tiny": 1e-1000')) == "applied"
    assert put(db, clerk_user("user_b", unsafe_metadata={"x": "y" * 1_000_000})) == "applied"


def test_before_a_worker_has_said_what_is_copied_nothing_is(db: Connection) -> None:
    db.execute("delete from clerk.policy")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="no worker has said yet"):
        put(db, clerk_user())


# --- What is copied, and what it weighs


def test_what_is_never_copied_is_not_copied(db: Connection) -> None:
    users.record_policy(db, Policy(Copy.NEVER, Copy.NEVER, Copy.NEVER))
    put(db, clerk_user(private_metadata={"a": 1}, public_metadata={"b": 1}, unsafe_metadata={"c": 1}))
    assert row(db) == (None, None, None, VERSION)
    assert "private" not in str(db.execute("select public_hashes, unsafe_hashes from clerk.user_contents").fetchone())


def test_a_policy_is_recorded_once_and_again_when_it_changes(db: Connection) -> None:
    rows = "select copy_private, copy_public, copy_unsafe, xmin from clerk.policy"
    first = db.execute(rows).fetchall()
    users.record_policy(db, Policy(budget=7))
    assert db.execute(rows).fetchall() == first
    users.record_policy(db, Policy(private=Copy.NEVER))
    assert [one[:3] for one in db.execute(rows).fetchall()] == [(False, True, True)]


def test_a_worker_weighs_who_was_put_and_drops_what_the_token_carries(db: Connection) -> None:
    put(db, clerk_user(public_metadata={"role": "admin"}))
    put(db, clerk_user("user_b", public_metadata={"bio": "x" * 1300}))
    assert users.unweighed(db, 10) == ["user_a", "user_b"]
    assert not users.weigh_put(db, Policy())
    assert users.unweighed(db, 10) == []
    assert row(db) == ({}, None, None, VERSION)
    assert row(db, "user_b")[1:3] == ({"bio": "x" * 1300}, {})
    weighed = "select user_id, claims_bytes, claims_exact, over_budget from clerk.users order by user_id"
    assert db.execute(weighed).fetchall() == [
        ("user_a", 39 + 16 + 2, True, False),
        ("user_b", 39 + 1310 + 2, True, True),
    ]


@pytest.mark.parametrize(
    "policy",
    [
        Policy(),
        EVERYTHING,
        Policy(private=Copy.NEVER, unsafe=Copy.NEVER),
        Policy(
            template=parse_template(
                '{"n": "{{user.full_name}}", "e": "{{user.primary_email_address}} {{user.email_verified}}",'
                ' "p": "{{user.primary_phone_number}}", "pub": "{{user.public_metadata}}", "c": "{{user.created_at}}",'
                ' "u": "{{user.username}}", "i": "{{user.image_url}}", "t": "{{user.two_factor_enabled}}"}'
            )
        ),
    ],
)
@pytest.mark.parametrize("public", [{}, {"role": "ädmin", "tags": ["a, b: c", {"d": None}]}, {"bio": "x" * 1300}])
def test_once_weighed_it_is_as_if_the_event_had_come(
    db: Connection, data: Path, policy: Policy, public: dict[str, Any]
) -> None:
    user = json.loads((data / "backend_api__get_user.json").read_text(encoding="utf-8")) | {"public_metadata": public}
    users.record_policy(db, policy)
    put(db, user)
    users.weigh_put(db, policy)
    by_put = all_of(db)
    db.rollback()
    read = parse_user(json.dumps(user).encode(), None)
    assert isinstance(read, UserChanged)
    users.gate_users(db, policy, [users.weigh(policy, read)])
    ((by_event,), *_), contents = all_of(db)
    # But for what only the bytes of an event tell, and the time of its envelope.
    assert by_put == ([(by_event | {"sent_hash": None, "event_at": 0},)], contents)


def test_whom_somebody_holds_is_weighed_later_and_holds_up_nobody(connect: Connect) -> None:
    one, other = connect(), connect()
    users.record_policy(one, Policy())
    weighed = "select user_id from clerk.users where weighed_by is not null order by user_id"
    for user_id in ("user_a", "user_b", "user_c"):
        put(one, clerk_user(user_id))
    with other.transaction():
        put(other, clerk_user("user_b", version=VERSION + 1, private_metadata={"n": 1}))
        one.execute("set statement_timeout = '2s'")
        users.weigh_put(one, Policy())
        assert one.execute(weighed).fetchall() == [("user_a",), ("user_c",)]
    users.weigh_put(one, Policy())
    assert len(one.execute(weighed).fetchall()) == 3


def test_a_user_who_stays_over_the_budget_crosses_it_once(db: Connection) -> None:
    big = {"bio": "x" * 1300}
    assert len(deliver(db, changed(version=VERSION, public=big)).crossings) == 1
    put(db, clerk_user(version=VERSION + 1, public_metadata=big | {"n": 1}))
    assert db.execute("select over_budget from clerk.users").fetchone() == (True,)
    (user_id,) = users.unweighed(db, 10)
    assert users.reweigh(db, Policy(), [user_id], drop=True).crossings == []


def test_what_only_clerk_had_is_brought_by_the_same_version(db: Connection) -> None:
    deliver(db, changed(version=VERSION, public={"role": "admin"}))
    users.reweigh(db, Policy(public=Copy.ALWAYS), ["user_a"], drop=False)
    assert users.missing(db, "", 10) == ["user_a"]
    assert put(db, clerk_user(public_metadata={"role": "admin"})) == "applied"
    assert row(db)[1] == {"role": "admin"}
    assert users.missing(db, "", 10) == []


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@given(metadata=st.dictionaries(texts | st.text("a", min_size=60, max_size=70), values, max_size=6))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fields_weigh_what_they_weigh_in_an_event(db: Connection, metadata: dict[str, Any]) -> None:
    query = "select clerk.compact_bytes(j), clerk.field_bytes(j), j::text from (select %s::jsonb as j) as one"
    ((total, fields, text),) = db.execute(query, (json.dumps(metadata),)).fetchall()
    kind = weigh_kind(text.encode())
    assert (total, fields) == (kind.total, dict(kind.by_name))


def test_of_many_fields_the_same_are_kept_by_name(db: Connection) -> None:
    metadata = {f"field_{number}": "x" * (number % 7) for number in range(200)}
    ((fields,),) = db.execute("select clerk.field_bytes(%s::jsonb)", (json.dumps(metadata),)).fetchall()
    assert fields == dict(weigh_kind(json.dumps(metadata).encode()).by_name)


# --- In any order with everything else

whole = st.sampled_from([{}, {"a": 1}, {"a": 1.5}, {"b": "x" * 700}, {"b": [None, True]}])


@st.composite
def histories(draw: st.DrawFn, kinds: st.SearchStrategy[Any]) -> list[tuple[str, int, tuple[Any, Any, Any]]]:
    """Puts and events of one user. One version has one content, as at Clerk, however it comes here."""
    contents = draw(st.dictionaries(st.integers(1, 4), st.tuples(kinds, kinds, kinds), min_size=1, max_size=4))
    ways = st.lists(st.sampled_from(["put", "event"]), min_size=1, max_size=2, unique=True)
    history = [(way, version, contents[version]) for version in contents for way in draw(ways)]
    return history + ([("deletion", 5, ({}, {}, {}))] if draw(st.integers(0, 4)) == 0 else [])


def apply(connection: Connection, policy: Policy, way: str, version: int, contents: tuple[Any, Any, Any]) -> None:
    private, public, unsafe = contents
    if way == "deletion":
        deliver(connection, deleted(timestamp=version), policy=policy)
    elif way == "event":
        body = changed(version=version, private=private, public=public, unsafe=unsafe)
        deliver(connection, body, policy=policy)
    else:
        kinds = {"private_metadata": private, "public_metadata": public, "unsafe_metadata": unsafe}
        user = clerk_user(version=version) | kinds
        user = {key: value for key, value in user.items() if value is not ABSENT}
        if user.keys() & kinds.keys():
            put(connection, user)


@given(
    # What is kept of a kind that the token carries may depend on the order where others were absent from its event.
    case=st.tuples(histories(whole), st.sampled_from([Policy(), EVERYTHING]))
    | st.tuples(histories(whole | st.just(ABSENT)), st.just(EVERYTHING)),
    data=st.data(),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_puts_and_events_ends_in_the_same_row(
    db: Connection, case: tuple[list[tuple[str, int, tuple[Any, Any, Any]]], Policy], data: st.DataObject
) -> None:
    history, policy = case
    ends = []
    for _ in range(2):
        db.rollback()
        users.record_policy(db, policy)
        for way, version, contents in data.draw(st.permutations(history)):
            apply(db, policy, way, version, contents)
            if data.draw(st.booleans()):
                users.weigh_put(db, policy)
        users.weigh_put(db, policy)
        ends.append((row(db), db.execute("select claims_bytes, over_budget from clerk.users").fetchall()))
    assert ends[0] == ends[1]


# --- Who may, and what may stand in the way


def test_a_role_that_may_do_nothing_else_may_put(db: Connection) -> None:
    db.execute("set local role clerk_writer")
    assert put(db, clerk_user()) == "applied"
    with pytest.raises(psycopg.errors.InsufficientPrivilege), db.transaction():
        db.execute("select * from clerk.user_metadata")
    with pytest.raises(psycopg.errors.InsufficientPrivilege), db.transaction():
        db.execute("select clerk.field_bytes('{}')")


def test_what_the_caller_made_for_itself_is_not_run_by_its_owner(db: Connection) -> None:
    """A caller's search_path, functions and operators of its own must not be found by a function of greater rights."""
    db.execute("create schema trap")
    db.execute("grant all on schema trap to clerk_writer")
    db.execute("set local role clerk_writer")
    for signature in ("octet_length(text)", "pg_notify(text, text)", "lower(text)", "jsonb_typeof(jsonb)"):
        returns = "void" if "notify" in signature else "text" if signature.startswith(("lower", "json")) else "integer"
        db.execute(
            f"create function trap.{signature} returns {returns} language plpgsql as "
            "$$ begin raise exception 'trapped'; end $$"
        )
    db.execute(
        "create function trap.equal(text, text) returns bool language plpgsql as $$ begin raise 'trapped'; end $$"
    )
    db.execute("create operator trap.= (leftarg = text, rightarg = text, function = trap.equal)")
    db.execute("set local search_path = trap, pg_catalog, public")
    assert put(db, {"id": "user_a", "updatedAt": VERSION, "privateMetadata": {"a": 1}}) == "applied"


def test_it_waits_for_a_row_that_somebody_holds_for_a_while_only(connect: Connect) -> None:
    one, other = connect(), connect()
    users.record_policy(one, Policy())
    limits = "select proconfig from pg_proc where proname = 'put_user'"
    assert "lock_timeout=5s" in str(one.execute(limits).fetchone())
    one.execute("alter function clerk.put_user set lock_timeout = '50ms'")
    try:
        with one.transaction():
            put(one, clerk_user())
            with pytest.raises(psycopg.errors.LockNotAvailable):
                put(other, clerk_user(version=VERSION + 2, private_metadata={"a": 1}))
    finally:
        one.execute("alter function clerk.put_user set lock_timeout = '5s'")
    assert put(other, clerk_user(version=VERSION + 2, private_metadata={"a": 1})) == "applied"


def test_a_worker_says_what_is_copied_as_it_begins(connect: Connect, database_url: str) -> None:
    connection = connect()
    connection.execute("delete from clerk.policy")
    drainer = Drainer(lambda: database.connect(database_url, "worker"), Policy(private=Copy.NEVER))
    assert drainer.ring("sweep")
    drainer.close()
    assert connection.execute("select copy_private, copy_public, copy_unsafe from clerk.policy").fetchall() == [
        (False, True, True)
    ]
