"""The use case: compare our users with Clerk's and repair what differs, lost deletions included.

*Incremental* reads the latest changes, as far back as no run has compared yet. *Full* sweeps every user, then asks by
id for those of ours whom the sweep didn't meet; nobody is erased before the sweep is whole.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Final

import psycopg

from worker import api_budget, pulled, runs, users
from worker.clerk import (
    AGAIN_SECONDS,
    CONTROLS,
    LookedUp,
    another_instance,
    heard_of,
    is_fresh,
    look_up,
    look_up_beside,
)
from worker.clerk_api import CLOCKS_APART_MS, MOST_IDS, MOST_USERS, ClerkApi, Page, is_user_id
from worker.db import Connection, deadline
from worker.errors import SyncError
from worker.events import Unusable, UserChanged, parse_user
from worker.policy import Policy
from worker.refresh import UNASKABLE, settle
from worker.runs import DRIFT, FULL, INCREMENTAL, Run
from worker.sweep import Batch, ahead, read, too_few

REPAIRED: Final = frozenset({"missing", "outdated", "incomplete", "unweighed"})
"""The differences for which a user passes the gate."""

OVERLAP: Final = 10
"""How many users of a page the next one repeats, to show that none was skipped where some were deleted meanwhile."""

ENOUGH: Final = 450
"""Past what was compared before, so many users in a row that are as they should be end an incremental run."""

MOST_PAGES: Final = 100
"""Longer than this an incremental run isn't cheaper than a full one: Clerk is slow with large offsets."""

MOST_STEPS_BACK: Final = 5

MOST_NAMED: Final = 10_000
"""How many users of each kind of drift are named."""

MANY, MANY_OF_ALL = 100, 0.2
"""So many users whom Clerk no longer lists, if they are so great a part of ours, are erased only when told to."""

