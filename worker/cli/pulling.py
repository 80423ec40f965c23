"""What the commands that pull from Clerk's API share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Self, TypeVar

import click
import psycopg
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from worker import db
from worker.clerk import reach
from worker.clerk_api import ClerkApi
from worker.cli.options import connect
from worker.errors import ConfigError, SyncError
from worker.jsontext import visible
from worker.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

LINE_SECONDS: Final = 5.0


def patience_option(command: F) -> F:
    """`--patience SECONDS`: how long to try a call."""
    return click.option(
        "--patience",
        type=click.FloatRange(0, 86_400),
        default=120.0,
        show_default=True,
        metavar="SECONDS",
        help="How long to try each call again while Clerk doesn't answer.",
    )(command)


@contextlib.contextmanager
def pulling(found: Settings, patience: float, *, strict: bool = False) -> Iterator[tuple[db.Connection, ClerkApi]]:
    """A connection for the users, and Clerk's API. Database errors come out as SyncError."""
    try:
        with reach(found, lambda: connect(found.database_url), patience=patience, strict=strict) as (connection, api):
            yield connection, api
    except psycopg.Error as error:
        raise SyncError(f"Postgres failed: {db.describe(error)}") from None


class Shown:
    """Shows how far a command is: a bar for whoever waits at a terminal, else a line every few seconds."""

    def __init__(self, *, quiet: bool) -> None:
        errors = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} users, {task.fields[pace]:,.0f}/s"),
            TimeRemainingColumn(),
        )
        self._quiet = quiet
        self._bar = Progress(*columns, console=errors, transient=True) if errors.is_terminal and not quiet else None
        self._doing = ""
        self._before = 0
        self._started = 0.0
        self._next = time.monotonic() + LINE_SECONDS
        self.begun = False
        """Whether anything was done."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, doing: str, done: int, total: int) -> None:
        """Users `done` of all that there are to do; what was done at the first call isn't counted into the pace."""
        now = time.monotonic()
        self.begun = True
        if doing != self._doing:
            self._doing, self._before, self._started = doing, done, now
        pace = (done - self._before) / max(now - self._started, 0.001)
        if self._bar:
            self._draw(self._bar, done, total, pace)
        elif not self._quiet and now >= self._next:
            self._next = now + LINE_SECONDS
            left = f"{(total - done) / pace:,.0f} s left" if pace else "waiting"
            click.echo(f"{self._doing}: {done:,} of {total:,} users, {pace:,.0f}/s, {left}.", err=True)

    def _draw(self, bar: Progress, done: int, total: int, pace: float) -> None:
        if not bar.tasks or bar.tasks[0].description != self._doing:
            for task in bar.task_ids:
                bar.remove_task(task)
            bar.add_task(self._doing, total=total, completed=done, pace=0.0)
            bar.start()
        bar.update(bar.task_ids[0], completed=done, total=total, pace=pace)


@contextlib.contextmanager
def ending(shown: Shown, stays: str) -> Iterator[None]:
    """Have whatever ends a run that has begun say what stays of it."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*([stays] if shown.begun else [])) from None
    except (SyncError, psycopg.Error) as error:
        if not shown.begun or isinstance(error, ConfigError):
            raise
        reason = f"Postgres failed: {db.describe(error)}" if isinstance(error, psycopg.Error) else str(error)
        raise SyncError(f"{reason}. {stays}") from None


def print_unusable(listed: list[dict[str, Any]], number: int) -> None:
    """Who couldn't be used, and why: the first ones of so many."""
    if not number:
        return
    click.echo("\nThese users can't be used, and are as they were:")
    for user in listed:
        click.echo(f"  {visible(user['user_id'] or '(no id)')}: {visible(user['reason'])}")
    if (more := number - len(listed)) > 0:
        click.echo(f"  and {more:,} more.")
