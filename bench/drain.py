"""How fast a backlog is applied, beside a task for each event and beside a bulk upsert of the same rows alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from rich.table import Table

from bench import contenders, cost, databases
from bench.contenders import Contender, Running
from bench.population import body, chosen, rival_row, user_id
from bench.report import Check, ratios, spread, table
from bench.rival_upsert import celery
from bench.servers import Connection, Servers

LEAST_A_SECOND: Final = 20
"""A backlog that would take longer is an error."""

READY_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.25
"""Seldom enough not to slow what is measured, whose end is told by Postgres and not by this."""

ROWS: Final = 500
"""Rows in one statement and commit of the bulk upsert: as many as a batch of ours."""

SEEDS_FROM: Final = 500
"""Other turns than the acknowledgements' part gives, and of as many digits."""

OURS: Final = "ours"
TWO_WORKERS: Final = "ours, two workers"

Tell = Callable[[str], None]
"""What is being measured, as each part of it begins."""


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured. The defaults take some five minutes."""

    rounds: int = 2
    backlog: int = 100_000
    """Of ours with the first share."""
    backlog_beside: int = 25_000
    """Of ours with other shares, and of the bulk upsert: the rate is soon steady."""
    messages: int = 3000
    """The backlog of *task per event*, which takes so much longer."""
    users: tuple[int, ...] = (1_000_000, 10_000)
    """Populations; the rivals, and two workers, are measured with the first one."""
    changing: tuple[float, ...] = (0.1, 1.0)
    """Shares of events that change something, from small to large. To whoever upserts all events they are the same, so
    that one is enough."""
    rivals_pool: str = "prefork"
    two_workers: bool = True
    """Whether a second worker is measured as well."""


SHORT: Final = Options(
    rounds=1, backlog=3000, backlog_beside=1500, messages=300, users=(2000,), changing=(0.1,), two_workers=False
)
"""Everything once: it works."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """So many events about as many of `users` users, in one round."""

    users: int
    changing: float
    count: int
    round: int
    seed: int

    def events(self) -> list[tuple[int, int, int]]:
        """Each one's user by number, version and turn."""
        start = int(time.time() * 1000)
        picked = chosen(self.seed, self.users, self.count, self.changing)
        return [(number, start + at, turn) for at, (number, turn) in enumerate(picked)]


@dataclass(frozen=True, slots=True)
class Drained:
    """What one contender did with one backlog, in one round."""

    contender: str
    users: int
    changing: float
    round: int
    events: int
    rows_a_second: float
    cpu_ms: float | None
    """Processor time of all processes and servers for each event."""
    servers_cpu_ms: float | None
    """The part of it that Postgres and Redis used."""
    memory_mb: float | None
    """Of the contender's processes, at the end. None: it is a part of this one."""


def run(servers: Servers, options: Options, tell: Tell) -> list[Drained]:
    """Measure everybody in turns, in another order each round.

    Small shares of change come first: users whom no event has changed yet are as they were made.
    """
    found: list[Drained] = []
    seeds = itertools.count(SEEDS_FROM)
    for changing in options.changing:
        for number in range(options.rounds):
            upserts = UPSERTS if number == 0 else {_faster(found): UPSERTS[_faster(found)]}
            visits = list(_visits(servers, options, changing, upserts))
            shift = number % len(visits)
            for name, users, measure in visits[shift:] + visits[:shift]:
                tell(f"drain: {name}, {users:,} users, {changing:.0%} change something")
                found.append(measure(number, next(seeds)))
    return found


def steps(options: Options) -> int:
    """How often `run` tells."""
    ours = options.rounds * len(options.changing) * len(options.users)
    return ours + options.rounds * (2 + options.two_workers) + len(UPSERTS) - 1


def _faster(found: Sequence[Drained]) -> str:
    """The form of bulk upsert that stands for them."""
    return max((one for one in found if one.contender in UPSERTS), key=lambda one: one.rows_a_second).contender


Measure = Callable[[int, int], Drained]
"""Given the round and a seed of its own."""


