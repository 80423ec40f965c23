"""What an application gains: reading one user by `select`, beside an HTTP request of getUser()'s kind.

That side is a stand-in for Clerk's API on this machine: it shows what any API over HTTP costs at least. Also what it
takes to put a user, and what an index for a field of metadata brings and costs.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpx
from rich.table import Table

from bench import databases
from bench.contenders import ROOT
from bench.load import quantile
from bench.population import MADE_AT, SHAPES, metadata, user_id
from bench.report import Check, ratios, spread, table
from bench.servers import Connection, Servers
from worker.policy import Policy
from worker.standin import BLANK, StandIn
from worker.users import record_policy

GET_USER: Final = "getUser() of a stand-in"
SELECT: Final = "select"
PUT: Final = "put_user"
KNOWN: Final = 1000
"""Users of the stand-in, which finds one of them as fast as one of a million."""

Tell = Callable[[str], None]
"""What is being measured, as each part of it begins."""


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured. The defaults take a minute."""

    rounds: int = 2
    seconds: float = 2.5
    """Of each."""
    users: tuple[int, ...] = (100_000,)
    """In Postgres; the first one counts."""


SHORT: Final = Options(rounds=1, seconds=0.2, users=(1000,))
"""Everything once: it works."""


@dataclass(frozen=True, slots=True)
class Calls:
    """One caller, one call after the other, in one round; `index` names the index that there was."""

    what: str
    index: str
    round: int
    p50_ms: float
    p99_ms: float
    a_second: float


@dataclass(frozen=True, slots=True)
class Index:
    """What an index is, in one round."""

    index: str
    round: int
    megabytes: float
    built_seconds: float


def run(servers: Servers, options: Options, tell: Tell) -> list[Calls | Index]:
    """Measure each in turns."""
    users = options.users[0]
    found: list[Calls | Index] = []
    tell("reading: making users")
    database = databases.ready(servers, "ours", users)
    with standin() as url, httpx.Client(base_url=url, headers=KEY) as clerk, servers.connect(database) as connection:
        record_policy(connection, Policy())
        connection.execute("vacuum analyze clerk.users, clerk.user_contents")
        for number in range(options.rounds):
            each = _Round(number, options.seconds, random.Random(number))  # noqa: S311 - the same users in every run
            tell("reading: getUser()")
            found.append(each.timed(GET_USER, lambda draw: get_user(clerk, draw.randrange(KNOWN))))
            tell("reading: select")
            found.append(each.timed(SELECT, lambda draw: select(connection, draw.randrange(users))))
            for at, index in enumerate(INDEXES):
                tell(f"reading: {index}")
                version = MADE_AT + (number * len(INDEXES) + at + 1) * 10_000_000
                found += _with_index(connection, index, each, _puts(connection, users, version))
    return found


def steps(options: Options) -> int:
    """How often `run` tells."""
    return 1 + options.rounds * (2 + len(INDEXES))


@dataclass(frozen=True, slots=True)
class _Round:
    """One round: what is called draws its users at random."""

    number: int
    seconds: float
    draw: random.Random

    def timed(self, what: str, call: Callable[[random.Random], object], index: str = "") -> Calls:
        """Call, and call again."""
        for _ in range(10):
            call(self.draw)  # plans are settled, connections are open
        took: list[float] = []
        began = last = time.perf_counter()
        while last - began < self.seconds:
            call(self.draw)
            now = time.perf_counter()
            took.append((now - last) * 1000)
            last = now
        a_second = len(took) / (last - began)
        return Calls(what, index, self.number, statistics.median(took), quantile(took, 0.99), a_second)


# --- One user

KEY: Final = {"Authorization": "Bearer sk_test_standin"}
READ: Final = """
select private_metadata, public_metadata from clerk.user_metadata where user_id = %s
"""


def get_user(clerk: httpx.Client, number: int) -> Any:
    """A user from the stand-in, over a connection that is kept."""
    found = clerk.get(f"/v1/users/{user_id(number)}").raise_for_status().json()
    return found["private_metadata"], found["public_metadata"]


def select(connection: Connection, number: int) -> Any:
    """A user from Postgres, over a connection that is kept."""
    found = connection.execute(READ, (user_id(number),), prepare=True).fetchone()
    if found is None:
        raise RuntimeError("a user of the population is missing")
    return found


def clerk_user(number: int, version: int, revision: int = 0) -> dict[str, Any]:
    """A User as Clerk's API returns it; each revision has other private metadata."""
    private, public, unsafe = metadata(number % SHAPES)
    kinds = {
        "private_metadata": {**private, "revision": revision},
        "public_metadata": public,
        "unsafe_metadata": unsafe,
    }
    return {**BLANK, "id": user_id(number), "created_at": MADE_AT, "updated_at": version, **kinds}


