"""The use case: pull every user from Clerk's API, page by page, beside live events.

A page's users and the run's place are committed together, so a run that was cut short goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

from worker import runs, users
from worker.clerk_api import ClerkApi
from worker.db import Connection, deadline
from worker.policy import Policy
from worker.pulled import SECONDS, pass_users
from worker.runs import BACKFILL, Run
from worker.sweep import Batch, Cursor, ahead, read
from worker.users import Change


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is; `total` is how many users Clerk had when it began or went on, `before` how many users the run
    had been through by then."""

    run: Run
    total: int
    before: int


def backfill(
    connection: Connection,
    policy: Policy,
    api: ClerkApi,
    *,
    restart: bool = False,
    observe: Callable[[Progress], None] = lambda _: None,
) -> Run:
    """Pull every user, or go on with the last run where it was cut short, unless it is to `restart`.

    `observe` is called at the start and after each page's commit. Raises SyncError where another run pulls, what
    ClerkApi does, and psycopg.Error: then the next call goes on.
    """
    earlier = api.calls
    # Before the lock: a wrong key leaves no run behind, and who waits for a Clerk that is away keeps nobody out.
    total = api.count()
    with runs.alone(connection):
        run = runs.latest(connection, BACKFILL)
        if run is None or run.state == "done" or restart:
            run = runs.begin(connection, BACKFILL, "asked")
        else:
            runs.go_on(connection, run)
        progress = Progress(run, total, run.users)
        calls = run.calls - earlier
        cursor = None if run.cursor is None else Cursor(**run.cursor)
        with runs.recorded(connection, run, lambda: calls + api.calls):
            observe(progress)
            with ahead(_weighed(policy, read(api, cursor, total, run.users))) as batches:
                for batch, changes in batches:
                    run.calls = calls + api.calls
                    _apply(connection, policy, run, batch, changes)
                    observe(progress)
    return run


def _weighed(policy: Policy, batches: Iterable[Batch]) -> Iterator[tuple[Batch, list[Change]]]:
    """Weigh where the pages are read, while Postgres works on the page before."""
    for batch in batches:
        yield batch, [users.weigh(policy, user) for user in batch.changed]


def _apply(connection: Connection, policy: Policy, run: Run, batch: Batch, changes: list[Change]) -> None:
    """Pass a page through the gate and save the place behind it, in one transaction."""
    if run.cursor is None:
        run.covers = batch.updated_before
    with deadline(connection, SECONDS), connection.transaction():
        passed = pass_users(connection, policy, changes)
        run.count(passed.outcomes.values())
        for unusable in (*batch.unusable, *passed.refused):
            run.note(unusable)
        run.cursor = None if batch.cursor is None else asdict(batch.cursor)
        if batch.ended:
            run.state = "done"
            run.counters["surplus"] = run.counters["tombstoned"] + run.counters["unusable"]
        runs.save(connection, run)
    users.warn(passed.crossings, policy.budget)