UNSWEPT_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is: `phase` is comparing (users that Clerk has) or looking up (users that the sweep didn't meet)."""

    phase: str
    done: int
    total: int


Observe = Callable[[Progress], None]


@dataclass(slots=True)
class _Work:
    connection: Connection
    policy: Policy
    api: ClerkApi
    run: Run
    total: int
    earlier: int
    key: str
    erase_many: bool
    observe: Observe
    sleep: Callable[[float], object]

    def calls(self) -> int:
        """How many were made for this run."""
        return self.api.calls - self.earlier


def reconcile(
    connection: Connection,
    policy: Policy,
    api: ClerkApi,
    *,
    key: str,
    full: bool = False,
    periodic: bool = False,
    erase_many: bool = False,
    observe: Observe = lambda _: None,
    sleep: Callable[[float], object] = time.sleep,
) -> Run:
    """Repair what differs from Clerk: by an incremental run, or a full one where it is asked for, where no run was ever
    whole, where all users fit in one page, where it is due for today (if `periodic`), or where the counts of users
    differ. Each page is a transaction; a run that fails has repaired what it came to. Where more than a fifth of our
    users would be erased, it fails unless told to `erase_many`. `key` is api_budget.key_id of the secret key.

    Raises AlreadyRunning, what ClerkApi does, and psycopg.Error.
    """
    earlier = api.calls
    gone = users.count_gone(connection)
    # Before the lock: who waits for a Clerk that is away keeps nobody out.
    total = api.count()
    with runs.alone(connection):
        since = runs.covered(connection)
        kind, cause = _kind(connection, total, since, full=full, periodic=periodic)
        run = runs.begin(connection, kind, cause)
        work = _Work(connection, policy, api, run, total, earlier, key, erase_many, observe, sleep)
        with runs.recorded(connection, run, work.calls):
            if run.kind == INCREMENTAL and since is not None:
                if not _incremental(work, since):
                    _turn(run, "many")
                elif not _counts_agree(work, gone) and not runs.too_soon(connection):
                    _turn(run, "counts")
            if run.kind == FULL:
                _full(work)
            run.state, run.calls = "done", work.calls()
            runs.save(connection, run)
    return run


def _kind(connection: Connection, total: int, since: int | None, *, full: bool, periodic: bool) -> tuple[str, str]:
    """What kind of run it is to be, and why."""
    if full:
        return FULL, "asked"
    if total < MOST_USERS:
        return FULL, "small"
    if since is None:
        return FULL, "first"
    if periodic and runs.daily_due(connection) and not runs.too_soon(connection):
        return FULL, "daily"
    return INCREMENTAL, "periodic" if periodic else "asked"


def _turn(run: Run, cause: str) -> None:
    """Make a full run of an incremental one. What it found stays found."""
    run.kind, run.cause, run.covers = FULL, cause, None
    run.counters = Counter({name: number for name, number in run.counters.items() if name in DRIFT})
    run.unusable = []


# --- Comparing a page


def _repair(work: _Work, changed: Sequence[UserChanged], unusable: Sequence[Unusable]) -> dict[str, str]:
    """Compare users, pass those that differ through the gate, count, and save, in one transaction; how each stood."""
    connection, policy, run = work.connection, work.policy, work.run
    run.calls = work.calls()
    with deadline(connection, pulled.SECONDS), connection.transaction():
        differences, refused = pulled.compare(connection, policy, changed)
        wanted = [user for user in changed if differences.get(user.user_id) in REPAIRED]
        passed = pulled.pass_users(connection, policy, [users.weigh(policy, user) for user in wanted])
        run.count(passed.outcomes.values())
        for unused in (*unusable, *refused, *passed.refused):
            run.note(unused)
        for difference in differences.values():
            match difference:
                case "same":
                    run.counters["unchanged"] += 1
                case "newer":
                    run.counters["older"] += 1
                case _:  # tombstoned, or what was repaired
                    run.counters[difference] += 1
        runs.save(connection, run)
    users.warn(passed.crossings, policy.budget)
    work.observe(Progress("comparing", run.users, max(work.total, run.users)))
    return differences


# --- Incremental


def _incremental(work: _Work, since: int) -> bool:
    """Repair from the latest change back to those until `since` (ms), and some more; False where they are too many."""
    offset, known, past, steps_back = 0, 0, False, 0
    before: set[tuple[str | bytes, int]] = set()
    met: set[tuple[str, int]] = set()
    for _ in range(MOST_PAGES):
        page = work.api.users(order_by="-updated_at", limit=MOST_USERS, offset=offset)
        parsed = [parse_user(raw, page.read_at) for raw in page.users]
        named = {_name(raw, user): user for raw, user in zip(page.users, parsed, strict=True)}
        if before and offset and not before & named.keys():
            # Deletions moved up more users than the pages have in common.
            if steps_back == MOST_STEPS_BACK:
                raise SyncError("Clerk's list of changes moves faster than it can be read")
            steps_back += 1
            offset = max(0, offset - MOST_USERS // 2)
            continue
        new = [user for name, user in named.items() if name not in before]
        before = set(named)
        changed = [user for user in new if isinstance(user, UserChanged)]
        if work.run.covers is None:
            work.run.covers = _newest(changed, page.read_at, since)
        differences = _repair(work, changed, [user for user in new if isinstance(user, Unusable)])
        met.update((user.user_id, user.version) for user in changed)
        for user in changed:
            known = 0 if differences.get(user.user_id) in ("missing", "outdated") else known + 1
            past = past or user.version <= since
        if past and known >= ENOUGH:
            break
        if len(page.users) < MOST_USERS:
            # The end, or fewer users than were asked for: what lies behind them, a sweep finds out.
            if offset + len(page.users) < work.total:
                return False
            break
        offset += MOST_USERS - OVERLAP
    else:
        return False
    if offset:
        # Who changed while we read has moved to the top. A new user among them, unmet, would make up for a deletion.
        _repair_page(work, work.api.users(order_by="-updated_at", limit=MOST_USERS), met)
    return True


def _newest(changed: Sequence[UserChanged], read_at: int | None, since: int) -> int:
    """The version of the latest change. One far ahead of Clerk's own clock is none."""
    latest = None if read_at is None else read_at + CLOCKS_APART_MS
    return max((user.version for user in changed if latest is None or user.version <= latest), default=since)


def _name(raw: bytes, user: UserChanged | Unusable) -> tuple[str | bytes, int]:
    """What a user is known by from page to page, as long as they don't change."""
    return user.user_id or raw, user.version if isinstance(user, UserChanged) else 0


def _counts_agree(work: _Work, gone: int) -> bool:
    """Whether Clerk has as many users as are here. Where not, look again a little later: somebody may have signed up,
    or been deleted, a moment ago. Clerk counts before we read, so that nobody who came since makes up for who is gone;
    and where there are more than the `gone` from before Clerk counted, one whom it counted may make up for another.
    """
    surplus = runs.surplus(work.connection)
    if _count(work, work.total) == surplus and users.count_gone(work.connection) == gone:
        return True
    work.sleep(AGAIN_SECONDS)
    counted = work.api.count()
    _repair_page(work, work.api.users(order_by="-updated_at", limit=MOST_USERS), set())
    return _count(work, counted) == surplus


def _repair_page(work: _Work, page: Page, met: AbstractSet[tuple[str, int]]) -> None:
    """Repair whom a page brings, but for those who were met as they are."""
    parsed = [parse_user(raw, page.read_at) for raw in page.users]
    changed = [user for user in parsed if isinstance(user, UserChanged)]
    _repair(work, [user for user in changed if (user.user_id, user.version) not in met], [])


def _count(work: _Work, counted: int) -> int:
    """By how many users Clerk's count is above ours."""
    here = users.count_live(work.connection)
    work.run.counters["counted"], work.run.counters["here"] = counted, here
    return counted - here


# --- Full


def _full(work: _Work) -> None:
    connection, run = work.connection, work.run

    def use(batch: Batch) -> None:
        if not run.users:  # the first page
            run.covers = batch.updated_before
        _repair(work, batch.changed, batch.unusable)

    with _sweep(connection, work.api, work.total, use) as listed:
        total = _find_unswept(connection, work.api, work.key)
        if not work.erase_many and total > MANY and total > MANY_OF_ALL * users.count_live(connection):
            raise SyncError(
                f"Clerk's list lacks {total:,} of our users, more than a fifth: nobody was erased. If they are gone "
                "indeed: clerk-sync reconcile --full --erase-many"
            )
        if total and not work.erase_many and too_few(run.users, work.total, work.api, slack=0.001):
            raise SyncError(
                "Clerk counts more users than its list has: nobody was erased. If those whom the list lacks are gone "
                "indeed: clerk-sync reconcile --full --erase-many"
            )
        fresh: list[Unswept] = []
        done = 0
        for some in _unswept(connection):
            fresh += _settle_unswept(work, some, listed, again=False)
            done += len(some)
            work.observe(Progress("looking up", done, total))
        if fresh:
            work.sleep(AGAIN_SECONDS)
        for start in range(0, len(fresh), UNSWEPT_AT_ONCE):
            _settle_unswept(work, fresh[start : start + UNSWEPT_AT_ONCE], listed, again=True)
    if work.total >= MOST_USERS:
        # Fewer at Clerk than here are deletions under way, or lost ones: nothing to get used to.
        run.counters["surplus"] = max(0, _count(work, work.api.count()))


UNSWEPT_AT_ONCE: Final = MOST_IDS - CONTROLS

Unswept = tuple[str, int]
"""A user of ours whom the sweep didn't meet, and the version here."""


def _settle_unswept(work: _Work, some: Sequence[Unswept], listed: Sequence[str], *, again: bool) -> list[Unswept]:
    """Ask for users by id: erase those that are gone, repair the others. Gives those of whom that can't be said yet,
    which is not to be where it is asked `again`."""
    run = work.run
    for unusable in _unaskable(some):
        run.note(unusable)
    answer = _look_up(work.api, _askable(some), listed)
    gone = set(answer.gone)
    fresh = [] if again else [one for one in some if one[0] in gone and is_fresh(one[1], answer.read_at)]
    answer.gone = sorted(gone - {user_id for user_id, _ in fresh})
    for result in settle(work.connection, work.policy, answer):
        match result.outcome:
            case "erased":
                run.counters.update(("gone", "erased"))
            case "unusable":
                run.note(Unusable(None, result.user_id, result.reason or ""))
            case outcome:
                run.count([outcome])
    run.calls = work.calls()
    runs.save(work.connection, run)
    return fresh


def _askable(some: Sequence[Unswept]) -> list[str]:
    return [user_id for user_id, _ in some if is_user_id(user_id)]


def _unaskable(some: Sequence[Unswept]) -> list[Unusable]:
    return [Unusable(None, user_id, UNASKABLE) for user_id, _ in some if not is_user_id(user_id)]


def _look_up(api: ClerkApi, user_ids: Sequence[str], listed: Sequence[str]) -> LookedUp:
    """Look up users whom a sweep didn't meet, beside some of those that it `listed`."""
    if listed or not user_ids:
        return look_up_beside(api, user_ids, listed)
    if counted := api.count():
        raise SyncError(f"Clerk's API counts {counted:,} users and lists none: nobody was erased")
    return look_up(api, user_ids)


SWEEPING = """
drop table if exists pg_temp.clerk_swept, pg_temp.clerk_unswept;
create temporary table clerk_swept (user_id text not null);
"""

SWEPT = """
insert into pg_temp.clerk_swept select unnest(%(user_id)s::text[])
"""

SWEPT_NO_MORE = """
drop table if exists pg_temp.clerk_swept, pg_temp.clerk_unswept
"""


@contextlib.contextmanager
def _sweep(connection: Connection, api: ClerkApi, total: int, use: Callable[[Batch], None]) -> Iterator[list[str]]:
    """Use every user that Clerk lists, `total` of them, and note for the block whom the sweep met; gives some of
    those."""
    connection.execute(SWEEPING)
    try:
        listed: list[str] = []
        with ahead(read(api, None, total)) as batches:
            for batch in batches:
                use(batch)
                met = [user.user_id for user in batch.changed]
                met += [user.user_id for user in batch.unusable if user.user_id is not None]
                connection.execute(SWEPT, {"user_id": met})
                listed += [user_id for user_id in met if is_user_id(user_id)][:CONTROLS]
        # Of the whole list: its ends may be special.
        yield random.sample(listed, min(len(listed), 2 * CONTROLS))
    finally:
        with contextlib.suppress(psycopg.Error):
            connection.execute(SWEPT_NO_MORE)


# Nobody else sees these tables; what is here and wasn't met is few users. Whom `check` makes up, it removes by itself.
FIND_UNSWEPT = """
set local statement_timeout = '10min';
analyze pg_temp.clerk_swept;
create temporary table clerk_unswept as
select user_id, version from clerk.users
where deleted_at is null and not starts_with(user_id, 'user_clerk_sync_check_')
  and not exists (select from pg_temp.clerk_swept as met where met.user_id = users.user_id);
create index on pg_temp.clerk_unswept (user_id);
"""

COUNT_UNSWEPT = """
select count(*) from pg_temp.clerk_unswept
"""


UNSWEPT_OF = """
select user_id from pg_temp.clerk_unswept where user_id = any(%(user_id)s)
"""


def _find_unswept(connection: Connection, api: ClerkApi, key: str) -> int:
    """Find the users here whom the sweep didn't meet; how many they are. Raises ConfigError where Clerk knows nobody of
    whom webhooks told, and such users didn't prove the key before."""
    with deadline(connection, UNSWEPT_SECONDS), connection.transaction():
        connection.execute(FIND_UNSWEPT)
    ((number,),) = connection.execute(COUNT_UNSWEPT).fetchall()
    if api_budget.known_by(connection, key) != "webhooks" and (heard := heard_of(connection)):
        unmet = connection.execute(UNSWEPT_OF, {"user_id": heard}).fetchall()
        if len(unmet) == len(heard) and not look_up(api, heard).known:
            raise another_instance(heard[0])
        api_budget.confirm(connection, key, "webhooks")
    return int(number)


UNSWEPT = """
select user_id, version from pg_temp.clerk_unswept
where user_id > %(after)s
order by user_id
limit %(most)s
"""


def _unswept(connection: Connection) -> Iterator[list[Unswept]]:
    after = ""
    while some := connection.execute(UNSWEPT, {"after": after, "most": UNSWEPT_AT_ONCE}).fetchall():
        yield some
        after = some[-1][0]


# --- Checking


@dataclass(slots=True)
class Drift:
    """How our users differ from Clerk's: how many were `compared`, of how many each of DRIFT is true, and who they are
    (the first MOST_NAMED). Of `tombstoned` ones Clerk still has the user; here they were deleted, which is for ever."""

    compared: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in DRIFT})
    unusable: list[Unusable] = field(default_factory=list)
    calls: int = 0

    @property
    def total(self) -> int:
        """How many users differ."""
        return sum(self.counts[name] for name in DRIFT)

    def note(self, difference: str, user_id: str) -> None:
        """Count a user, and name the first ones."""
        self.counts[difference] += 1
        if difference in DRIFT and len(self.named[difference]) < MOST_NAMED:
            self.named[difference].append(user_id)


