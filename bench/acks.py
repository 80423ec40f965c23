"""How many deliveries each design acknowledges, how fast, when their events are visible, and what that costs."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from rich.table import Table

from bench import contenders, cost, databases
from bench.contenders import Contender, Running
from bench.load import PATIENCE, Generator, Order, Sent, quantile, users_of
from bench.report import Check, ratios, spread, table
from bench.servers import Servers

MOST_A_SECOND: Final = 5000
"""More requests than this are not prepared for a second of as many as it takes."""

DRAIN_SECONDS: Final = 20.0
"""What is not applied so long after the last answer is reported as left, and thrown away."""

WARM_UP: Final = 300

Tell = Callable[[str], None]
"""What is being measured, as each part of it begins."""


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured. The defaults take some five minutes."""

    rounds: int = 2
    seconds: float = 2.5
    """Of each level."""
    rates: tuple[int, ...] = (50, 200, 500, 1000, 2000)
    """Events a second; after them comes as much as the contender takes."""
    users: tuple[int, ...] = (1_000_000, 10_000)
    """Populations. With the first of them and the first share of changes everything is measured; for comparison, the
    most that is taken with each other population and that share, and with that population and each other share."""
    changing: tuple[float, ...] = (0.1, 1.0)
    """Shares of events that change something, from small to large."""
    connections: int = 32
    rivals_server: str = "gthread"
    rivals_pool: str = "prefork"


SHORT: Final = Options(rounds=1, seconds=0.4, rates=(100,), users=(1000,), changing=(0.1,))
"""Everything once, and hardly measured: shows that it works."""


@dataclass(frozen=True, slots=True)
class Place:
    """Under what circumstances something was measured."""

    users: int
    changing: float
    rate: int | None
    """Events a second; None: as many as are taken."""
    round: int


@dataclass(frozen=True, slots=True)
class Level:
    """What one contender did."""

    contender: str
    place: Place
    skipped: bool = False
    """The rate before was already too much."""
    gave_up: bool = False
    """Answers came so late that sending was ended."""
    sent: int = 0
    accepted: int = 0
    acks_a_second: float = 0.0
    ack_p50_ms: float = 0.0
    ack_p99_ms: float = 0.0
    fresh_p50_ms: float | None = None
    fresh_p99_ms: float | None = None
    backlog: int = 0
    """Events acknowledged and not applied, at the last answer."""
    left: int = 0
    """The same, when waiting for them was given up."""
    unsent: int = 0
    """Events that were due and not sent any more."""
    unseen: int = 0
    """Events acknowledged and, after that wait, not visible."""
    cpu_ms: float | None = None
    """Processor time of all processes and servers for each event, until all were applied."""
    memory_mb: float = 0.0
    generator_us: float = 0.0
    """Processor time of the load generator for each request: not part of `cpu_ms`."""


@dataclass(frozen=True, slots=True)
class Round:
    """What all visits of one round have in common."""

    servers: Servers
    options: Options
    number: int
    seeds: Iterator[int]
    generator: Generator
    tell: Tell


def steps(options: Options) -> int:
    """How often `run` tells."""
    most = len(options.users) + len(options.changing) - 1
    return options.rounds * (3 * (most + len(options.rates)) + 1)


def run(servers: Servers, options: Options, tell: Tell) -> list[Level]:
    """Measure all contenders, in turns; they begin in another order each round."""
    levels: list[Level] = []
    seeds = itertools.count(1)
    everybody = list(contenders.contenders(options.rivals_server, options.rivals_pool).values())
    with closing(Generator()) as generator:
        for number in range(options.rounds):
            this = Round(servers, options, number, seeds, generator, tell)
            shift = number % len(everybody)
            for users in options.users:
                for contender in everybody[shift:] + everybody[:shift]:
                    if contender.table:
                        levels += _visit(this, contender, users)
                    elif users == options.users[0]:
                        levels.append(_visit_insert(this, contender))
    return levels


def _visit(this: Round, contender: Contender, users: int) -> Iterator[Level]:
    options = this.options
    database = databases.ready(this.servers, contender.short, users)
    with contenders.running(contender, this.servers, database) as running:
        _warm_up(this, running, users)
        for changing in options.changing if users == options.users[0] else options.changing[:1]:
            rates: tuple[int | None, ...] = (None,)
            if users == options.users[0] and changing == options.changing[0]:
                rates = (*options.rates, None)
            hopeless = False
            for rate in rates:
                this.tell(
                    f"{contender.name}, {users:,} users, {'the most it takes' if rate is None else f'{rate:,}/s'}"
                )
                place = Place(users, changing, rate, this.number)
                if hopeless and rate is not None:
                    yield Level(contender.name, place, skipped=True)
                    continue
                level = measure(this, running, place)
                hopeless = level.gave_up
                yield level


