"""`clerk-sync backfill`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import psycopg
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from worker import backfill as pull
from worker import db
from worker.cli.charts import plural
from worker.cli.options import info_option, json_option, settings, to_json
from worker.cli.pulling import patience_option, pulling
from worker.errors import ConfigError, SyncError
from worker.jsontext import visible
from worker.runs import Run

LINE_SECONDS = 5.0
COUNTERS = ("applied", "unchanged", "older", "tombstoned", "unusable")
GO_ON = "What was done stays; clerk-sync backfill goes on from there."


@click.command()
@click.option("--restart", is_flag=True, help="Begin with the first user, also where the last run was cut short.")
@patience_option
@info_option
@json_option
def backfill(*, restart: bool, patience: float, info: Path | None, as_json: bool) -> None:
    """Pull every user from Clerk's API: for those who were there before the webhook endpoint.

    \b
    clerk-sync backfill

    Runs beside live webhooks: what is newer here stays, and who was deleted stays deleted. A run that was cut short
    goes on where it was. Run it with the settings that the workers have. Exits 1 where a user can't be used (they are
    listed), where Clerk doesn't answer, or where another backfill runs.
    """
    found = settings(info, "database_url", "secret_key")
    started = time.monotonic()
    with pulling(found, patience) as (connection, api), _shown(quiet=as_json) as observe:
        begun: list[Run] = []

        def watch(progress: pull.Progress) -> None:
            begun[:] = [progress.run]
            observe(progress)

        try:
            run = pull.backfill(connection, found.policy, api, restart=restart, observe=watch)
        except (KeyboardInterrupt, SyncError, psycopg.Error) as error:
            if not begun or isinstance(error, ConfigError):
                raise
            raise SyncError(f"{_cause(error)}. {GO_ON}") from None
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        counts = {name: run.counters[name] for name in COUNTERS}
        result = {"run": run.id, "state": run.state, "users": run.users, **counts}
        click.echo(to_json(result | {"calls": run.calls, "seconds": seconds, "unusable_users": run.unusable}))
    else:
        _print(run, seconds)
    sys.exit(1 if run.counters["unusable"] else 0)


def _cause(error: BaseException) -> str:
    if isinstance(error, psycopg.Error):
        return f"Postgres failed: {db.describe(error)}"
    return str(error) or "interrupted"


@contextlib.contextmanager
def _shown(*, quiet: bool) -> Iterator[Callable[[pull.Progress], None]]:
    """Who shows how far the run is: a bar for whoever waits at a terminal, else a line every few seconds."""
    errors = Console(stderr=True)
    if quiet:
        yield lambda _: None
    elif not errors.is_terminal:
        yield _Lines()
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} users, {task.fields[pace]:,.0f}/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=errors, transient=True) as bar:
            task = bar.add_task("Backfill", total=0, pace=0.0)
            started = time.monotonic()

            def observe(progress: pull.Progress) -> None:
                bar.update(task, completed=progress.run.users, total=_total(progress), pace=_pace(progress, started))

            yield observe


class _Lines:
    """Prints how far a run is, at the start and every few seconds."""

    def __init__(self) -> None:
        self._started = 0.0
        self._next = 0.0

    def __call__(self, progress: pull.Progress) -> None:
        now = time.monotonic()
        users, total = progress.run.users, _total(progress)
        if not self._started:
            self._started = now
            self._next = now + LINE_SECONDS
            place = f"goes on after {users:,} of" if progress.before else "begins:"
            click.echo(f"Run {progress.run.id} {place} {plural(total, 'user')}.", err=True)
        elif now >= self._next:
            self._next = now + LINE_SECONDS
            pace = _pace(progress, self._started)
            left = f"{(total - users) / pace:,.0f} s left" if pace else "waiting"
            click.echo(f"{users:,} of {total:,} users, {pace:,.0f}/s, {left}.", err=True)


def _total(progress: pull.Progress) -> int:
    """Users may come and go while it runs."""
    return max(progress.total, progress.run.users)


def _pace(progress: pull.Progress, started: float) -> float:
    return (progress.run.users - progress.before) / max(time.monotonic() - started, 0.001)


def _print(run: Run, seconds: float) -> None:
    counts = ", ".join(f"{run.counters[name]:,} {name}" for name in COUNTERS)
    click.echo(f"Run {run.id} is done: {plural(run.users, 'user')} ({counts}).")
    click.echo(f"{plural(run.calls, 'call')} to Clerk's API; {seconds:,.1f} s.")
    if run.unusable:
        click.echo("\nThese users can't be used, and are as they were:")
        for user in run.unusable:
            click.echo(f"  {visible(user['user_id'] or '(no id)')}: {visible(user['reason'])}")
        if (more := run.counters["unusable"] - len(run.unusable)) > 0:
            click.echo(f"  and {more:,} more.")