def _visits(
    servers: Servers, options: Options, changing: float, upserts: Mapping[str, Upsert]
) -> Iterator[tuple[str, int, Measure]]:
    """Who is measured with this share: name, population, and what does it, given the round and a seed."""
    everybody = contenders.contenders(rivals_pool=options.rivals_pool)
    ours, task = everybody["ours"], everybody["task per event"]
    first = options.users[0]

    def by_workers(users: int, workers: int) -> Measure:
        count = options.backlog if changing == options.changing[0] else options.backlog_beside
        return lambda number, seed: drain_ours(servers, ours, Backlog(users, changing, count, number, seed), workers)

    def by_tasks(number: int, seed: int) -> Drained:
        return drain_tasks(servers, task, Backlog(first, changing, min(options.messages, first), number, seed))

    def by_upsert(name: str, upsert: Upsert) -> Measure:
        count = min(options.backlog_beside, first)
        return lambda number, seed: upsert_alone(servers, name, upsert, Backlog(first, changing, count, number, seed))

    for users in options.users:
        yield OURS, users, by_workers(users, 1)
    if changing == options.changing[0]:
        if options.two_workers:
            yield TWO_WORKERS, first, by_workers(first, 2)
        yield task.name, first, by_tasks
        for name, upsert in upserts.items():
            yield name, first, by_upsert(name, upsert)


# --- Ours


def drain_ours(servers: Servers, ours: Contender, backlog: Backlog, workers: int) -> Drained:
    """Workers that find a whole backlog at one moment, until all of it is done."""
    database = databases.ready(servers, ours.short, backlog.users)
    with ExitStack() as stack:
        connection = stack.enter_context(servers.connect(database))
        connection.execute("truncate clerk.webhook_events")
        _settle(connection, "clerk.users", "clerk.user_contents", "clerk.webhook_events")
        running = [
            stack.enter_context(contenders.running(ours, servers, database, only=["worker"])) for _ in range(workers)
        ]
        _fill(connection, backlog.events(), workers)
        before = _cpu(servers, running)
        _until(lambda: not _pending(connection), backlog.count / LEAST_A_SECOND, "the end of the backlog")
        used = _less(_cpu(servers, running), before)
        stamps = connection.execute(INBOX_STAMPS).fetchall()
        memory = cost.memory_mb(pid for one in running for pid in one.pids)
    return _drained(OURS if workers == 1 else TWO_WORKERS, backlog, stamps, used, memory)


COPY = (
    "copy clerk.webhook_events (svix_id, type, user_id, version, sent_at, received_at, body) from stdin (format binary)"
)
COPY_TYPES: Final = ("text", "text", "text", "int8", "timestamptz", "timestamptz", "bytea")
HOLD = "lock table clerk.webhook_events in access exclusive mode"


def _fill(connection: Connection, events: Sequence[tuple[int, int, int]], workers: int) -> None:
    """Put a backlog into the inbox, visible once every worker is about to look: so all begin at the same moment."""
    began = datetime.now(UTC) - timedelta(milliseconds=len(events))
    with connection.transaction():
        with connection.cursor().copy(COPY) as copy:
            copy.set_types(COPY_TYPES)
            for at, (number, version, turn) in enumerate(events):
                received = began + timedelta(milliseconds=at)
                event = (user_id(number), version, received, received, body(number, version, turn))
                copy.write_row((f"msg_2b{version:025d}", "user.updated", *event))
        # As autovacuum would have, of a backlog that has stood for a minute.
        connection.execute("analyze clerk.webhook_events")
        connection.execute(HOLD)
        _until_held(connection, "clerk-sync worker", workers)


# Within a transaction Postgres shows who was there at its first look.
LOOK_ANEW = "select pg_stat_clear_snapshot()"
HELD = """
select count(*) from pg_stat_activity
where wait_event_type = 'Lock' and datname = current_database() and application_name = %(name)s
"""


def _until_held(connection: Connection, name: str, count: int) -> None:
    """Wait until so many connections of this name wait for what this one has locked."""

    def held() -> bool:
        connection.execute(LOOK_ANEW)
        (found,) = connection.execute(HELD, {"name": name}).fetchone() or (0,)
        return int(found) >= count

    _until(held, READY_SECONDS, "workers that begin")


PENDING = "select exists (select from clerk.webhook_events where state = 'pending')"


def _pending(connection: Connection) -> bool:
    (found,) = connection.execute(PENDING).fetchone() or (False,)
    return bool(found)


# --- A task for each event


