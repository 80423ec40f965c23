"""The users that everything here is measured with, and Clerk's events about them.

There are a thousand shapes of metadata and profile; the user of a number has the shape `number % SHAPES`. So a million
users are made by copying a thousand rows, and an event about any of them is one of a thousand texts with a few places
filled in.
"""

from __future__ import annotations

import functools
import json
import random
from typing import Any, Final

import psycopg
from psycopg import sql

from worker.events import UserChanged, parse_event
from worker.policy import Policy
from worker.users import gate_users, weigh

Connection = psycopg.Connection[Any]

SHAPES: Final = 1000
MADE_AT: Final = 1_700_000_000_000
"""The version of every user as they are made: an event's is later."""

_TURNS_APART: Final = 1000
_FIRST_TURN: Final = 100_000  # so that all have as many digits

_ID: Final = "user_2b"
_ID_DIGITS: Final = 25

# --- Events


def user_id(number: int) -> str:
    """Clerk's ids have 32 characters and sort by age; so do these."""
    return f"{_ID}{number:0{_ID_DIGITS}d}"


def body(number: int, version: int, turn: int) -> bytes:
    """A `user.updated` of some 2.3 KB as Clerk sends it. With turn 0 the metadata is as the user was made, which is
    what each sign-in sends; each other turn has private metadata of its own."""
    return (
        _text(number % SHAPES)
        .replace(_USER_ID, user_id(number).encode())
        .replace(_VERSION, b"%d" % version)
        .replace(_TURN, b"%d" % (_FIRST_TURN + turn))
    )