def _puts(connection: Connection, users: int, first: int) -> Callable[[random.Random], object]:
    """Each call puts a user who has changed; the versions rise from this one."""
    versions = itertools.count(first)

    def put(draw: random.Random) -> object:
        version = next(versions)
        body = json.dumps(clerk_user(draw.randrange(users), version, version))
        said = connection.execute("select clerk.put_user(%s::jsonb)", (body,), prepare=True).fetchone()
        if said != ("applied",):
            raise RuntimeError(f"put_user said {said}")
        return said

    return put


@contextmanager
def standin() -> Iterator[str]:
    """A stand-in for Clerk's API without a rate limit, in a process of its own; its address."""
    command = [sys.executable, "-c", "from bench.reading import serve; serve()"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip() if process.stdout else ""
            if not url:
                raise RuntimeError("the stand-in has ended: its error stands above")
            yield url
        finally:
            process.kill()


def serve() -> None:
    """Be that process, until the parent goes."""
    with StandIn(limit=1_000_000_000) as clerk:
        for number in range(KNOWN):
            clerk.put(clerk_user(number, MADE_AT))
        sys.stdout.write(f"{clerk.url}\n")
        sys.stdout.flush()
        sys.stdin.read()


# --- Users by a field

NONE: Final = "no index"
INDEXES: Final = {
    NONE: "",
    "index on the field": "create index bench_field on clerk.user_contents ((private_metadata ->> 'internal_id'))",
    "gin index on all fields": (
        "create index bench_field on clerk.user_contents using gin (private_metadata jsonb_path_ops)"
    ),
}
FIND: Final = "one in a thousand users by a field"
BY_FIELD: Final = "select user_id from clerk.user_metadata where private_metadata ->> 'internal_id' = %s"
BY_CONTENT: Final = (
    "select user_id from clerk.user_metadata where private_metadata @> jsonb_build_object('internal_id', %s::bigint)"
)
SIZE: Final = "select pg_relation_size('clerk.bench_field')"


def find(connection: Connection, asked: str, shape: int) -> Any:
    """The users who have the number that this shape has."""
    private, _, _ = metadata(shape)
    found = connection.execute(asked.encode(), (str(private["internal_id"]),)).fetchall()
    if not found:
        raise RuntimeError("nobody has that number")
    return found


def _with_index(
    connection: Connection, name: str, each: _Round, put: Callable[[random.Random], object]
) -> Iterator[Calls | Index]:
    """The same with and without an index."""
    definition = INDEXES[name]
    if definition:
        began = time.perf_counter()
        connection.execute(definition.encode())
        built = time.perf_counter() - began
        connection.execute("analyze clerk.user_contents")
        yield Index(name, each.number, _megabytes(connection), built)
    asked = BY_CONTENT if "gin" in definition else BY_FIELD
    yield each.timed(FIND, lambda draw: find(connection, asked, draw.randrange(SHAPES)), name)
    yield each.timed(PUT, put, name)
    connection.execute("drop index if exists clerk.bench_field")


def _megabytes(connection: Connection) -> float:
    return float((connection.execute(SIZE).fetchone() or (0,))[0]) / 1_000_000


# --- What is shown


def tables(found: Sequence[Calls | Index]) -> list[Table]:
    """One for a user, one for users by a field."""
    rows = []
    for what, name, index in ROWS:
        ones = _calls(found, name, index)
        p50, p99 = spread(one.p50_ms for one in ones), spread(one.p99_ms for one in ones)
        rows.append((what, p50, p99, spread(one.a_second for one in ones)))
    by_field = []
    for index in INDEXES:
        mine = [one for one in found if isinstance(one, Index) and one.index == index]
        p50s = [spread(one.p50_ms for one in _calls(found, what, index)) for what in (FIND, PUT)]
        sizes = spread(one.megabytes for one in mine), spread(one.built_seconds for one in mine)
        by_field.append((index, *p50s, *sizes))
    columns = ("", "query p50, ms", "put_user p50, ms", "index, MB", "built in, s")
    return [
        table("Reading one user, one call after the other", ("", "p50, ms", "p99, ms", "calls a second"), rows),
        table(f"Finding {FIND}", columns, by_field),
    ]


ROWS: Final = ((GET_USER, GET_USER, ""), (SELECT, SELECT, ""), ("put_user of a changed user", PUT, NONE))


def _calls(found: Sequence[Calls | Index], what: str, index: str = "") -> list[Calls]:
    """One of each round."""
    return [one for one in found if isinstance(one, Calls) and (one.what, one.index) == (what, index)]


def checks(found: Sequence[Calls | Index]) -> list[Check]:
    """That it is worth it, and that indexes are used."""
    pairs = [("getUser() of a stand-in by select, p50", (GET_USER, ""), (SELECT, ""), 1)]
    pairs += [(f"no index by {name}, p50", (FIND, NONE), (FIND, name), 5) for name in INDEXES if name != NONE]
    return [
        Check(
            what,
            ratios((one.p50_ms for one in _calls(found, *above)), (one.p50_ms for one in _calls(found, *below))),
            target,
            at_least=True,
        )
        for what, above, below, target in pairs
    ]