def drain_tasks(servers: Servers, task: Contender, backlog: Backlog) -> Drained:
    """A worker that finds a queue full of messages, until it is empty."""
    database = databases.ready(servers, task.short, backlog.users)
    events = backlog.events()
    with servers.connect(database) as connection:
        _settle(connection, "app_users")
        with contenders.running(task, servers, database, only=["worker"]) as running:
            # Held by a lock until all is published, as ours are until the inbox is full.
            with connection.transaction():
                connection.execute("lock table app_users in access exclusive mode")
                _publish(servers, task, events)
                _until_held(connection, "", 1)
            before = _cpu(servers, [running])
            if left := running.drained(len(events) / LEAST_A_SECOND):
                raise RuntimeError(f"{left} of {len(events)} messages are left: fewer than {LEAST_A_SECOND} a second")
            used = _less(_cpu(servers, [running]), before)
            memory = cost.memory_mb(running.pids)
        ids = [user_id(number) for number, _, _ in events]
        stamps = connection.execute(RIVAL_STAMPS, (ids,)).fetchall()
    return _drained(task.name, backlog, stamps, used, memory)


def _publish(servers: Servers, task: Contender, events: Sequence[tuple[int, int, int]]) -> None:
    with closing(celery(servers.redis_url(task.redis_number))) as app, app.producer_pool.acquire() as producer:
        for number, version, turn in events:
            app.tasks["apply"].apply_async((body(number, version, turn).decode(),), producer=producer)


# --- A bulk upsert alone


Row = tuple[str, int, str, str, str]
Upsert = Callable[[Connection, Sequence[Row]], None]

UNNEST = """
insert into app_users as old (user_id, version, private_metadata, public_metadata, unsafe_metadata)
select * from unnest(
  %(user_id)b::text[], %(version)b::bigint[], %(private)b::text[]::jsonb[], %(public)b::text[]::jsonb[],
  %(unsafe)b::text[]::jsonb[]
)
on conflict (user_id) do update set
  version = excluded.version, private_metadata = excluded.private_metadata,
  public_metadata = excluded.public_metadata, unsafe_metadata = excluded.unsafe_metadata
where old.version < excluded.version
"""


def by_unnest(connection: Connection, rows: Sequence[Row]) -> None:
    """One statement for all rows, which is one commit as well."""
    names = ("user_id", "version", "private", "public", "unsafe")
    columns = map(list, zip(*rows, strict=True))
    connection.execute(UNNEST, dict(zip(names, columns, strict=True)), prepare=True)


ONE_BY_ONE = """
insert into app_users as old (user_id, version, private_metadata, public_metadata, unsafe_metadata)
values (%b, %b, %b::text::jsonb, %b::text::jsonb, %b::text::jsonb)
on conflict (user_id) do update set
  version = excluded.version, private_metadata = excluded.private_metadata,
  public_metadata = excluded.public_metadata, unsafe_metadata = excluded.unsafe_metadata
where old.version < excluded.version
"""


def by_executemany(connection: Connection, rows: Sequence[Row]) -> None:
    """One statement for each row, all of them sent at once, and one commit."""
    with connection.transaction(), connection.cursor() as cursor:
        cursor.executemany(ONE_BY_ONE, rows)


UPSERTS: Final[dict[str, Upsert]] = {
    "bulk upsert alone (unnest)": by_unnest,
    "bulk upsert alone (executemany)": by_executemany,
}


def upsert_alone(servers: Servers, name: str, upsert: Upsert, backlog: Backlog) -> Drained:
    """One connection, and rows that were made before the clock starts."""
    database = databases.ready(servers, "upsert", backlog.users)
    rows = [rival_row(*event) for event in backlog.events()]
    batches = [rows[at : at + ROWS] for at in range(0, len(rows), ROWS)]
    with servers.connect(database) as connection:
        _settle(connection, "app_users")
        upsert(connection, batches[0])
        before, own, began = _cpu(servers, []), time.process_time(), time.perf_counter()
        for batch in batches[1:]:
            upsert(connection, batch)
        seconds, own = time.perf_counter() - began, time.process_time() - own
        used = _cpu(servers, [])[0] - before[0]
    events = len(rows) - ROWS
    total, of_servers = (1000 * one / events if cost.available() else None for one in (used + own, used))
    return Drained(
        contender=name,
        users=backlog.users,
        changing=backlog.changing,
        round=backlog.round,
        events=events,
        rows_a_second=events / seconds,
        cpu_ms=total,
        servers_cpu_ms=of_servers,
        memory_mb=None,
    )