def _visit_insert(this: Round, contender: Contender) -> Level:
    this.tell(contender.name)
    options = this.options
    with contenders.running(contender, this.servers, databases.ready_inbox(this.servers)) as running:
        _warm_up(this, running, options.users[0])
        place = Place(options.users[0], options.changing[0], None, this.number)
        return measure(this, running, place)


def _order(running: Running, users: int, seed: int) -> Order:
    return Order(
        port=running.port,
        path=contenders.PATH,
        secret=running.servers.signing_secret,
        users=users,
        changing=0.0,
        seed=seed,
        version=int(time.time() * 1000),
        count=WARM_UP,
        rate=None,
        seconds=10.0,
    )


def _warm_up(this: Round, running: Running, users: int) -> None:
    this.generator.send(_order(running, users, next(this.seeds)))
    running.drained(DRAIN_SECONDS)


def measure(this: Round, running: Running, place: Place) -> Level:
    """Send at one rate, or all that is taken, and wait until everything acknowledged is applied."""
    order = dataclasses.replace(
        _order(running, place.users, next(this.seeds)),
        changing=place.changing,
        count=max(1, int((place.rate or MOST_A_SECOND) * this.options.seconds)),
        rate=place.rate,
        seconds=this.options.seconds,
        connections=this.options.connections,
    )
    roots = (*running.pids, *running.servers.pids)
    before = 0.0

    def begin() -> None:
        nonlocal before
        before = cost.cpu_seconds(roots)

    sent = this.generator.send(order, begin)
    backlog = running.waiting()
    left = running.drained(DRAIN_SECONDS)
    used = cost.cpu_seconds(roots) - before
    memory = cost.memory_mb(running.pids)
    accepted = sent.accepted
    if not accepted:
        raise RuntimeError(f"{running.contender.name} took nothing:\n{running.said()}")
    latencies = [1000 * (sent.answered[at] - sent.due[at]) for at in accepted]
    lasted = max(sent.answered) - min(sent.due)
    fresh, unseen = _freshness(running, sent, accepted)
    if left:
        running.clear()
    return Level(
        contender=running.contender.name,
        place=place,
        gave_up=sent.gave_up,
        sent=len(sent.status),
        accepted=len(accepted),
        acks_a_second=len(accepted) / lasted,
        ack_p50_ms=quantile(latencies, 0.5),
        ack_p99_ms=quantile(latencies, 0.99),
        fresh_p50_ms=quantile(fresh, 0.5) if fresh else None,
        fresh_p99_ms=quantile(fresh, 0.99) if fresh else None,
        backlog=backlog,
        left=left,
        unsent=sent.unsent,
        unseen=unseen,
        cpu_ms=1000 * used / max(1, len(accepted) - left) if cost.available() else None,
        memory_mb=memory,
        generator_us=1_000_000 * sent.cpu_seconds / len(sent.status),
    )


def _freshness(running: Running, sent: Sent, accepted: list[int]) -> tuple[list[float], int]:
    """Milliseconds from each answer to the commit that made its event visible, and how many never were.

    An event that was visible before its answer came counts as 0; one that was overtaken by a newer one of its user
    doesn't count.
    """
    if not running.contender.table:
        return [], 0
    ids = users_of(sent)
    found = contenders.visible(running.connection, running.contender.table, ids)
    fresh: list[float] = []
    unseen = 0
    for place in accepted:
        version, at = found.get(ids[place], (0, 0.0))
        if version == sent.versions[place]:
            fresh.append(max(0.0, 1000 * (at - sent.answered[place])))
        elif version < sent.versions[place]:
            unseen += 1
    return fresh, unseen


# What is shown


def tables(levels: Sequence[Level]) -> list[Table]:
    """One for each population and share of changes."""
    made = []
    for users, changing in dict.fromkeys((level.place.users, level.place.changing) for level in levels):
        here = [level for level in levels if (level.place.users, level.place.changing) == (users, changing)]
        rates = dict.fromkeys(level.place.rate for level in here)
        names = dict.fromkeys(level.contender for level in here)
        rows = [
            _row(name, rate, found)
            for rate in rates
            for name in names
            if (found := _of(here, name, rate=rate, users=users, changing=changing))
        ]
        title = f"{users:,} users, {changing:.0%} of events change something"
        made.append(table(title, COLUMNS, rows))
    return made