@dataclass(slots=True)
class _Comparison:
    connection: Connection
    policy: Policy
    drift: Drift = field(default_factory=Drift)
    differing: dict[str, UserChanged] = field(default_factory=dict)  # to be compared again
    gone: list[str] = field(default_factory=list)

    def compare(self, changed: Sequence[UserChanged]) -> None:
        """Note how users stand; whoever differs waits to be compared again, as long as those aren't too many."""
        differences, refused = pulled.compare(self.connection, self.policy, changed)
        self.drift.unusable += refused
        for user in changed:
            difference = differences.get(user.user_id, "unusable")
            if difference in DRIFT and len(self.differing) < MOST_NAMED:
                self.differing[user.user_id] = user
            else:
                self.drift.note(difference, user.user_id)

    def compare_again(self, look: Callable[[Sequence[str]], LookedUp]) -> None:
        """Note how those stand now who differed; Clerk is asked once more for the ones that were gone."""
        waiting = list(self.differing.values())
        for start in range(0, len(waiting), MOST_USERS):
            differences, _ = pulled.compare(self.connection, self.policy, waiting[start : start + MOST_USERS])
            for user_id, difference in differences.items():
                self.drift.note(difference, user_id)
        for start in range(0, len(self.gone), UNSWEPT_AT_ONCE):
            still_here = users.live(self.connection, self.gone[start : start + UNSWEPT_AT_ONCE])
            for user_id in look(still_here).gone:
                self.drift.note("gone", user_id)