# --- What they have in common


def _settle(connection: Connection, *tables: str) -> None:
    """Leave nothing of what went before to be tidied up during the measurement."""
    for name in tables:
        connection.execute(f"vacuum {name}".encode())
    connection.execute("checkpoint")


# When rows became what they are, and how many each time. Of ours that is the moment their users were written too.
INBOX_STAMPS = """
select extract(epoch from pg_xact_commit_timestamp(xmin))::float8 as at, count(*)
from clerk.webhook_events where state = 'done'
group by at order by at
"""
RIVAL_STAMPS = """
select extract(epoch from pg_xact_commit_timestamp(xmin))::float8 as at, count(*)
from app_users where user_id = any(%s)
group by at order by at
"""


def _cpu(servers: Servers, running: Sequence[Running]) -> tuple[float, float]:
    """Processor time so far, of the servers and of a contender's processes."""
    return cost.cpu_seconds(servers.pids), cost.cpu_seconds(pid for one in running for pid in one.pids)


def _less(late: tuple[float, float], early: tuple[float, float]) -> tuple[float, float]:
    return late[0] - early[0], late[1] - early[1]


def _drained(
    name: str,
    backlog: Backlog,
    stamps: Sequence[tuple[float, int]],
    used: tuple[float, float],
    memory: float,
) -> Drained:
    """From the first commit to the last; what the first one brought was done before."""
    applied = sum(rows for _, rows in stamps)
    if applied != backlog.count or len(stamps) < 2:
        raise RuntimeError(f"{name} applied {applied} of {backlog.count} events in {len(stamps)} commits")
    (first, rows_first), (last, _) = stamps[0], stamps[-1]
    of_servers, of_processes = (1000 * seconds / applied for seconds in used)
    known = cost.available()
    return Drained(
        contender=name,
        users=backlog.users,
        changing=backlog.changing,
        round=backlog.round,
        events=applied,
        rows_a_second=(applied - rows_first) / (last - first),
        cpu_ms=of_servers + of_processes if known else None,
        servers_cpu_ms=of_servers if known else None,
        memory_mb=memory if known else None,
    )


def _until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {seconds:g} s for {what}, in vain")
        time.sleep(POLL_SECONDS)


# --- What is shown


def tables(found: Sequence[Drained]) -> list[Table]:
    """One row for each contender, population and share."""
    groups: dict[tuple[str, int, float], list[Drained]] = {}
    for one in found:
        groups.setdefault((one.contender, one.users, one.changing), []).append(one)
    rows = [
        (
            f"{contender}, {users:,} users, {changing:.0%} change",
            f"{same[0].events:,}",
            spread(each.rows_a_second for each in same),
            spread(each.cpu_ms for each in same),
            spread(each.servers_cpu_ms for each in same),
            spread(each.memory_mb for each in same),
        )
        for (contender, users, changing), same in groups.items()
    ]
    columns = ("", "backlog", "events/s", "CPU ms/event", "of that Postgres, Redis", "memory MB")
    return [table("Draining a backlog", columns, rows)]


def checks(found: Sequence[Drained]) -> list[Check]:
    """What is to be reached, round by round: each figure by the other's of the same round."""
    first, *others = dict.fromkeys(one.users for one in found if one.contender == OURS)
    shares = sorted({one.changing for one in found})

    def of(contender: str, users: int = first, share: float = shares[0]) -> list[float]:
        which = (contender, users, share)
        return [one.rows_a_second for one in found if (one.contender, one.users, one.changing) == which]

    made = [
        Check("drain, ours / task per event", ratios(of(OURS), of("task per event")), 15, at_least=True),
        Check("drain, ours / bulk upsert alone", ratios(of(OURS), of(_faster(found))), 0.6, at_least=True),
    ]
    if two := of(TWO_WORKERS):
        made.append(Check("drain, two workers / one", ratios(two, of(OURS)), 1, at_least=True))
    for users in others:
        for share in shares:
            what = f"drain, {first:,} users / {users:,} users, {share:.0%} change"
            made.append(Check(what, ratios(of(OURS, first, share), of(OURS, users, share)), 0.8, at_least=True))
    return made