def chosen(seed: int, users: int, count: int, changing: float) -> list[tuple[int, int]]:
    """The (number, turn) of `count` users at random, nobody twice before all have had their turn.

    `changing` of them have a new turn, one that no other seed gives. They are the same users each time, and the fewer
    are among the more: whoever measures small shares first finds all others as they were made.
    """
    draw = random.Random(seed)  # noqa: S311 - the same users in every run
    numbers: list[int] = []
    while len(numbers) < count:
        numbers += draw.sample(range(users), min(users, count - len(numbers)))
    turns = (1 + seed * _TURNS_APART + at // users for at in range(count))
    return [(number, turn if _restless(number, changing) else 0) for number, turn in zip(numbers, turns, strict=True)]


def _restless(number: int, changing: float) -> bool:
    """Evenly spread over the numbers."""
    return number * 2_654_435_769 % 2**32 < changing * 2**32


# --- Shapes. What is filled in stands there as a text of the same length, which occurs nowhere else.

_USER_ID: Final = user_id(10**_ID_DIGITS - 1).encode()
_VERSION: Final = b"1999999999999"
_TURN: Final = b"199999"


@functools.lru_cache(SHAPES)
def _text(shape: int) -> bytes:
    """An event about a user of this shape, compact as Clerk sends it."""
    return json.dumps(_event(shape), separators=(",", ":"), ensure_ascii=False).encode()


def metadata(shape: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Private (some 600 bytes), public (some 250, six fields) and unsafe (some 80) metadata of this shape."""
    draw = random.Random(shape)  # noqa: S311 - the same shapes in every run
    token = functools.partial(_token, draw)
    private = {
        "stripe": {"customer": f"cus_{token(14)}", "subscription": f"sub_{token(24)}", "item": f"si_{token(14)}"},
        "internal_id": draw.randrange(10**9, 10**10),
        "revision": int(_TURN),
        "risk": {"score": round(draw.uniform(1, 99), 2), "reviewed_by": f"staff_{token(10)}", "flags": ["none"]},
        "entitlements": [
            {"feature": draw.choice(("exports", "api", "seats", "audit")), "limit": draw.randrange(100, 999)}
            for _ in range(4)
        ],
        "crm": {"account": token(18), "owner": token(18), "segment": draw.choice(("smb", "mid", "ent"))},
        "notes": " ".join(token(draw.randrange(4, 9)) for _ in range(20)),
    }
    public = {
        "role": draw.choice(("admin", "member", "viewer", "billing")),
        "plan": draw.choice(("free", "team", "business")),
        "onboarding_complete": draw.random() < 0.8,
        "workspace": {"id": f"ws_{token(20)}", "name": f"{token(9).title()} GmbH", "region": "eu-central-1"},
        "features": [token(10) for _ in range(4)],
        "team_ids": [draw.randrange(1000, 9999) for _ in range(5)],
    }
    unsafe = {
        "theme": draw.choice(("light", "dark")),
        "locale": draw.choice(("en-US", "de-DE")),
        "newsletter": draw.random() < 0.5,
        "referrer": token(16),
    }
    return private, public, unsafe


def _event(shape: int) -> dict[str, Any]:
    draw = random.Random(SHAPES + shape)  # noqa: S311 - the same shapes in every run
    token = functools.partial(_token, draw)
    private, public, unsafe = metadata(shape)
    version = int(_VERSION)
    joined = MADE_AT - draw.randrange(10**9, 10**10)
    first, last = token(draw.randrange(4, 9)).title(), token(draw.randrange(5, 11)).title()
    address_id, account_id = f"idn_2b{token(25)}", f"idn_2b{token(25)}"
    email = f"{first}.{last}@example.com".lower()
    verified = {"status": "verified", "strategy": "oauth_google", "attempts": None, "expire_at": joined + 600_000}
    data = {
        "id": _USER_ID.decode(),
        "object": "user",
        "username": None,
        "first_name": first,
        "last_name": last,
        "image_url": f"https://img.clerk.com/{token(20)}",
        "has_image": True,
        "primary_email_address_id": address_id,
        "primary_phone_number_id": None,
        "password_enabled": False,
        "two_factor_enabled": False,
        "email_addresses": [
            {
                "id": address_id,
                "object": "email_address",
                "email_address": email,
                "reserved": False,
                "verification": verified,
                "linked_to": [{"type": "oauth_google", "id": account_id}],
            }
        ],
        "phone_numbers": [],
        "external_accounts": [
            {
                "object": "external_account",
                "id": account_id,
                "provider": "oauth_google",
                "identification_id": account_id,
                "provider_user_id": str(draw.randrange(10**20, 10**21)),
                "email_address": email,
            }
        ],
        "public_metadata": public,
        "private_metadata": private,
        "unsafe_metadata": unsafe,
        "external_id": None,
        "last_sign_in_at": version,
        "banned": False,
        "locked": False,
        "created_at": joined,
        "updated_at": version,
        "last_active_at": version,
    }
    return {
        "data": data,
        "event_attributes": {"http_request": {"client_ip": "192.0.2.51", "user_agent": "Firefox/142"}},
        "instance_id": f"ins_2b{'0' * 25}",
        "object": "event",
        "timestamp": version,
        "type": "user.updated",
    }


def _token(draw: random.Random, length: int) -> str:
    return "".join(draw.choices("abcdefghijkmnopqrstuvwxyz", k=length))


def user(number: int, version: int, turn: int) -> UserChanged:
    """What that event means."""
    parsed = parse_event(body(number, version, turn))
    if not isinstance(parsed, tuple) or not isinstance(parsed[1], UserChanged):
        raise TypeError("the benchmark's own event can't be used")
    return parsed[1]


# --- Populations


# Whatever columns the table has: they are those of the user of the same shape, but for the id.
COLUMNS = """
select attname from pg_attribute
where attrelid = %(relation)s::regclass and attnum > 0 and not attisdropped and attgenerated = ''
  and attname <> 'user_id'
order by attnum
"""
COPY_SHAPES = """
insert into {table} (user_id, {columns})
select {id} || lpad(number::text, {digits}, '0'), {columns}
from generate_series({shapes}, {users} - 1) as number
join {table} as shape on shape.user_id = {id} || lpad((number %% {shapes})::text, {digits}, '0')
order by number
"""


def _copy_shapes(connection: Connection, table: sql.Identifier, users: int) -> None:
    names = connection.execute(COLUMNS, {"relation": table.as_string()}).fetchall()
    columns = sql.SQL(", ").join(sql.Identifier(name) for (name,) in names)
    fill = sql.SQL(COPY_SHAPES).format(
        table=table, columns=columns, id=_ID, digits=_ID_DIGITS, shapes=SHAPES, users=users
    )
    connection.execute(fill, {})
    # What is measured later isn't to pay for this: hint bits, statistics, dirty pages.
    connection.execute(sql.SQL("vacuum (analyze, freeze) {}").format(table))
    connection.execute("checkpoint")


OURS: Final = (sql.Identifier("clerk", "users"), sql.Identifier("clerk", "user_contents"))


def populate_ours(connection: Connection, users: int) -> None:
    """Make exactly these users of the product's own tables, as if each had come by an event: the first of each shape
    passes the gate. The connection is in autocommit."""
    policy = Policy()
    connection.execute(sql.SQL("truncate {}").format(sql.SQL(", ").join(OURS)))
    gate_users(connection, policy, [weigh(policy, user(number, MADE_AT, 0)) for number in range(min(users, SHAPES))])
    for table in OURS:
        _copy_shapes(connection, table, users)


RIVAL_TABLE = """
create table if not exists app_users (
  user_id          text primary key,
  version          bigint not null,
  private_metadata jsonb,
  public_metadata  jsonb,
  unsafe_metadata  jsonb
)
"""
RIVAL_USER = "insert into app_users values (%s, %s, %s::jsonb, %s::jsonb, %s::jsonb)"


def populate_rival(connection: Connection, users: int) -> None:
    """Make the same users in the one table that the usual designs keep. The connection is in autocommit."""
    connection.execute(RIVAL_TABLE)
    connection.execute("truncate app_users")
    with connection.cursor() as cursor:
        cursor.executemany(RIVAL_USER, [rival_row(number, MADE_AT, 0) for number in range(min(users, SHAPES))])
    _copy_shapes(connection, sql.Identifier("app_users"), users)


def rival_row(number: int, version: int, turn: int) -> tuple[str, int, str, str, str]:
    """One user as that table has them: id, version, and the JSON of private, public and unsafe metadata."""
    private, public, unsafe = _kinds(number % SHAPES)
    return user_id(number), version, private.replace(_TURN.decode(), str(_FIRST_TURN + turn)), public, unsafe


@functools.lru_cache(SHAPES)
def _kinds(shape: int) -> tuple[str, str, str]:
    private, public, unsafe = (json.dumps(kind, separators=(",", ":"), ensure_ascii=False) for kind in metadata(shape))
    return private, public, unsafe