def check(
    connection: Connection,
    policy: Policy,
    api: ClerkApi,
    *,
    key: str,
    observe: Observe = lambda _: None,
    sleep: Callable[[float], object] = time.sleep,
) -> Drift:
    """Compare every user and change nothing. What differs is compared once more a little later, since its webhook may
    be under way. Raises what ClerkApi does, and psycopg.Error."""
    earlier = api.calls
    total = api.count()
    comparison = _Comparison(connection, policy)
    drift = comparison.drift

    def use(batch: Batch) -> None:
        comparison.compare(batch.changed)
        drift.unusable += batch.unusable
        drift.compared += len(batch.changed) + len(batch.unusable)
        observe(Progress("comparing", drift.compared, max(total, drift.compared)))

    with _sweep(connection, api, total, use) as listed:
        unswept, done = _find_unswept(connection, api, key), 0
        for some in _unswept(connection):
            drift.unusable += _unaskable(some)
            answer = _look_up(api, _askable(some), listed)
            comparison.gone += answer.gone
            comparison.compare(answer.changed)
            drift.unusable += answer.unusable
            done += len(some)
            observe(Progress("looking up", done, unswept))
    if comparison.differing or comparison.gone:
        sleep(AGAIN_SECONDS)
        comparison.compare_again(lambda user_ids: _look_up(api, user_ids, listed))
    drift.calls = api.calls - earlier
    return drift