COLUMNS: Final = (
    "events/s",
    "",
    "acks/s",
    "ack p50, ms",
    "p99",
    "visible p50, ms",
    "p99",
    "backlog",
    "CPU, ms/event",
    "memory, MB",
)


def _row(name: str, rate: int | None, found: Sequence[Level]) -> tuple[str, ...]:
    told = "the most" if rate is None else f"{rate:,}"
    measured = [level for level in found if not level.skipped]
    if not measured:
        return (told, name, "fell behind before", *[""] * (len(COLUMNS) - 3))
    behind = sum(level.gave_up or level.skipped for level in found)
    left = max(level.left for level in measured)
    return (
        told,
        name + (f"\n[red]fell behind in {behind} of {len(found)}" if behind else ""),
        spread((level.acks_a_second for level in measured), "\n"),
        spread((level.ack_p50_ms for level in measured), "\n"),
        spread((level.ack_p99_ms for level in measured), "\n"),
        spread((level.fresh_p50_ms for level in measured), "\n"),
        spread((level.fresh_p99_ms for level in measured), "\n"),
        spread((level.backlog for level in measured), "\n") + (f"\n[red]{left:,} left" if left else ""),
        spread((level.cpu_ms for level in measured), "\n"),
        spread((level.memory_mb for level in measured), "\n"),
    )


def checks(levels: Sequence[Level]) -> list[Check]:
    """The targets, as far as what they speak of was measured."""
    found = []
    for users, changing in dict.fromkeys((level.place.users, level.place.changing) for level in levels):
        where = f"{users:,} users, {changing:.0%} change something"
        for name, target in (("inline", 1.5), ("task per event", 2.5), ("insert alone", 0.7)):
            ours, theirs = (_most(levels, one, users, changing) for one in ("ours", name))
            if both := ratios(*_paired(ours, theirs, lambda level: level.acks_a_second)):
                found.append(Check(f"acks/s, ours by {name}: {where}", both, target, at_least=True))
        ours, theirs = (_most(levels, one, users, changing) for one in ("ours", "task per event"))
        if both := ratios(*_paired(ours, theirs, lambda level: level.cpu_ms)):
            found.append(Check(f"CPU, ours by task per event: {where}", both, 0.5, at_least=False))
    return found + _checks_at_rates(levels)


def _checks_at_rates(levels: Sequence[Level]) -> list[Check]:
    found = []
    if at_200 := [level for level in levels if (level.contender, level.place.rate) == ("ours", 200) and level.sent]:
        found.append(Check("ours at 200/s: ack p99", [one.ack_p99_ms for one in at_200], 25, False, " ms"))
        for name, target, values in (
            ("p50", 25, [one.fresh_p50_ms for one in at_200]),
            ("p99", 150, [one.fresh_p99_ms for one in at_200]),
        ):
            known = [value for value in values if value is not None]
            found.append(Check(f"ours at 200/s: visible {name}", known, target, False, " ms"))
    if at_1000 := [level for level in levels if (level.contender, level.place.rate) == ("ours", 1000)]:
        # Sending is given up when a request has waited so long: by then so many more were due.
        given_up = 1000 * PATIENCE
        behind = [given_up if one.gave_up or one.skipped else float(one.backlog) for one in at_1000]
        found.append(Check("ours at 1,000/s: not answered or not applied at the end", behind, 250, False, " events"))
    return found


def _most(levels: Sequence[Level], name: str, users: int, changing: float) -> list[Level]:
    return _of(levels, name, rate=None, users=users, changing=changing)


def _of(levels: Sequence[Level], name: str, *, rate: int | None, users: int, changing: float) -> list[Level]:
    wanted = (name, rate, users, changing)
    return [one for one in levels if (one.contender, one.place.rate, one.place.users, one.place.changing) == wanted]


def _paired(
    ours: Sequence[Level], theirs: Sequence[Level], figure: Callable[[Level], float | None]
) -> tuple[list[float], list[float]]:
    """The same figure of both, of the rounds in which both have it."""
    by_round = {level.place.round: figure(level) for level in theirs}
    pairs = [(mine, other) for level in ours if (mine := figure(level)) and (other := by_round.get(level.place.round))]
    return [mine for mine, _ in pairs], [other for _, other in pairs]
